"""What the command line shows: progress while it works (on stderr), tables at the end (on stdout)."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from llmquant.words import clock as _clock
from llmquant.words import short as _short
from llmquant.words import size as _size
from llmquant.words import spent as _seconds

if TYPE_CHECKING:
    from llmquant.kernels.dispatch import Choice
    from llmquant.pipeline.inspect import Contents
    from llmquant.pipeline.plan import LinearPlan, Plan
    from llmquant.pipeline.report import Incident, LinearReport, Report
    from llmquant.pipeline.verify import Verification
    from llmquant.runtime.generate import Generated

SECONDS_BETWEEN_LINES = 5.0
"""Without a terminal, no more than one progress line in this time, besides the last of each step."""


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


@contextmanager
def block_progress(*, quiet: bool = False) -> Iterator[Callable[[int, int, str, float | None], None]]:
    """Gives the `OnStep` of a quantization: one bar over the blocks on a terminal, a line now and then elsewhere."""
    console, clock = Console(stderr=True), _BlockClock()
    if quiet:
        yield lambda done, total, what, error: None
    elif not console.is_terminal:
        printed = [0.0, -1]

        def on_line(done: int, total: int, what: str, error: float | None) -> None:
            clock.note(done, total, what, error)
            now = monotonic()
            # A block's line comes when it is finished; what goes before and after the blocks has its own.
            is_phase = done in (0, total) and what in PHASES
            if is_phase or (done > printed[1] >= 0 and (done == total or now - printed[0] >= SECONDS_BETWEEN_LINES)):
                printed[0] = now
                line = what if is_phase else f"block {done}/{total}{clock.error}  {clock.times}"
                print(line, file=sys.stderr, flush=True)
            printed[1] = done

        yield on_line
    else:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[times]}"),
            TextColumn("{task.fields[now]}", style="dim"),
        )
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


PHASES = ("calibration text", "hashing the checkpoint", "sensitivity", "finishing", "verifying", "samples")
"""What a quantization does before and after the blocks."""


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
        left = "" if not self._left else f", {_clock(self._left)} left"
        return f"{_clock(monotonic() - self._start)}{left}"

    @property
    def error(self) -> str:
        """Relative error of the linears solved last."""
        return "" if self._last is None else f"  error {_short(self._last)}"


def print_report(report: Report) -> None:
    """What `llmquant quantize` ends with: errors beside RTN's, incidents, sizes, times, what to type next, verdict."""
    from llmquant.checkpoints.manifest import REPORT_HTML
    from llmquant.console_rounding import rounding_facts

    console = Console(highlight=False)
    table = _table()
    table.add_column("linear", overflow="fold")
    table.add_column("grid", no_wrap=True)
    for heading in ("n", "error", "worst", "in", "RTN"):
        table.add_column(heading, justify="right", no_wrap=True)
    together = [linear for same in _grouped(report.linears, lambda linear: linear.kind).values() for linear in same]
    for (kind, grid), linears in _grouped(together, lambda linear: (linear.kind, linear.grid)).items():
        table.add_row(kind, grid, str(len(linears)), *_errors(linears))
    console.print(table)
    of = "outputs on the calibration text" if report.calibration else "weights"
    facts = [("error", f"squared, of the {of}, relative: mean over the blocks, worst, and its block; RTN: mean")]
    facts += rounding_facts(report.linears)
    facts += _places("incidents", report.incidents) + _places("remarks", report.remarks)
    for reason, kept in _grouped(report.kept.items(), lambda item: item[1]).items():
        facts.append(("in 16 bit", f"{_names(name for name, _ in kept)}: {reason}"))
    seconds = sum(report.seconds.values())
    steps = ", ".join(f"{step} {_seconds(spent)}" for step, spent in report.seconds.items())
    memory = _size(report.peak_bytes) + (f", GPU {_size(report.peak_device_bytes)}" if report.peak_device_bytes else "")
    facts += [
        ("size", f"{_size(report.original_bytes)} -> {_size(report.output_bytes)}"),
        ("bits", f"{report.bits_per_weight:.3f} per quantized weight ({report.format})"),
        ("time", f"{_clock(seconds)}: {steps}"),
        ("peak memory", memory),
    ]
    if report.allocation:
        from llmquant.console_budget import allocation_facts

        facts += allocation_facts(report.allocation)
    if report.calibration:
        used = report.calibration
        facts.append(("calibration", f"{used['source']}, {used['num_samples']} x {used['seq_len']} tokens"))
    facts.append(("report", str(report.out / REPORT_HTML)))
    out, original = shlex.quote(str(report.out)), shlex.quote(report.model)
    _print_facts(console, facts)
    # Lines to copy, so never wrapped.
    console.print(f'\n  llmquant generate {out} --prompt "Once upon a time"', soft_wrap=True)
    console.print(f"  llmquant eval {out} --against {original}\n", soft_wrap=True)
    console.print(verdict_line(report.verification), soft_wrap=True)


