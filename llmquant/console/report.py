"""The output of `llmquant quantize` at its end."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.text import Text

from llmquant.console.tables import kinds_of, new_table, print_facts, screen
from llmquant.grouping import grouped, grouped_within
from llmquant.humanize import format_bytes, format_clock, format_error, format_percentage, format_seconds
from llmquant.module_names import block_of, kind_of
from llmquant.spec import QuantSpec

if TYPE_CHECKING:
    from llmquant.planning.coverage import UnquantizedParameters
    from llmquant.report.schema import LinearReport, Message, Report
    from llmquant.report.verdict import Verification


def print_report(report: Report) -> None:
    """Print errors beside those of RTN, fallbacks, sizes, times, the next commands and the verdict."""
    from llmquant.checkpoints.manifest import REPORT_HTML

    table = new_table("linear", "grid", ">n", ">error", ">worst", ">block", ">RTN")
    by_grid = grouped_within(report.linears, lambda linear: linear.kind, lambda linear: linear.grid)
    for (kind, grid), linears in by_grid.items():
        table.add_row(kind, grid, str(len(linears)), *_errors(linears))
    screen().print(table)
    measured_on = "outputs on the calibration text" if report.calibration else "weights"
    facts = [("error", f"relative squared error of the {measured_on}: mean, worst block, and mean of RTN")]
    facts += rounding_facts(report.linears)
    facts += _message_facts("fallbacks", report.fallbacks) + _message_facts("notes", report.notes)
    if report.coverage is not None:
        facts += coverage_facts(report.coverage, report.unquantized_parameters)
    inside = {entry.kind for entry in report.unquantized_parameters}
    outside = [(name, reason) for name, reason in report.unquantized_linears.items() if kind_of(name) not in inside]
    for reason, unquantized in grouped(outside, lambda item: item[1]).items():
        facts.append(("in 16 bit", f"{reason}: {kinds_of(name for name, _ in unquantized)}"))
    steps = ", ".join(f"{step} {format_seconds(seconds)}" for step, seconds in report.seconds.items())
    memory = format_bytes(report.peak_bytes) + (
        f", GPU {format_bytes(report.peak_device_bytes)}" if report.peak_device_bytes else ""
    )
    facts += [
        ("size", f"{format_bytes(report.original_bytes)} -> {format_bytes(report.output_bytes)}"),
        ("bits", f"{report.bits_per_weight:.3f} per quantized weight ({report.format})"),
        ("time", f"{format_clock(sum(report.seconds.values()))}: {steps}"),
        ("peak memory", memory),
    ]
    if report.allocation:
        facts += _allocation_facts(report.allocation)
    if report.calibration:
        used = report.calibration
        facts.append(("calibration", f"{used['source']}, {used['num_samples']} x {used['seq_len']} tokens"))
    facts += verification_facts(report.verification)
    facts.append(("report", str(report.out / REPORT_HTML)))
    out, original = shlex.quote(str(report.out)), shlex.quote(report.model)
    print_facts(facts)
    # Users copy these lines, so they are never wrapped.
    screen().print(f'\n  llmquant generate {out} --prompt "Once upon a time"', soft_wrap=True, markup=False)
    screen().print(f"  llmquant eval {out} --against {original}\n", soft_wrap=True, markup=False)
    screen().print(verdict_line(report.verification), soft_wrap=True)


COLOURS = {"good": "green", "slight loss": "yellow", "clear loss": "dark_orange", "broken": "red"}
"""The colour of each verdict."""


def verdict_line(verification: Verification) -> Text:
    """Return one line with the verdict in its colour and its reasons."""
    v = verification
    line = Text(v.verdict, style=f"bold {COLOURS[v.verdict]}" if v.verdict in COLOURS else "bold")
    line.append(f" (may be {v.may_be})" if v.may_be else "", style="")
    line.append(f", but the quantized model does not run here: {v.failure}" if v.failure else "")
    line.append(f": {v.reason}")
    line.append(f"; {v.repetition}" if v.repetition else "")
    return line


def verification_facts(verification: Verification) -> list[tuple[str, str]]:
    """Return the measurements on texts that did not decide the verdict, and the suggested next steps."""
    from llmquant.report.verdict import band_of, describe

    facts = []
    for index, text in enumerate(verification.texts):
        if index != verification.decided_by and text.factor is not None:
            facts.append(("other text", f"{band_of(text.factor)}: {describe(text)}"))
    return facts + [("try next", f"{options}: {effect}") for options, effect in verification.next_steps]


def coverage_facts(share: float, unquantized: Iterable[UnquantizedParameters]) -> list[tuple[str, str]]:
    """Return the quantized fraction of the decoder blocks' weights, and the unquantized parameters by reason."""
    facts = [("coverage", f"{format_percentage(share)} of the decoder blocks' weights are quantized")]
    for reason, entries in grouped(unquantized, lambda entry: entry.reason).items():
        named = ", ".join(f"{entry.count} x {entry.kind} ({format_percentage(entry.share)})" for entry in entries[:4])
        more = f" and {len(entries) - 4} more" if len(entries) > 4 else ""
        facts.append(("in 16 bit", f"{reason}: {named}{more}"))
    return facts


