"""The loop over the decoder blocks: walk in, gather statistics, solve, put the result back, walk on, pack, write.

At any time the memory holds one block, its statistics, and the activations of the calibration text. Blocks that an
earlier run has finished are read back and walked through, which restores the activations bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial as partial_call
from itertools import chain, groupby, islice
from typing import Any

import torch
from torch import Tensor

from llmquant.algorithms.feedback import Feedback
from llmquant.algorithms.statistics import InputStatistics
from llmquant.checkpoints.copies import tensor_digest
from llmquant.checkpoints.writer import PartialCheckpoint
from llmquant.errors import UserError
from llmquant.memory import give_back
from llmquant.models.blocks import weight_of
from llmquant.models.spill import Spill
from llmquant.models.walk import SEQUENCES_AT_ONCE, Arrival, Walk
from llmquant.pipeline.calibration import CalibrationTokens
from llmquant.pipeline.feedback import block_feedback, feedback_part, too_few_samples, unpacked
from llmquant.pipeline.footprint import footprint_of
from llmquant.pipeline.parts import (
    pack_part,
    part_names,
    put_back,
    replacements,
    round_alone,
    stored_numbers,
    unpack_part,
)
from llmquant.pipeline.plan import LinearPlan, Plan, all_finite, damaged_weights, read_finite
from llmquant.pipeline.ranks import Ranks, half_of, lane_of
from llmquant.pipeline.report import ReportBuilder, input_peaks
from llmquant.pipeline.smoothing import SEARCH_SEQUENCES, Folded, Smoother, put_folded
from llmquant.pipeline.solve import Solved, solve_stage, solve_without_data
from llmquant.spec import Recipe

OnStep = Callable[[int, int, str, float | None], None]
"""(blocks finished, blocks in all, what is being done, relative error of the last solved linears)."""


def walk_and_quantize(
    plan: Plan,
    tokens: CalibrationTokens,
    partial: PartialCheckpoint | None,
    report: ReportBuilder,
    on_step: OnStep,
    ranks: Ranks,
) -> None:
    """Quantize block after block on what the network makes of the calibration tokens.

    partial: where the first rank writes; None on the others.
    """
    total = len(plan.block_names)
    smoother = Smoother(plan, report) if plan.recipe.smooths else None
    mine = ranks.samples(len(tokens.tokens_SL), SEARCH_SEQUENCES if plan.recipe.smooths else 1)
    scratch = ranks.share(lambda: _here(partial).scratch)
    if few := too_few_samples(plan, len(tokens.tokens_SL)):
        report.remark("calibration", few)
    budget_bytes, spill = footprint_of(plan).budget_bytes, None
    if budget_bytes is not None:
        report.remark("activations", "kept on the disk as far as they do not fit in memory (--max-memory)")
        spill = Spill(scratch / f"rank-{ranks.rank}", budget_bytes)
    with Walk(
        plan.skeleton,
        tokens.tokens_SL[mine.start : mine.stop],
        with_original=plan.recipe.needs_original,
        spill=spill,
        first_sample=mine.start,
    ) as walk:
        for index, part in enumerate(part_names(plan)):
            linears = plan.linears_of_block(index)
            with report.timed("forward"), ranks.together():
                walk.enter(index)
            found = ranks.share(lambda part=part: _read_part(_here(partial), part))  # type: ignore[misc]
            if found is not None:
                on_step(index, total, "reading back", None)
                stored, note = found
                report.recall(note)
                if smoother is not None and ranks.is_first:
                    with report.timed("folding"):
                        smoother.learn(walk, index)
                dense = replacements(plan, linears, unpack_part(plan, linears, stored))
                for name in note["folded"]:
                    dense[name] = stored[plan.skeleton.names[name]]
                with report.timed("forward"), ranks.together():
                    walk.pass_through(index, dense)
            else:
                solved, folded = quantize_block(
                    plan, walk, index, linears, smoother, report, on_step, ranks, len(tokens.tokens_SL), partial
                )
                if partial is not None:
                    with report.timed("writing"):
                        digests = {name: tensor_digest(folded[name]) for name in sorted(folded)}
                        note = report.note(linears.values()) | {"folded": digests}
                        partial.add_part(part, pack_part(plan, index, linears, solved, folded), note)
            if partial is not None:
                partial.drop_part(feedback_part(index))
            walk.leave(index)
    on_step(total, total, "done", None)


def _here(partial: PartialCheckpoint | None) -> PartialCheckpoint:
    assert partial is not None, "only the first rank reads and writes parts"
    return partial


def _read_part(partial: PartialCheckpoint, part: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """A part that an earlier run has finished, and its note."""
    return (partial.read_part(part), partial.part_note(part)) if partial.has_part(part) else None


def quantize_block(
    plan: Plan,
    walk: Walk,
    index: int,
    linears: Mapping[str, LinearPlan],
    smoother: Smoother | None,
    report: ReportBuilder,
    on_step: OnStep,
    ranks: Ranks,
    num_samples: int,
    partial: PartialCheckpoint | None = None,
) -> tuple[dict[str, Solved], dict[str, Tensor]]:
    """Solve the linears of one block, stage by stage; every sequence has left it afterwards.

    num_samples: of all ranks together. partial: holds what was measured before the first block.

    Also the folded values of parameters that stay in 16 bit, by name in the model.
    """
    total = len(plan.block_names)
    with report.timed("forward"), ranks.together():
        block_plan = walk.plan(index)
    folded = Folded()
    if smoother is not None:
        on_step(index, total, "scales", None)
        chosen = ranks.share(lambda: smoother.choose(walk, index, block_plan, linears))
        folded = put_folded(plan, index, *chosen)
    feedback: dict[str, Feedback] = {}
    if plan.recipe.feeds_back:
        on_step(index, total, "outputs", None)
        with report.timed("outputs"):
            feedback = ranks.share(lambda: _feedback(plan, walk, index, linears, partial, num_samples, report))
        give_back()
    solved: dict[str, Solved] = {}
    for number, arrivals in walk.stages(index, block_plan, folded.own):
        names = [name for name in block_plan.stages[number].linears if name in linears]
        if not names:
            continue
        on_step(index, total, "forward", None)
        first = plan.skeleton.model.get_submodule(linears[names[0]].name)
        writes = plan.recipe.needs_original and block_plan.stages[number].residual_source is not None
        empty = partial_call(
            InputStatistics,
            linears[names[0]].in_features,
            plan.skeleton.device,
            writer_NK=weight_of(first) if writes else None,
            scale_K=folded.scales.get(number),
            exact=plan.recipe.exact_hessian,
        )
        arrivals = finite(plan, arrivals, index, names[0])
        statistics = ranks.fold(lanes(plan.recipe, arrivals, num_samples, empty, report), empty)
        if statistics.num_tokens == 0:
            continue
        give_back()
        on_step(index, total, ", ".join(name.rpartition(".")[2] for name in names), None)
        with report.timed("solving"):
            of_stage = {name: linears[name] for name in names}
            sizes = {name: linear.in_features * linear.out_features for name, linear in of_stage.items()}
            results = ranks.spread(sizes, partial_call(solve, plan, index, of_stage, statistics, feedback))
            if ranks.is_first:
                peaks = input_peaks(statistics)
                for name, result in results.items():
                    report.linear(linears[name], result, peaks)
        solved |= results
        put_back(plan, linears, results)
        give_back()
        on_step(index, total, "", sum(result.error for result in results.values()) / len(results))
    for name in sorted(set(linears) - set(solved)):
        linear = plan.skeleton.model.get_submodule(linears[name].name)
        solved[name] = solve_without_data(weight_of(linear), linears[name].grid, stored_numbers(plan))
        why = "is called more than once per forward pass" if name in block_plan.repeated else "saw no calibration token"
        report.linear(linears[name], solved[name])
        report.incident(linears[name].name, f"{why}: rounded to nearest")
    kept = {
        f"{plan.block_names[index]}.{name}": value
        for name, value in folded.parameters.items()
        if name.removesuffix(".weight") not in linears
    }
    return solved, kept


def _feedback(
    plan: Plan,
    walk: Walk,
    index: int,
    linears: Mapping[str, LinearPlan],
    partial: PartialCheckpoint | None,
    num_samples: int,
    report: ReportBuilder,
) -> dict[str, Feedback]:
    """What the rows of a block's linears mean to each other: measured now, or before the first block."""
    if not plan.recipe.runs_backward:
        return block_feedback(plan, walk, index, linears, num_samples, report)
    part = feedback_part(index)
    return unpacked(_here(partial).read_part(part), _here(partial).part_note(part))