def verdict_line(verification: Verification) -> str:
    """The verdict and its reasons in one line."""
    v = verification
    if v.kl_mean is None:
        return f"{v.verdict}: {v.reason}"
    return (
        f"{v.verdict}: perplexity {v.perplexity:.2f}, original {v.original_perplexity:.2f}; KL {v.kl_mean:.4f}; "
        f"same first choice {v.top1_agreement:.1%}; on {v.num_tokens} held-out tokens of {v.source}"
    )


def _errors(linears: Sequence[LinearReport]) -> list[str]:
    from llmquant.pipeline.names import block_of

    worst = max(linears, key=lambda linear: linear.error)
    return [
        _short(sum(linear.error for linear in linears) / len(linears)),
        _short(worst.error),
        str(block_of(worst.name)),
        _short(sum(linear.rtn_error for linear in linears) / len(linears)),
    ]


def _places(label: str, happened: Iterable[Incident]) -> list[tuple[str, str]]:
    """What went otherwise than asked, or is worth knowing; what happened to many linears in one line."""
    facts = []
    for what, incidents in _grouped(happened, lambda incident: incident.what).items():
        places = [incident.where for incident in incidents]
        where = places[0] if len(places) == 1 else f"{len(places)} x {_names(places)}"
        facts.append((label, f"{where}: {what}"))
    return facts


def _predicted_memory(plan: Plan) -> str:
    from llmquant.pipeline.footprint import footprint_of

    footprint = footprint_of(plan)
    spilled = f", {_size(footprint.spilled_bytes)} of activations on the disk" if footprint.spilled_bytes else ""
    return f"about {_size(footprint.peak_bytes)}{spilled}"