def rounding_facts(linears: Sequence[LinearReport]) -> list[tuple[str, str]]:
    """Return the shrinkage of corrections, the cost ratio of cross-row compensation, and the number of RTN rows."""
    facts = []
    if shrinkage := _means(linears, lambda linear: linear.correction_shrinkage):
        facts.append(("corrections", f"mean shrinkage factor: {shrinkage}"))
    if ratio := _means(linears, lambda linear: linear.cross_row_cost_ratio):
        facts.append(("cross-row", f"mean cost with cross-row compensation, relative to without: {ratio}"))
    if num_rtn_rows := sum(linear.rtn_rows or 0 for linear in linears):
        rows = sum(linear.rows for linear in linears if linear.rtn_rows is not None)
        facts.append(
            ("RTN rows", f"{num_rtn_rows} of {rows} rows are rounded to nearest, because this gives a smaller error")
        )
    return facts


def _means(linears: Sequence[LinearReport], value_of: Callable[[LinearReport], float | None]) -> str:
    """Return the mean value for each kind of linear, as text.

    Linears whose value is None are left out. The number of the others is then given.
    """
    by_parent = []
    for parent, inside in grouped(linears, lambda linear: linear.kind.rpartition(".")[0]).items():
        means = []
        for kind, same in grouped(inside, lambda linear: linear.kind.rpartition(".")[2]).items():
            values = [value for linear in same if (value := value_of(linear)) is not None]
            if values:
                some = f" ({len(values)} of {len(same)})" if len(values) < len(same) else ""
                means.append(f"{kind} {sum(values) / len(values):.0%}{some}")
        if means:
            by_parent.append(f"{parent} {', '.join(means)}".strip())
    return "; ".join(by_parent)


def _errors(linears: Sequence[LinearReport]) -> list[str]:
    worst = max(linears, key=lambda linear: linear.error)
    return [
        format_error(sum(linear.error for linear in linears) / len(linears)),
        format_error(worst.error),
        str(block_of(worst.name)),
        format_error(sum(linear.rtn_error for linear in linears) / len(linears)),
    ]


def _message_facts(label: str, messages: Iterable[Message]) -> list[tuple[str, str]]:
    """Return one line for each message text, with its module, or with the number and kinds of its modules."""
    facts = []
    for what, same in grouped(messages, lambda message: message.what).items():
        modules = [message.where for message in same]
        where = modules[0] if len(modules) == 1 else f"{len(modules)} x {kinds_of(modules)}"
        facts.append((label, f"{where}: {what}"))
    return facts


def _allocation_facts(allocation: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the bits and loss of the chosen grids, and those of one grid for all linears."""
    chosen, target = allocation["chosen"], allocation["target_bits_per_weight"]
    bits = f"{chosen['bits_per_weight']:.3f} of {target:.3f} bits per weight"
    facts = [("budget", f"{bits}, estimated loss {chosen['loss']:.4g}")]
    for one in allocation["uniform"]:
        spec = QuantSpec(**{key: one[key] for key in ("bits", "group_size", "symmetric")})
        bits = f"{one['bits_per_weight']:.3f} bits"
        facts.append(("budget", f"{spec.describe()} everywhere: {bits}, estimated loss {one['loss']:.4g}"))
    return facts
