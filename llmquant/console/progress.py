"""Progress while a command works, on stderr: bars on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from llmquant import words

SECONDS_BETWEEN_LINES = 5.0
"""Without a terminal, no more than one progress line in this time, besides the last of each step."""

PHASES = ("calibration text", "hashing the checkpoint", "sensitivity", "gradients", "finishing", "verifying", "samples")
"""What a quantization does before and after the blocks."""


def quiet_libraries() -> None:
    """Keep the progress bars and advice of the libraries underneath off the screen: their errors are still raised.

    `datasets` looks at its variable when it is imported, which a run on a local text never does: it takes 130 MiB.
    """
    import transformers

    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@contextmanager
def progress(*, quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """Gives a function (what, done, total) to call as work goes on: a bar per step on a terminal, lines elsewhere."""
    console = Console(stderr=True)
    if quiet:
        yield lambda what, done, total: None
    elif not console.is_terminal:
        yield _line_printer()
    else:
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress("{task.description}", *columns, console=console) as bars:
            tasks = {}

            def on_step(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = bars.add_task(what, total=total)
                bars.update(tasks[what], completed=done, total=total)

            yield on_step


def _line_printer() -> Callable[[str, int, int], None]:
    start = last = monotonic()

    def on_step(what: str, done: int, total: int) -> None:
        nonlocal last
        now = monotonic()
        if done == total or now - last >= SECONDS_BETWEEN_LINES:
            last = now
            print(f"{what} {done}/{total} ({now - start:.0f} s)", file=sys.stderr, flush=True)

    return on_step


@contextmanager
def block_progress(*, quiet: bool = False) -> Iterator[Callable[[int, int, str, float | None], None]]:
    """Gives the `OnStep` of a quantization: one bar over the blocks on a terminal, a line now and then elsewhere."""
    console, clock = Console(stderr=True), _BlockClock()
    if quiet:
        yield lambda done, total, what, error: None
    elif not console.is_terminal:
        printed: list[Any] = [0.0, -1, ""]

        def on_line(done: int, total: int, what: str, error: float | None) -> None:
            clock.note(done, total, what, error)
            now = monotonic()
            # A block's line comes when it is finished; what goes before and after the blocks has its own.
            since, before, phase = printed
            if what in PHASES:
                line = what if what != phase else ""
            else:
                is_due = done > before >= 0 and (done == total or now - since >= SECONDS_BETWEEN_LINES)
                line = f"block {done}/{total}{clock.error}  {clock.times}" if is_due else ""
            if line:
                print(line, file=sys.stderr, flush=True)
            printed[:] = [now if line else since, 0 if what in PHASES else done, what]

        yield on_line
    else:
        now_column = TextColumn("{task.fields[now]}", style="dim")
        columns = ("{task.description}", BarColumn(bar_width=24), "{task.fields[times]}", now_column)
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("starting", total=None, times="", now="")

            def on_step(done: int, total: int, what: str, error: float | None) -> None:
                clock.note(done, total, what, error)
                title = f"block {min(done + 1, total)}/{total}"
                if what in PHASES:
                    bar.update(task, description=what, completed=done, total=total, times=clock.times, now="")
                else:
                    now = f"{clock.error}  {what or clock.what}"
                    bar.update(task, description=title, completed=done, total=total, times=clock.times, now=now)

            yield on_step


class _BlockClock:
    """How long a quantization has taken and will take; blocks that are read back do not count."""

    def __init__(self) -> None:
        self._start = monotonic()
        self._solving_since: tuple[float, int] | None = None
        self._left: float | None = None
        self._last: float | None = None
        self.what = ""
        """The last step that had a name."""

    def note(self, done: int, total: int, what: str, error: float | None) -> None:
        now = monotonic()
        self.what = what or self.what
        self._last = self._last if error is None else error
        if what in PHASES or what == "reading back":
            self._left = None
            return
        if self._solving_since is None:
            self._solving_since = now, done
        since, first = self._solving_since
        if done > first:
            self._left = (now - since) / (done - first) * (total - done)

    @property
    def times(self) -> str:
        """Elapsed, and about how much is left."""
        left = "" if not self._left else f", {words.clock(self._left)} left"
        return f"{words.clock(monotonic() - self._start)}{left}"

    @property
    def error(self) -> str:
        """Relative error of the linears solved last."""
        return "" if self._last is None else f"  error {words.short(self._last)}"
