"""The output of `llmquant quantize --dry-run`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmquant.console.calibration import calibration_lines
from llmquant.console.report import coverage_facts
from llmquant.console.tables import kinds_of, new_table, print_facts, screen
from llmquant.grouping import grouped
from llmquant.humanize import dtype_name, format_bytes, format_clock

if TYPE_CHECKING:
    from llmquant.planning.linears import LinearPlan
    from llmquant.planning.plan import Plan


def print_plan(plan: Plan, out: Path) -> None:
    """Print the grids, sizes, predictions and calibration text of a plan."""
    from llmquant.estimates.disk import disk_bytes, free_bytes
    from llmquant.estimates.duration import estimate_duration
    from llmquant.pipeline.output import side_files
    from llmquant.planning.coverage import coverage_of
    from llmquant.planning.engines import ENGINES, RULES_DATE, package_notes

    def row(linear: LinearPlan) -> tuple[str, str, str]:
        assert linear.spec is not None
        return linear.kind, f"{linear.out_features} x {linear.in_features}", linear.spec.describe()

    table = new_table("linear", ">n", ">out x in", "grid", ">bits", ">size")
    for (kind, shape, grid), linears in grouped(plan.quantized, row).items():
        weights = sum(linear.out_features * linear.in_features for linear in linears)
        stored = sum(plan.packed_bytes(linear) for linear in linears)
        table.add_row(kind, str(len(linears)), shape, grid, f"{8 * stored / weights:.3f}", format_bytes(stored))
    screen().print(table)
    coverage = coverage_of(plan)
    facts = coverage_facts(coverage.share, coverage.unquantized)
    inside = {entry.kind for entry in coverage.unquantized}
    for title, linears in (
        ("in 16 bit", [linear for linear in plan.linears if linear.spec is None and linear.kind not in inside]),
        ("other grid", [linear for linear in plan.quantized if linear.reason]),
    ):
        for reason, same in grouped(linears, lambda linear: linear.reason).items():
            facts.append((title, f"{reason}: {len(same)} x {kinds_of(linear.name for linear in same)}"))
    if missed := coverage.fallback():
        facts.append(("fallback", f"block weights: {missed}"))
    beside = side_files(plan.reader, out)
    facts += [("fallback", f"{name}: {what}") for name, what in beside.fallbacks.items()]
    facts += [("notes", f"checkpoint: {note}") for note in plan.notes]
    if beside.note:
        facts.append(("notes", f"beside the weights: {beside.note}"))
    facts += [
        ("format", f"{plan.format.name}, {dtype_name(plan.dtype)}"),
        ("bits", f"{plan.bits_per_weight:.3f} per quantized weight"),
        ("size", f"{format_bytes(plan.reader.total_bytes)} -> {format_bytes(plan.output_bytes)}"),
        # The memory is estimated before the time, because the estimate counts the memory that this process already
        # holds, and the timings add to it.
        ("peak memory", _predicted_memory(plan)),
        (
            "time",
            f"about {format_clock(estimate_duration(plan).seconds)}, estimated from timings on this machine",
        ),
        ("disk", f"{format_bytes(disk_bytes(plan, out))} needed while it runs, {format_bytes(free_bytes(out))} free"),
    ]
    if plan.recipe.has_budget:
        facts.append(
            ("budget", "the grids above assume equally sensitive weights; the run measures sensitivities, then chooses")
        )
    if plan.calibration is not None:
        facts += [("calibration", line) for line in calibration_lines(plan.calibration)]
    for name in plan.options.engines:
        facts.append(("engine", f"{ENGINES[name].name} loads the result, by its rules of {RULES_DATE}"))
    facts += [("engine", needed) for needed in package_notes(plan)]
    facts.append(("dry run", "nothing is written; without --dry-run, the command quantizes the model"))
    print_facts(facts)


def _predicted_memory(plan: Plan) -> str:
    from llmquant.estimates.memory import estimate_memory

    memory = estimate_memory(plan)
    spilled = f", {format_bytes(memory.spilled_bytes)} of activations on disk" if memory.spilled_bytes else ""
    return f"about {format_bytes(memory.peak_bytes)}{spilled}"