def solve(
    plan: Plan,
    index: int,
    linears: Mapping[str, LinearPlan],
    statistics: InputStatistics,
    feedback: Mapping[str, Feedback],
    names: Sequence[str],
) -> dict[str, Solved]:
    """Solve some of the linears of one stage from the weights that the block holds; the results lie in main memory."""
    block = plan.skeleton.model.get_submodule(plan.block_names[index])
    weights = {name: weight_of(block.get_submodule(name)) for name in linears}
    for name, weight_NK in weights.items():
        if not all_finite(weight_NK):
            raise damaged_weights(plan.path, f"{linears[name].source}.weight")
    specs = {name: linear.grid for name, linear in linears.items()}
    here = {name: between.to(plan.skeleton.device) for name, between in feedback.items() if name in names}
    results = solve_stage(weights, specs, statistics, plan.recipe, stored_numbers(plan), names, here)
    # Other ranks have other devices.
    return {name: replace(result, weight=result.weight.to("cpu")) for name, result in results.items()}


def lanes(
    recipe: Recipe,
    arrivals: Iterator[Arrival],
    num_samples: int,
    empty: Callable[[], InputStatistics],
    report: ReportBuilder,
) -> Iterator[InputStatistics]:
    """The statistics of each lane of the samples (`ranks.py`) on its own, in order; the lanes are of either half."""
    groups = groupby(arrivals, lambda arrival: lane_of(arrival.sample, num_samples))
    while True:
        with report.timed("forward"):
            _, lane = next(groups, (0, None))
            first = None if lane is None else next(lane)
        if lane is None or first is None:
            return
        statistics = empty()
        statistics.half = half_of(first.sample, num_samples)
        gather(recipe, chain([first], lane), statistics, report)
        yield statistics


