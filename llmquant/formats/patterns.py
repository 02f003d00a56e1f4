"""Regular expressions from an untrusted `quantization_config`, matched against module names.

A short pattern can take years to match, because regex engines backtrack. The `regex` package can interrupt a match, so
all patterns of one configuration share a time budget (`MatchTimer`). `regex` cannot interrupt compiling, and compiling
`(?:a{1000000}){1000000}` takes gigabytes. So patterns that repeat a group, or that are larger than any tool writes, are
refused before `regex` compiles them (`is_excessive`). Most patterns are short and have few repetitions, so they match
quickly in any engine. Python's `re` matches them, because a timeout makes a match ten times as slow.
"""

from __future__ import annotations

import re
import time
import warnings

import regex

from llmquant.errors import UserError

MAX_REPETITIONS = 6
"""Largest number of repetitions in one alternative of a pattern. Four optional items count as one repetition."""
MAX_LENGTH = 100_000
"""Largest length of a pattern, in characters."""
MAX_MATCH_SECONDS = 1.0
MAX_SECONDS_PER_NAME = 1e-3

MAX_SIMPLE_REPETITIONS, MAX_SIMPLE_LENGTH = 2, 200
"""Patterns up to these limits are matched without a timeout: they take at most some milliseconds for one name."""

_COMMENT = re.compile(r"\(\?(#|[aiLmsu]*x)")
"""The start of a comment, or the flag that allows comments. `is_excessive` would misread the text that follows."""
_LARGE_COUNT = re.compile(r"\{[\d,]*\d{4}")
"""A repetition of a thousand times or more."""


class MatchTimer:
    """The time that all patterns of one configuration have spent on matching."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.num_matches = 0

    @property
    def remaining_seconds(self) -> float:
        """The rest of `MAX_MATCH_SECONDS`, plus an allowance per match, because larger models have more names."""
        return MAX_MATCH_SECONDS + self.num_matches * MAX_SECONDS_PER_NAME - self.seconds


class Pattern:
    """A regular expression that is matched from the start of a module name.

    where: the place of the pattern in the configuration, for error messages. Raises UserError if the pattern is not a
    regular expression, or if it is excessive (`is_excessive`).
    """

    def __init__(self, pattern: str, where: str, timer: MatchTimer) -> None:
        self._where = f"{where}: {pattern!r:.60}"
        self._timer = timer
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # warnings about syntax that may change its meaning in a later Python
                python_pattern = re.compile(pattern)  # tools write in Python's own syntax; `regex` accepts more
                if is_excessive(pattern):
                    raise UserError(
                        f"{self._where} repeats a group, has more than {MAX_REPETITIONS} repetitions in one "
                        "alternative, or is very large: matching it could take forever; write a simpler expression"
                    )
                is_simple = len(pattern) <= MAX_SIMPLE_LENGTH and count_repetitions(pattern) <= MAX_SIMPLE_REPETITIONS
                self._simple = python_pattern if is_simple else None
                self._interruptible = None if is_simple else regex.compile(pattern)
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            raise UserError(f"{self._where} is not a regular expression ({error})") from None

    def matches(self, name: str) -> bool:
        """Whether the pattern matches the start of a module name. Raises UserError if the time budget is spent."""
        timer = self._timer
        start = time.thread_time() if self._simple is None else time.perf_counter()
        if timer.remaining_seconds <= 0:
            raise self._too_slow(timer.seconds)
        if self._interruptible is None:
            assert self._simple is not None
            is_match = self._simple.match(name) is not None
            timer.seconds += time.perf_counter() - start
        else:
            try:
                is_match = self._interruptible.match(name, timeout=timer.remaining_seconds) is not None
            except TimeoutError:
                raise self._too_slow(timer.seconds + time.thread_time() - start) from None
            timer.seconds += time.thread_time() - start
        timer.num_matches += 1
        return is_match

    def _too_slow(self, seconds: float) -> UserError:
        return UserError(f"{self._where}: matching module names took {seconds:.0f} seconds; write simpler expressions")


def is_excessive(pattern: str) -> bool:
    """Whether a pattern repeats a group, has too many repetitions in one alternative, or is very large.

    Patterns for the names of linears do none of these.
    """
    if len(pattern) > MAX_LENGTH or _COMMENT.search(pattern) or _LARGE_COUNT.search(pattern):
        return True
    return count_repetitions(pattern) > MAX_REPETITIONS


def count_repetitions(pattern: str) -> float:
    """Return the largest number of repetitions in one alternative of a pattern; infinity if it repeats a group."""
    # For each open group: the repetitions of its longest alternative so far, and of the current one.
    longest, current = [0.0], [0.0]
    in_set, previous = False, ""
    characters = iter(pattern)
    for character in characters:
        if character == "\\":
            next(characters, None)
        elif in_set:
            in_set = character != "]"
        elif character == "[":
            in_set = True
        elif character == "(":
            longest.append(0.0)
            current.append(0.0)
        elif character == "|":
            longest[-1], current[-1] = max(longest[-1], current[-1]), 0.0
        elif character == ")" and len(current) > 1:
            inside = max(longest.pop(), current.pop())
            current[-1] += inside
        elif character in "*+{":
            if previous == ")":
                return float("inf")
            current[-1] += 1
        elif character == "?" and previous not in "(*+?}":
            current[-1] += 0.25
        previous = character
    return max(*longest, *current)
