"""What `llmquant quantize` ends with."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.text import Text

from llmquant.console.tables import grouped, kinds_of, new_table, print_facts, screen
from llmquant.pipeline.names import block_of, kind_of
from llmquant.spec import QuantSpec
from llmquant.words import clock, percentage, short, size, spent

if TYPE_CHECKING:
    from llmquant.pipeline.coverage import Unquantized
    from llmquant.pipeline.report import Incident, LinearReport, Report
    from llmquant.pipeline.verify import Verification


def print_report(report: Report) -> None:
    """What `llmquant quantize` ends with: errors beside RTN's, incidents, sizes, times, what to type next, verdict."""
    from llmquant.checkpoints.manifest import REPORT_HTML

    table = new_table("linear", "grid", ">n", ">error", ">worst", ">in", ">RTN")
    together = [linear for same in grouped(report.linears, lambda linear: linear.kind).values() for linear in same]
    for (kind, grid), linears in grouped(together, lambda linear: (linear.kind, linear.grid)).items():
        table.add_row(kind, grid, str(len(linears)), *_errors(linears))
    screen().print(table)
    of = "outputs on the calibration text" if report.calibration else "weights"
    facts = [("error", f"squared, of the {of}, relative: mean over the blocks, worst, and its block; RTN: mean")]
    facts += rounding_facts(report.linears)
    facts += _places("incidents", report.incidents) + _places("remarks", report.remarks)
    if report.coverage is not None:
        facts += coverage_facts(report.coverage, report.unquantized)
    inside = {entry.kind for entry in report.unquantized}
    outside = [(name, reason) for name, reason in report.kept.items() if kind_of(name) not in inside]
    for reason, kept in grouped(outside, lambda item: item[1]).items():
        facts.append(("in 16 bit", f"{reason}: {kinds_of(name for name, _ in kept)}"))
    steps = ", ".join(f"{step} {spent(seconds)}" for step, seconds in report.seconds.items())
    memory = size(report.peak_bytes) + (f", GPU {size(report.peak_device_bytes)}" if report.peak_device_bytes else "")
    facts += [
        ("size", f"{size(report.original_bytes)} -> {size(report.output_bytes)}"),
        ("bits", f"{report.bits_per_weight:.3f} per quantized weight ({report.format})"),
        ("time", f"{clock(sum(report.seconds.values()))}: {steps}"),
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
    # Lines to copy, so never wrapped.
    screen().print(f'\n  llmquant generate {out} --prompt "Once upon a time"', soft_wrap=True, markup=False)
    screen().print(f"  llmquant eval {out} --against {original}\n", soft_wrap=True, markup=False)
    screen().print(verdict_line(report.verification), soft_wrap=True)


COLOURS = {"good": "green", "slight loss": "yellow", "clear loss": "dark_orange", "broken": "red"}
"""Colour of each band; the words say the same."""


def verdict_line(verification: Verification) -> Text:
    """The verdict and its reasons in one line; the verdict in the colour of its band."""
    v = verification
    line = Text(v.verdict, style=f"bold {COLOURS[v.verdict]}" if v.verdict in COLOURS else "bold")
    line.append(f" (may be {v.may_be})" if v.may_be else "", style="")
    line.append(f", but the quantized model does not run here: {v.failure}" if v.failure else "")
    line.append(f": {v.reason}")
    line.append(f"; {v.repetition}" if v.repetition else "")
    return line


def verification_facts(verification: Verification) -> list[tuple[str, str]]:
    """The measurements that the verdict does not rest on, and what to try next."""
    from llmquant.pipeline.verdict import band_of, describe

    facts = []
    for index, text in enumerate(verification.texts):
        if index != verification.decided_by and text.factor is not None:
            facts.append(("beside it", f"{band_of(text.factor)}: {describe(text)}"))
    return facts + [("try next", f"{options}: {effect}") for options, effect in verification.next_steps]


def coverage_facts(share: float, unquantized: Iterable[Unquantized]) -> list[tuple[str, str]]:
    """The share of the decoder blocks' weights that is quantized, and what is not, with its share, by reason."""
    facts = [("coverage", f"{percentage(share)} of the decoder blocks' weights are quantized")]
    for reason, entries in grouped(unquantized, lambda entry: entry.reason).items():
        named = ", ".join(f"{entry.count} x {entry.kind} ({percentage(entry.share)})" for entry in entries[:4])
        more = f" and {len(entries) - 4} more" if len(entries) > 4 else ""
        facts.append(("in 16 bit", f"{reason}: {named}{more}"))
    return facts


def rounding_facts(linears: Sequence[LinearReport]) -> list[tuple[str, str]]:
    """How much of the corrections was taken, what feedback between rows leaves, and how many rows plain rounding won:
    lines where there are any."""
    facts = []
    if taken := _means(linears, lambda linear: linear.correction_share):
        facts.append(("corrections", f"share taken, mean: {taken}"))
    if left := _means(linears, lambda linear: linear.feedback_left):
        facts.append(("feedback", f"share of the cost that rows leave each other, mean: {left}"))
    if won := sum(linear.rtn_rows or 0 for linear in linears):
        rows = sum(linear.rows for linear in linears if linear.rtn_rows is not None)
        facts.append(("RTN rows", f"{won} of {rows} rows are plain rounding's, which measured better there"))
    return facts


def _means(linears: Sequence[LinearReport], share: Callable[[LinearReport], float | None]) -> str:
    """The mean share of every kind of linear that has any, and of how many where it is not all; "" for none."""
    told = []
    for parent, inside in grouped(linears, lambda linear: linear.kind.rpartition(".")[0]).items():
        means = []
        for kind, same in grouped(inside, lambda linear: linear.kind.rpartition(".")[2]).items():
            shares = [value for linear in same if (value := share(linear)) is not None]
            if shares:
                some = f" ({len(shares)} of {len(same)})" if len(shares) < len(same) else ""
                means.append(f"{kind} {sum(shares) / len(shares):.0%}{some}")
        if means:
            told.append(f"{parent} {', '.join(means)}".strip())
    return "; ".join(told)


def _errors(linears: Sequence[LinearReport]) -> list[str]:
    worst = max(linears, key=lambda linear: linear.error)
    return [
        short(sum(linear.error for linear in linears) / len(linears)),
        short(worst.error),
        str(block_of(worst.name)),
        short(sum(linear.rtn_error for linear in linears) / len(linears)),
    ]


def _places(label: str, happened: Iterable[Incident]) -> list[tuple[str, str]]:
    """What went otherwise than asked, or is worth knowing; what happened to many linears in one line."""
    facts = []
    for what, incidents in grouped(happened, lambda incident: incident.what).items():
        places = [incident.where for incident in incidents]
        where = places[0] if len(places) == 1 else f"{len(places)} x {kinds_of(places)}"
        facts.append((label, f"{where}: {what}"))
    return facts


def _allocation_facts(allocation: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines for the end of a run: what was chosen, and beside it what one grid for all would be."""
    chosen, target = allocation["chosen"], allocation["target_bits_per_weight"]
    kept = f"{chosen['bits_per_weight']:.3f} of {target:.3f} bits per weight"
    facts = [("budget", f"{kept}, estimated loss {chosen['loss']:.4g}")]
    for one in allocation["uniform"]:
        spec = QuantSpec(**{key: one[key] for key in ("bits", "group_size", "symmetric")})
        bits = f"{one['bits_per_weight']:.3f} bits"
        facts.append(("budget", f"{spec.describe()} everywhere: {bits}, estimated loss {one['loss']:.4g}"))
    return facts
