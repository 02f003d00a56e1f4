"""What `llmquant quantize --dry-run` says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmquant.console.calibration import calibration_lines
from llmquant.console.report import coverage_facts
from llmquant.console.tables import grouped, kinds_of, new_table, print_facts, screen
from llmquant.words import clock, size

if TYPE_CHECKING:
    from llmquant.pipeline.plan import LinearPlan, Plan


def print_plan(plan: Plan, out: Path) -> None:
    """What `llmquant quantize --dry-run` says."""
    from llmquant.pipeline.coverage import coverage_of
    from llmquant.pipeline.disk import disk_bytes, free_bytes
    from llmquant.pipeline.duration import estimate
    from llmquant.pipeline.parts import side_files
    from llmquant.pipeline.targets import RULES_DATE, TARGETS, needs_of

    def row(linear: LinearPlan) -> tuple[str, str, str]:
        assert linear.spec is not None
        return linear.kind, f"{linear.out_features} x {linear.in_features}", linear.spec.describe()

    table = new_table("linear", ">n", ">out x in", "grid", ">bits", ">size")
    for (kind, shape, grid), linears in grouped(plan.quantized, row).items():
        weights = sum(linear.out_features * linear.in_features for linear in linears)
        stored = sum(plan.packed_bytes(linear) for linear in linears)
        table.add_row(kind, str(len(linears)), shape, grid, f"{8 * stored / weights:.3f}", size(stored))
    screen().print(table)
    coverage = coverage_of(plan)
    facts = coverage_facts(coverage.share, coverage.unquantized)
    inside = {entry.kind for entry in coverage.unquantized}
    for title, linears in (
        ("in 16 bit", [linear for linear in plan.linears if linear.spec is None and linear.kind not in inside]),
        ("changed", [linear for linear in plan.quantized if linear.reason]),
    ):
        for reason, same in grouped(linears, lambda linear: linear.reason).items():
            facts.append((title, f"{reason}: {len(same)} x {kinds_of(linear.name for linear in same)}"))
    if missed := coverage.incident():
        facts.append(("incident", f"block weights: {missed}"))
    beside = side_files(plan.reader, out)
    facts += [("incident", f"{name}: {what}") for name, what in beside.incidents.items()]
    facts += [("remarks", f"checkpoint: {note}") for note in plan.notes]
    if beside.remark:
        facts.append(("remarks", f"beside the weights: {beside.remark}"))
    facts += [
        ("format", f"{plan.format.name}, {str(plan.dtype).removeprefix('torch.')}"),
        ("bits", f"{plan.bits_per_weight:.3f} per quantized weight"),
        ("size", f"{size(plan.reader.total_bytes)} -> {size(plan.output_bytes)}"),
        # The memory first: it counts what this process holds, and the timings take some.
        ("peak memory", _predicted_memory(plan)),
        ("time", f"about {clock(estimate(plan).seconds)}, estimated from timings of its shapes on this machine, now"),
        ("disk", f"{size(disk_bytes(plan, out))} needed while it runs, {size(free_bytes(out))} free"),
    ]
    if plan.recipe.has_budget:
        facts.append(
            ("budget", "grids above keep it as if all weights were equally sensitive; the run measures, then chooses")
        )
    if plan.calibration is not None:
        facts += [("calibration", line) for line in calibration_lines(plan.calibration)]
    for name in plan.options.targets:
        facts.append(("target", f"{TARGETS[name].name} loads it, by its rules of {RULES_DATE}"))
    facts += [("target", needed) for needed in needs_of(plan)]
    facts.append(("dry run", "nothing is written; the same command without --dry-run does it"))
    print_facts(facts)


def _predicted_memory(plan: Plan) -> str:
    from llmquant.pipeline.footprint import footprint_of

    footprint = footprint_of(plan)
    spilled = f", {size(footprint.spilled_bytes)} of activations on the disk" if footprint.spilled_bytes else ""
    return f"about {size(footprint.peak_bytes)}{spilled}"
