"""What the command line shows: progress while it works (on stderr), tables at the end (on stdout)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from llmquant.eval.perplexity import Perplexity
    from llmquant.pipeline.evaluate import Evaluation

SECONDS_BETWEEN_LINES = 5.0
"""Without a terminal, no more than one progress line in this time, besides the last of each step."""


def quiet_libraries() -> None:
    """Keep the progress bars and advice of the libraries underneath off the screen: their errors are still raised."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


@contextmanager
def progress(*, quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """Gives a function (what, done, total) to call as work goes on: a bar per step on a terminal, lines elsewhere."""
    console = Console(stderr=True)
    if quiet:
        yield lambda what, done, total: None
    elif not console.is_terminal:
        yield _line_printer()
    else:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bars:
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


def print_evaluation(result: Evaluation) -> None:
    """The table of `llmquant eval`, and below it what was measured."""
    compared = result.divergence
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("model", overflow="fold")
    for heading in ("perplexity", "KL mean", "median", "99 %", "top-1") if compared else ("perplexity",):
        table.add_column(heading, justify="right", no_wrap=True)
    if compared and result.against:
        table.add_row(result.against, _plus_minus(compared.reference))
        kl = (f"{value:.4f}" for value in (compared.kl_mean, compared.kl_median, compared.kl_p99))
        table.add_row(result.model, _plus_minus(compared.model), *kl, f"{compared.top1_agreement:.1%}")
    else:
        table.add_row(result.model, _plus_minus(result.perplexity))
    console = Console()
    console.print(table)
    measured = result.perplexity
    console.print(
        f"{result.dataset}: {measured.num_windows} windows of {measured.seq_len} tokens, "
        f"{result.dtype} on {result.device}" + ("; KL in nats per token" if compared else ""),
        style="dim",
        highlight=False,
    )


def _plus_minus(measured: Perplexity) -> str:
    error = "" if measured.standard_error is None else f" ± {measured.standard_error:.2f}"
    return f"{measured.perplexity:.2f}{error}"
