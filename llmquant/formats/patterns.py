"""Regular expressions from an untrusted `quantization_config`, matched against module names.

Python's `re` backtracks and cannot be interrupted, so a short pattern can run for years. Three limits keep the matching
of a whole checkpoint within seconds. Exceeding one raises a UserError:

    steps    the number of ways to match one name, estimated from the pattern (`count_steps`)
    length   the length of a name; no real module name reaches the limit
    time     the matching time of all patterns of one configuration (`MatchTimer`)

The `regex` package has a timeout for matching but none for compiling, and compiling `(?:a{1000000}){1000000}` takes
gigabytes.
"""

from __future__ import annotations

import re
import time
import warnings

from llmquant.errors import UserError

MAX_STEPS = 2e7
"""Largest accepted `count_steps`: about two seconds of matching."""
STEPS_PER_REPETITION = 40
"""Factor of `count_steps` for a repetition. With k repetitions in a row, `re` tries C(128 + k, k) ways to match 128
characters, which is at most 5 * 40**k for k up to 6."""
MAX_NAME_LENGTH = 128
"""Longest name that a pattern is matched against, in characters."""
MAX_SECONDS = 1.0
MAX_SECONDS_PER_NAME = 1e-3

_TOKEN = re.compile(
    r"(?P<one_way>(?:\\d|\[0-9\])[+*](?=\\\.))"  # a number before a literal dot can end in one place only
    r"|(?P<character>\\.|\[\^?\]?(?:\\.|[^\]\\])*\])"
    r"|(?P<open>\(\??)"
    r"|(?P<close>\))"
    r"|(?P<alternative>\|)"
    r"|(?P<repeat>(?:[*+]|\{\d*,?\d*\})[?+]?)"
    r"|(?P<optional>\?[?+]?)"
    r"|(?P<other>.)",
    re.DOTALL,
)
_COMMENT = re.compile(r"\(\?(#|[aiLmsu]*x)")
"""The start of a comment, or of the mode that has comments. A comment could hide from `count_steps` what follows it."""


class MatchTimer:
    """The time that all patterns of one configuration have spent on matching."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.num_matches = 0

    def is_over(self) -> bool:
        """Whether the time is over: `MAX_SECONDS`, plus a share per match, because larger models have more names."""
        return self.seconds > MAX_SECONDS + self.num_matches * MAX_SECONDS_PER_NAME


class Pattern:
    """A regular expression that is matched from the start of a module name.

    where: the place of the pattern in the configuration, for error messages. Raises UserError if the pattern is not a
    regular expression, or if matching it could take forever.
    """

    def __init__(self, pattern: str, where: str, timer: MatchTimer) -> None:
        self._where = f"{where}: {pattern!r:.60}"
        self._timer = timer
        if count_steps(pattern) > MAX_STEPS:
            raise UserError(
                f"{self._where} repeats a group, or has too many repetitions: matching it could take forever; "
                "write a simpler expression"
            )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # warnings about syntax that may change its meaning in a later Python
                self._compiled = re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise UserError(f"{self._where} is not a regular expression ({error})") from None

    def matches(self, name: str) -> bool:
        """Whether the pattern matches the start of a module name. Raises UserError if that takes too long."""
        if len(name) > MAX_NAME_LENGTH:
            raise UserError(
                f"{self._where} is to be matched against {name!r:.40}…, a name of {len(name)} characters; "
                f"no module has a name of more than {MAX_NAME_LENGTH}, rename the tensor"
            )
        start = time.thread_time()
        is_match = self._compiled.match(name) is not None
        self._timer.seconds += time.thread_time() - start
        self._timer.num_matches += 1
        if self._timer.is_over():
            raise UserError(
                f"{self._where}: matching module names took {self._timer.seconds:.0f} seconds; "
                "write simpler expressions"
            )
        return is_match


def count_steps(pattern: str) -> float:
    """Return an estimate of the ways in which `re` tries to match a name of `MAX_NAME_LENGTH` characters.

    A repetition of one character multiplies the ways by `STEPS_PER_REPETITION`, an optional item by 2, and
    alternatives add up. A repeated group counts as infinite, because its ways multiply with each repetition.
    """
    if _COMMENT.search(pattern):
        return float("inf")
    # For each open group: the ways of its earlier alternatives, and of the current one.
    earlier, current = [0.0], [1.0]
    previous = None
    for token in _TOKEN.finditer(pattern):
        kind = token.lastgroup
        if kind == "open":
            earlier.append(0.0)
            current.append(1.0)
        elif kind == "alternative":
            earlier[-1] += current[-1]
            current[-1] = 1.0
        elif kind == "close" and len(current) > 1:
            ways = earlier.pop() + current.pop()
            current[-1] *= ways
        elif kind == "repeat":
            current[-1] *= float("inf") if previous == "close" else STEPS_PER_REPETITION
        elif kind == "optional":
            current[-1] *= 2
        previous = kind
    return sum(earlier) + sum(current)
