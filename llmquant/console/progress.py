"""Progress of a command on stderr: bars on a terminal, occasional lines elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from rich import progress as rich_progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from llmquant import humanize
from llmquant.progress import OnProgress, Phase, Progress, ignore_progress

SECONDS_BETWEEN_LINES = 5.0
"""Smallest time between two progress lines without a terminal. The last line of a phase is always printed."""


def quiet_libraries() -> None:
    """Silence the progress bars and warnings of transformers and datasets. Their errors are still raised.

    `datasets` reads its environment variable on import. It is not imported here, because the import takes 130 MiB, and
    a run on a local text does not need it.
    """
    import transformers

    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@contextmanager
def show_progress(*, quiet: bool = False) -> Iterator[OnProgress]:
    """Yield the `OnProgress` of a command: one bar per phase on a terminal, lines elsewhere."""
    console = Console(stderr=True)
    if quiet:
        yield ignore_progress
    elif not console.is_terminal:
        yield _line_printer()
    else:
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with rich_progress.Progress("{task.description}", *columns, console=console) as bars:
            tasks: dict[Phase, rich_progress.TaskID] = {}

            def on_progress(progress: Progress) -> None:
                if progress.phase not in tasks:
                    tasks[progress.phase] = bars.add_task(progress.phase.value, total=progress.total)
                bars.update(tasks[progress.phase], completed=progress.done, total=progress.total)

            yield on_progress


def _line_printer() -> OnProgress:
    start = last = monotonic()

    def on_progress(progress: Progress) -> None:
        nonlocal last
        now = monotonic()
        if progress.done == progress.total or now - last >= SECONDS_BETWEEN_LINES:
            last = now
            line = f"{progress.phase.value} {progress.done}/{progress.total} ({now - start:.0f} s)"
            print(line, file=sys.stderr, flush=True)

    return on_progress


@contextmanager
def show_block_progress(*, quiet: bool = False) -> Iterator[OnProgress]:
    """Yield the `OnProgress` of a quantization: one bar over the blocks on a terminal, occasional lines elsewhere."""
    console = Console(stderr=True)
    if quiet:
        yield ignore_progress
    elif not console.is_terminal:
        yield _BlockLines()
    else:
        columns = ("{task.description}", BarColumn(bar_width=24), "{task.fields[times]}")
        detail_column = TextColumn("{task.fields[detail]}", style="dim")
        with rich_progress.Progress(*columns, detail_column, console=console, transient=True) as bar:
            task = bar.add_task("starting", total=None, times="", detail="")
            clock = _BlockClock()

            def on_progress(progress: Progress) -> None:
                clock.update(progress)
                title, detail = progress.phase.value, ""
                if progress.phase in (Phase.BLOCKS, Phase.READING_BACK):
                    title = f"block {min(progress.done + 1, progress.total)}/{progress.total}"
                    step = clock.detail if progress.phase is Phase.BLOCKS else progress.phase.value
                    detail = f"{clock.error}  {step}"
                bar.update(
                    task,
                    description=title,
                    completed=progress.done,
                    total=progress.total,
                    times=clock.times,
                    detail=detail,
                )

            yield on_progress


class _BlockLines:
    """Prints one line for each phase before and after the blocks, and for finished blocks at most one line per
    SECONDS_BETWEEN_LINES."""

    def __init__(self) -> None:
        self._clock = _BlockClock()
        self._phase: Phase | None = None
        self._finished: int | None = None
        """Blocks that were finished at the last call; None before the first block."""
        self._last_line = 0.0

    def __call__(self, progress: Progress) -> None:
        self._clock.update(progress)
        line = ""
        if progress.phase not in (Phase.BLOCKS, Phase.READING_BACK):
            line = progress.phase.value if progress.phase != self._phase else ""
            self._finished = 0
        else:
            if self._finished is not None and progress.done > self._finished:
                is_last = progress.done == progress.total
                if is_last or monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
                    line = f"block {progress.done}/{progress.total}{self._clock.error}  {self._clock.times}"
            self._finished = progress.done
        if line:
            self._last_line = monotonic()
            print(line, file=sys.stderr, flush=True)
        self._phase = progress.phase


class _BlockClock:
    """The elapsed and remaining time of a quantization. The latter is estimated without blocks that are read back."""

    def __init__(self) -> None:
        self._start = monotonic()
        self._first_block: tuple[float, int] | None = None
        """Time at which the first block that is not read back began, and the number of blocks finished before it."""
        self._remaining: float | None = None
        self._error: float | None = None
        self.detail = ""
        """The last named step within a block."""

    def update(self, progress: Progress) -> None:
        now = monotonic()
        self.detail = progress.detail or self.detail
        self._error = self._error if progress.error is None else progress.error
        if progress.phase != Phase.BLOCKS:
            self._remaining = None
            return
        if self._first_block is None:
            self._first_block = now, progress.done
        since, first = self._first_block
        if progress.done > first:
            self._remaining = (now - since) / (progress.done - first) * (progress.total - progress.done)

    @property
    def times(self) -> str:
        """Elapsed time, and the estimated remaining time."""
        remaining = "" if not self._remaining else f", {humanize.format_clock(self._remaining)} left"
        return f"{humanize.format_clock(monotonic() - self._start)}{remaining}"

    @property
    def error(self) -> str:
        """Relative output error of the linears quantized last."""
        return "" if self._error is None else f"  error {humanize.format_error(self._error)}"
