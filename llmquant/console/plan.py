"""The output of `llmquant quantize --dry-run`."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmquant.console.calibration import calibration_lines
from llmquant.console.report import coverage_facts
from llmquant.console.tables import kinds_of, new_table, print_facts, screen
from llmquant.grouping import grouped
from llmquant.humanize import dtype_name, format_bytes, format_clock

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llmquant.estimates.machine_duration import MachineDuration
    from llmquant.planning.linears import LinearPlan
    from llmquant.planning.plan import Plan


def print_plan(plan: Plan, out: Path) -> None:
    """Print the grids, sizes, predictions and calibration text of a plan."""
    from llmquant.estimates.disk import disk_bytes, free_bytes
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
    # The disk of another machine is not known.
    free = f", {format_bytes(free_bytes(out))} free" if plan.options.machine is None else ""
    facts += [
        ("format", f"{plan.format.name}, {dtype_name(plan.dtype)}"),
        ("bits", f"{plan.bits_per_weight:.3f} per quantized weight"),
        ("size", f"{format_bytes(plan.reader.total_bytes)} -> {format_bytes(plan.output_bytes)}"),
        # The memory is estimated before the time, because the estimate counts the memory that this process already
        # holds, and the timings add to it.
        ("peak memory", _predicted_memory(plan)),
        *_predicted_times(plan),
        ("disk", f"{format_bytes(disk_bytes(plan, out))} needed while it runs{free}"),
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
    from llmquant.estimates.machines import parse_machine
    from llmquant.estimates.memory import estimate_memory

    memory = estimate_memory(plan)
    spilled = f", {format_bytes(memory.spilled_bytes)} of activations on disk" if memory.spilled_bytes else ""
    predicted = f"about {format_bytes(memory.peak_bytes)}{spilled}"
    if plan.options.machine is None:
        return predicted
    machine = parse_machine(plan.options.machine)
    limit = f"the {format_bytes(machine.memory_bytes)} of {machine.name}"
    if memory.peak_bytes <= machine.memory_bytes:
        return f"{predicted} of GPU memory; fits in {limit}"
    limited = replace(plan, options=replace(plan.options, max_memory_bytes=machine.memory_bytes))
    least = math.ceil(estimate_memory(limited).least_bytes / 1e9)
    if least * 1e9 > machine.memory_bytes:
        return f"{predicted} of GPU memory; does not fit in {limit}, whatever --max-memory"
    # Some memory is left for the CUDA context.
    advised = max(least, int(0.9 * machine.memory_bytes / 1e9))
    return f"{predicted} of GPU memory; fits in {limit} only with a limit, such as --max-memory {advised}GB"


def _predicted_times(plan: Plan) -> list[tuple[str, str]]:
    """Return the predicted time as facts, and print the table of its steps if it is that of another machine."""
    from llmquant.estimates.duration import estimate_duration
    from llmquant.estimates.machine_duration import predict_duration
    from llmquant.estimates.machines import describe_rate, parse_machine

    if plan.options.machine is None:
        seconds = estimate_duration(plan).seconds
        return [("time", f"about {format_clock(seconds)}, estimated from timings on this machine")]
    duration = predict_duration(plan, parse_machine(plan.options.machine))
    _print_steps(duration)
    machine, facts = duration.machine, [("time", f"about {format_clock(duration.seconds)} on {duration.machine.title}")]
    if machine.cards > 1:
        divided = f"{duration.samples_per_card} samples or fewer, and some linears of each input group"
        facts.append(("ranks", f"each of {machine.cards} runs {divided}; rank 0 does all else"))
    facts.append(("machine", duration.basis))
    return facts + [
        ("machine", f"{name.replace('_', ' ')}: {describe_rate(name, rate)}") for name, rate in machine.rates.items()
    ]


def _print_steps(duration: MachineDuration) -> None:
    """Print the seconds of each step, per block and in the whole run, the longest steps first."""
    table = new_table(f"step on {duration.machine.title} (predicted)", ">s per block", ">s in all", ">share")

    def add_rows(steps: Mapping[str, float], per_block: bool) -> None:
        for name, seconds in sorted(steps.items(), key=lambda item: -item[1]):
            of_block = f"{seconds / duration.num_blocks:.3f}" if per_block else ""
            table.add_row(name, of_block, f"{seconds:.1f}", f"{seconds / duration.seconds:.0%}")

    add_rows(duration.block_steps, per_block=True)
    in_blocks = duration.seconds_per_block * duration.num_blocks
    table.add_row(
        f"all {duration.num_blocks} blocks",
        f"{duration.seconds_per_block:.3f}",
        f"{in_blocks:.1f}",
        f"{in_blocks / duration.seconds:.0%}",
        end_section=True,
    )
    add_rows(duration.other_steps, per_block=False)
    screen().print(table)