def print_plan(plan: Plan, out: Path) -> None:
    """What `llmquant quantize --dry-run` says."""
    from llmquant.pipeline.calibration import AUTO, AUTO_PRESET
    from llmquant.pipeline.plan import disk_bytes, free_bytes
    from llmquant.pipeline.targets import RULES_DATE, TARGETS, needs_of
    from llmquant.textdata import PYTHON_DOCS

    def row(linear: LinearPlan) -> tuple[str, str, str]:
        assert linear.spec is not None
        return linear.kind, f"{linear.out_features} x {linear.in_features}", linear.spec.describe()

    console = Console(highlight=False)
    table = _table()
    table.add_column("linear", overflow="fold")
    for heading in ("n", "out x in"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("grid", no_wrap=True)
    for heading in ("bits", "size"):
        table.add_column(heading, justify="right", no_wrap=True)
    for (kind, shape, grid), linears in _grouped(plan.quantized, row).items():
        weights = sum(linear.out_features * linear.in_features for linear in linears)
        stored = sum(plan.packed_bytes(linear) for linear in linears)
        table.add_row(kind, str(len(linears)), shape, grid, f"{8 * stored / weights:.3f}", _size(stored))
    console.print(table)
    facts = []
    for title, linears in (
        ("in 16 bit", [linear for linear in plan.linears if linear.spec is None]),
        ("changed", [linear for linear in plan.quantized if linear.reason]),
    ):
        for reason, same in _grouped(linears, lambda linear: linear.reason).items():
            facts.append((title, f"{reason}: {len(same)} x {_names(linear.name for linear in same)}"))
    facts += [
        ("format", f"{plan.format.name}, {str(plan.dtype).removeprefix('torch.')}"),
        ("bits", f"{plan.bits_per_weight:.3f} per quantized weight"),
        ("size", f"{_size(plan.reader.total_bytes)} -> {_size(plan.output_bytes)}"),
        ("peak memory", _predicted_memory(plan)),
        ("disk", f"{_size(disk_bytes(plan, out))} needed while it runs, {_size(free_bytes(out))} free"),
    ]
    if plan.recipe.has_budget:
        facts.append(
            ("budget", "grids above keep it as if all weights were equally sensitive; the run measures, then chooses")
        )
    if plan.recipe.needs_data:
        options = plan.options
        source = options.calibration
        if source == AUTO:
            source = f"{AUTO_PRESET} from the hub, or {PYTHON_DOCS} offline"
        facts.append(("calibration", f"{source}, {options.num_samples} x {options.seq_len} tokens"))
    for name in plan.options.targets:
        facts.append(("target", f"{TARGETS[name].name} loads it, by its rules of {RULES_DATE}"))
    facts += [("target", needed) for needed in needs_of(plan)]
    facts.append(("dry run", "nothing is written; the same command without --dry-run does it"))
    _print_facts(console, facts)


def print_contents(contents: Contents) -> None:
    """The tables of `llmquant inspect`."""
    console = Console(highlight=False)
    table = _table()
    table.add_column("part", overflow="fold")
    for heading in ("n", "shape"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("stored as", no_wrap=True)
    for heading in ("size", "bits"):
        table.add_column(heading, justify="right", no_wrap=True)
    for rows in (contents.quantized, contents.kept):
        for row in rows:
            bits = row.bits_per_weight
            cells = (row.kind, str(row.count), " x ".join(map(str, row.shape)), row.storage)
            table.add_row(*cells, _size(row.stored_bytes), f"{bits:.3f}".rstrip("0").rstrip("."))
        table.add_section()
    console.print(table)
    shards = f"{contents.num_shards} file" + ("s" if contents.num_shards > 1 else "")
    facts = [("model", contents.architecture), ("format", contents.format or "not quantized")]
    facts += [("total", f"{_size(contents.total_bytes)} in {shards}")]
    if contents.bits_per_weight is not None:
        share = contents.total_bytes / contents.dense_bytes
        facts[-1] = ("total", f"{facts[-1][1]}, {share:.0%} of {_size(contents.dense_bytes)} with 16-bit linears")
        facts.append(("bits", f"{contents.bits_per_weight:.3f} per quantized weight"))
    _print_facts(console, facts)


def print_backends(choices: Mapping[str, Choice]) -> None:
    """Which kernel runs which kind of linear, and what the other kernels said."""
    from llmquant.pipeline.names import kind_of

    console = Console(highlight=False)
    kinds = _grouped(choices.items(), lambda item: (kind_of(item[0]), item[1].backend.name, item[1].reason))
    table = _table()
    for heading in ("linear", "kernel", "because"):
        table.add_column(heading, overflow="fold")
    for kind, backend, reason in kinds:
        table.add_row(kind, backend, reason)
    console.print(table)
    refusals = [(name, f"{backend}: {why}") for name, c in choices.items() for backend, why in c.refusals.items()]
    grouped = _grouped(refusals, lambda item: item[1])
    facts = []
    for why, same in grouped.items():
        whose = "" if len(same) == len(choices) else f" ({_names(name for name, _ in same)})"
        facts.append(("refused", f"{why}{whose}"))
    _print_facts(console, facts)


def print_piece(text: str) -> None:
    """A piece of streamed text."""
    print(text, end="", flush=True)


def print_texts(prompts: Sequence[str], texts: Sequence[str]) -> None:
    """Prompts, each with its text below."""
    console = Console(highlight=False)
    for prompt, text in zip(prompts, texts, strict=True):
        console.print(Text(f"> {prompt}", style="dim"), soft_wrap=True)
        console.print(Text(text.strip() + "\n"), soft_wrap=True)


def print_speed(results: Sequence[Generated]) -> None:
    """Tokens per second, on stderr."""
    prompt, new = sum(r.num_prompt_tokens for r in results), sum(r.num_new_tokens for r in results)
    prefill, decode = sum(r.prefill_seconds for r in results), sum(r.decode_seconds for r in results)
    later = new - sum(len(r.texts) for r in results)
    line = f"prefill {prompt} tokens, {prompt / max(prefill, 1e-9):.1f}/s"
    if later > 0:
        line += f"; decode {new} tokens, {later / max(decode, 1e-9):.1f}/s"
    Console(stderr=True, highlight=False).print(line, style="dim")


# --- words -----------------------------------------------------------------------------------------------------------


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def _print_facts(console: Console, facts: Iterable[tuple[str, str]]) -> None:
    grid = Table.grid(padding=(0, 2, 0, 1), pad_edge=True)
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    said = None
    for name, fact in facts:
        grid.add_row("" if name == said else name, Text(fact))
        said = name
    console.print(grid)


def _grouped(items: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _names(names: Iterable[str]) -> str:
    """Names by their kind, the first few of them."""
    from llmquant.pipeline.names import kind_of

    kinds = list(dict.fromkeys(kind_of(name) or name for name in names))
    return ", ".join(kinds[:4]) + (f" and {len(kinds) - 4} more" if len(kinds) > 4 else "")
