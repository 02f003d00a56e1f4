"""The output of `llmquant bench`: a table and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmquant.console.tables import new_table, screen
from llmquant.errors import UserError
from llmquant.humanize import format_bytes
from llmquant.paths import check_output_file

if TYPE_CHECKING:
    from llmquant.runtime.bench import BenchmarkResult, BenchmarkRun

PLOT_SUFFIXES = (".svg", ".png", ".pdf")
PLOT_TITLE = "llmquant bench"
"""The title in the metadata of a plot. Only files with this title are overwritten."""

ACCENT, OTHER, ORIGINAL, INK, FAINT = "#0b7285", "#9cc3cb", "#d5dade", "#343a40", "#868e96"
"""Colours of the first model, the other models, the original, labels, and small print."""


def print_bench(result: BenchmarkResult) -> None:
    """Print one row per model and kernel, with its speed relative to the original if there is one.

    A line below the table names each model on a GPU that was decoded without a CUDA graph.
    """
    table = new_table("model", "kernel", ">weights", ">peak", ">load", ">prefill/s", ">decode/s")
    for run in result.runs:
        peak = "" if run.peak_bytes is None else format_bytes(run.peak_bytes)
        rates = [_rate(result, run, f"{step}_tokens_per_second") for step in ("prefill", "decode")]
        table.add_row(run.model, run.kernel, format_bytes(run.weight_bytes), peak, f"{run.load_seconds:.1f} s", *rates)
    screen().print(table)
    screen().print(_conditions(result), style="dim")
    for line in _eager_lines(result):
        screen().print(line, style="dim", markup=False, soft_wrap=True)


def _eager_lines(result: BenchmarkResult) -> list[str]:
    """Return one line for each model on a GPU that could not be decoded by a CUDA graph, with the reason."""
    return [
        f"{run.model} ({run.kernel}): decoded without a CUDA graph: {run.why_eager}"
        for run in result.runs
        if run.why_eager is not None
    ]


def _rate(result: BenchmarkResult, run: BenchmarkRun, name: str) -> str:
    rate, base = getattr(run, name), result.original
    return f"{rate:.1f}" if base is None or run is base else f"{rate:.1f} ({rate / getattr(base, name):.2f}x)"


def _conditions(result: BenchmarkResult) -> str:
    work = result.workload
    prompts = "a prompt" if work.batch_size == 1 else f"{work.batch_size} prompts"
    return (
        f"tokens per second; {prompts} of {work.prompt_tokens} tokens, {work.new_tokens} new, median of "
        f"{work.repeats}; {result.dtype} on {result.device}"
    )


def check_plot_path(path: Path) -> None:
    """Raise UserError if no plot can be written to a path."""
    if path.suffix not in PLOT_SUFFIXES:
        raise UserError(f"{path}: a plot is one of {', '.join(PLOT_SUFFIXES)}; use --plot bench.svg")
    check_output_file(path, "--plot", lambda content: PLOT_TITLE.encode() in content)


def plot_bench(result: BenchmarkResult, path: Path) -> None:
    """Plot decoding speed, prefill speed and memory as bars, with the original in grey."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    runs, base = result.runs, result.original
    panels = [
        ("decode, tokens/s", [run.decode_tokens_per_second for run in runs], True),
        ("prefill, tokens/s", [run.prefill_tokens_per_second for run in runs], True),
        ("weights in memory, MB", [run.weight_bytes / 1e6 for run in runs], False),
    ]
    labels = [f"{Path(run.model).name}\n{run.kernel}" for run in runs]
    colours = [ORIGINAL if run is base else ACCENT if run is runs[0] else OTHER for run in runs]
    figure = Figure(figsize=(10, 1 + 0.45 * len(runs)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, (title, values, is_rate) in zip(axes, panels, strict=True):
        bars = axis.barh(range(len(runs)), values, color=colours, height=0.6)
        numbers = [f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in values]
        if is_rate and base is not None:
            times = [f"  {value / values[-1]:.2f}x" for value in values[:-1]]
            numbers = [number + more for number, more in zip(numbers, [*times, ""], strict=True)]
        axis.bar_label(bars, labels=numbers, padding=4, color=INK, fontsize=9)
        axis.set_title(title, loc="left", fontsize=10, color=INK)
        axis.set_xlim(0, 1.4 * max(values))
        axis.set_xticks([])
        axis.tick_params(length=0, labelcolor=INK, labelsize=9)
        axis.spines[:].set_visible(False)
    axes[0].set_yticks(range(len(runs)), labels)
    axes[0].invert_yaxis()
    figure.supxlabel(_conditions(result), x=0.01, ha="left", fontsize=8, color=FAINT)
    # Without a date and random ids, the same numbers give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "llmquant"}):
        no_date = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(path, dpi=160, metadata={"Title": PLOT_TITLE, **no_date})