def gather(recipe: Recipe, arrivals: Iterator[Arrival], statistics: InputStatistics, report: ReportBuilder) -> None:
    """Count one stage's input over all sequences, a few at a time; each is led there when it is asked for."""
    while True:
        with report.timed("forward"):
            several = list(islice(arrivals, SEQUENCES_AT_ONCE))
        if not several:
            return
        with report.timed("statistics"):
            fields = zip(*(_counted(recipe, arrival) for arrival in several), strict=True)
            xs, originals, gaps = ([part for part in field if part is not None] for field in fields)
            if len(originals) in (0, len(xs)) and len(gaps) in (0, len(xs)):
                statistics.add(torch.cat(xs), *(torch.cat(parts) if parts else None for parts in (originals, gaps)))
            else:  # where the two networks part, some sequences have no counterpart
                for arrival in several:
                    statistics.add(*_counted(recipe, arrival))
            del xs, originals, gaps, several


def _counted(recipe: Recipe, arrival: Arrival) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What a recipe wants to know of a sequence."""
    original_x_TK = arrival.original_x_TK if recipe.input_error_target else None
    return arrival.x_TK, original_x_TK, arrival.residual_gap_TR if recipe.residual_target else None


def finite(plan: Plan, arrivals: Iterable[Arrival], index: int, name: str) -> Iterator[Arrival]:
    """The same arrivals; UserError at the first whose input is not finite.

    Inputs that are finite and only too large to be squared pass; their Hessian is dealt with when it is solved.
    """
    for arrival in arrivals:
        for x_TK, network in ((arrival.x_TK, "quantized"), (arrival.original_x_TK, "original")):
            if x_TK is not None and not all_finite(x_TK):
                for tensor in plan.tensors_of_block(index):
                    read_finite(plan, tensor)
                dtype = str(plan.skeleton.dtype).removeprefix("torch.")
                raise UserError(
                    f"{plan.path}: block {index}: NaN or inf in the input of '{name}' of the {network} network, in "
                    f"calibration sample {arrival.sample}; the network overflows in {dtype} on this text: "
                    "try --dtype bfloat16 or float32, with --restart"
                )
        yield arrival
        del arrival, x_TK


def quantize_without_data(plan: Plan, partial: PartialCheckpoint, report: ReportBuilder, on_step: OnStep) -> None:
    """Round every linear on its own: no forward pass, one block of weights at a time."""
    total = len(plan.block_names)
    for index, part in enumerate(part_names(plan)):
        on_step(index, total, "rounding", None)
        linears = plan.linears_of_block(index)
        if partial.has_part(part):
            report.recall(partial.part_note(part))
            continue
        solved = {}
        for name, linear in linears.items():
            with report.timed("solving"):
                solved[name] = round_alone(plan, linear)
            report.linear(linear, solved[name])
        with report.timed("writing"):
            partial.add_part(part, pack_part(plan, index, linears, solved), report.note(linears.values()))
    on_step(total, total, "done", None)
