"""The loop over the decoder blocks.

For each block in order, the loop loads the weights and runs the calibration samples to each input group (the linears
that share one input). It collects the statistics of that input, quantizes the group, and goes on with the dequantized
weights. Then it packs the block and writes it. Memory holds one block, its statistics, and the activations of the
calibration samples. If an earlier run has finished a block, the loop reads the block back and runs the samples through
it, which restores the activations bit for bit.

With several ranks, each rank runs its own samples. All ranks call the methods of `Run.ranks` in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial as partial_call
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from llmquant.algorithms.cross_row import CrossRowFactors
from llmquant.algorithms.statistics import InputStatistics
from llmquant.errors import UserError
from llmquant.estimates.memory import estimate_memory
from llmquant.humanize import dtype_name
from llmquant.memory import trim_heap
from llmquant.models.blocks import BlockStructure, weight_of
from llmquant.models.blockwise_forward import PASS_TOKENS, SEQUENCES_AT_ONCE, BlockwiseForward, GroupInput
from llmquant.models.finite import all_finite, damaged_weights_error, finite_flag, read_finite
from llmquant.models.spill import Spill
from llmquant.pipeline.block_writer import BlockWriter
from llmquant.pipeline.output import dense_weights, install_dequantized, pack_part, part_names, round_alone, unpack_part
from llmquant.pipeline.run import Run
from llmquant.planning.linears import LinearPlan
from llmquant.planning.plan import Plan
from llmquant.progress import Phase
from llmquant.solver.awq_scaling import SEARCH_SEQUENCES, AwqScaler, FoldedBlock, install_folded
from llmquant.solver.output_hessian import (
    block_cross_row_factors,
    cross_row_part,
    num_gradient_sequences,
    too_few_samples,
    unpack_factors,
)
from llmquant.solver.quantize_linear import LinearResult, quantize_linears, round_without_data, storage_limits
from llmquant.solver.reduction import chunk_of, piece_of, split_of
from llmquant.spec import Recipe

HASHING_THREADS = 4
"""Linears of an input group whose codes are hashed at the same time."""


def quantize_blocks(run: Run) -> None:
    """Quantize all blocks in order with the calibration samples. Rank 0 writes the results."""
    plan, ranks, log = run.plan, run.ranks, run.log
    assert run.tokens is not None
    scaler = AwqScaler(plan, log) if plan.recipe.uses_awq else None
    passes = _passes(plan, ranks.samples(run.num_samples, _num_searched(run)), run)
    if few := too_few_samples(plan, run.num_samples):
        log.note("calibration", few)
    writer = BlockWriter(run)
    with (
        writer,
        BlockwiseForward(
            plan.skeleton,
            [run.tokens.tokens_SL[samples.start : samples.stop] for samples in passes],
            with_original=plan.recipe.needs_original,
            spill=_spill(run),
            samples=passes,
            timer=partial_call(log.timed, "forward"),
        ) as forward,
    ):
        for index, part in enumerate(part_names(plan)):
            with ranks.raising_on_all():
                forward.enter(index)
            stored = ranks.on_main(partial_call(run.stored_part, part))
            if stored is not None:
                writer.wait()
                _restore_block(run, forward, index, scaler, *stored)
                if run.partial is not None:
                    run.partial.drop_part(cross_row_part(index))
            else:
                results, folded = quantize_block(run, forward, index, scaler)
                if run.partial is not None:
                    writer.write(index, part, results, folded)
            forward.leave(index)
    run.report_progress(Phase.BLOCKS, run.num_blocks)


def _num_searched(run: Run) -> int:
    """Return the number of samples, from the first, that rank 0 needs for AWQ's search and for gradients of a block."""
    recipe = run.plan.recipe
    has_gradients = recipe.compensates_across_rows and not recipe.runs_backward
    gradients = num_gradient_sequences(run.num_samples, run.plan.options.seq_len) if has_gradients else 0
    return max(gradients, SEARCH_SEQUENCES if recipe.uses_awq else 0)


def _passes(plan: Plan, own: range, run: Run) -> list[range]:
    """Return the samples of each forward pass of this rank, whose samples are `own`.

    A GPU runs several samples of a piece (`reduction.py`) in one pass, because short passes cost more time for their
    launches than for their arithmetic. The first samples run alone: single sequences are taken from them for the
    structure of a block, for its gradients and for AWQ's search. The division does not depend on the number of ranks.
    """
    at_once = max(1, PASS_TOKENS // plan.options.seq_len) if plan.skeleton.device.type == "cuda" else 1
    passes = []
    for _, of_piece in groupby(own, lambda sample: piece_of(sample, run.num_samples)):
        piece = list(of_piece)
        is_single = chunk_of(piece[0], run.num_samples) == 0 or piece[0] < SEARCH_SEQUENCES
        step = 1 if is_single else at_once
        passes += [range(first, min(first + step, piece[-1] + 1)) for first in piece[::step]]
    return passes


def _spill(run: Run) -> Spill | None:
    """Return the store on disk for activations that do not fit in memory; None if all fit."""
    scratch = run.ranks.on_main(lambda: run.checkpoint.scratch)
    budget_bytes = estimate_memory(run.plan).budget_bytes
    if budget_bytes is None:
        return None
    run.log.note("activations", "written to disk as far as they do not fit in memory (--max-memory)")
    return Spill(run.ranks.scratch(scratch), budget_bytes)


def _restore_block(
    run: Run,
    forward: BlockwiseForward,
    index: int,
    scaler: AwqScaler | None,
    tensors: Mapping[str, Tensor],
    note: dict[str, Any],
) -> None:
    """Run the samples through a block that an earlier run has quantized. note: the record in its part."""
    plan, log = run.plan, run.log
    run.report_progress(Phase.READING_BACK, index)
    log.restore(note)
    if scaler is not None and run.ranks.is_main:
        with log.timed("folding"):
            scaler.find_block_folds(forward, index)
    linears = plan.linears_of_block(index)
    dense = dense_weights(plan, linears, unpack_part(plan, linears, tensors))
    for name in note["folded"]:
        dense[name] = tensors[plan.skeleton.names[name]]
    with run.ranks.raising_on_all():
        forward.pass_through(index, dense)


def quantize_block(
    run: Run, forward: BlockwiseForward, index: int, scaler: AwqScaler | None
) -> tuple[dict[str, LinearResult], dict[str, Tensor]]:
    """Quantize the linears of one block, one input group after the other, and run all samples through the block.

    Returns the results, by name within the block. Also returns the parameters that AWQ's scales changed and that stay
    in 16 bits, by name in the model.
    """
    plan = run.plan
    linears = plan.linears_of_block(index)
    with run.ranks.raising_on_all():
        structure = forward.structure(index)
    folded = FoldedBlock()
    if scaler is not None:
        run.report_progress(Phase.BLOCKS, index, "scales")
        chosen = run.ranks.on_main(lambda: scaler.choose_scales(forward, index, structure, linears))
        folded = install_folded(plan, index, *chosen)
    factors = _cross_row_factors(run, forward, index)
    results: dict[str, LinearResult] = {}
    for number, inputs in forward.input_groups(index, structure, folded.checkpoint_parameters):
        group = {name: linears[name] for name in structure.input_groups[number].linears if name in linears}
        if group:
            writes_residual = structure.input_groups[number].residual_source is not None
            empty = _empty_statistics(plan, group, folded.scales.get(number), writes_residual=writes_residual)
            statistics = _statistics(run, index, inputs, next(iter(group)), empty)
            if statistics.num_tokens > 0:
                results |= _quantize_group(run, index, group, statistics, factors)
    results |= _round_uncalibrated(
        run, {name: linears[name] for name in sorted(set(linears) - set(results))}, structure
    )
    unquantized = {
        f"{plan.block_names[index]}.{name}": value
        for name, value in folded.parameters.items()
        if name.removesuffix(".weight") not in linears
    }
    return results, unquantized


def _cross_row_factors(run: Run, forward: BlockwiseForward, index: int) -> dict[str, CrossRowFactors]:
    """Return the factors for cross-row error compensation in one block.

    The factors are measured here, or read from disk if a backward pass before the first block has measured them.
    """
    plan = run.plan
    if not plan.recipe.compensates_across_rows:
        return {}

    def on_main() -> dict[str, CrossRowFactors]:
        if plan.recipe.runs_backward:
            part = cross_row_part(index)
            return unpack_factors(run.checkpoint.read_part(part), run.checkpoint.part_note(part))
        return block_cross_row_factors(plan, forward, index, plan.linears_of_block(index), run.num_samples, run.log)

    run.report_progress(Phase.BLOCKS, index, "output Hessians")
    with run.log.timed("outputs"):
        factors = run.ranks.on_main(on_main)
    trim_heap()
    return factors


def _empty_statistics(
    plan: Plan, group: Mapping[str, LinearPlan], scale_K: Tensor | None, *, writes_residual: bool
) -> Callable[[], InputStatistics]:
    """Return a function that creates the statistics of an input group, without any tokens.

    scale_K: AWQ's scales of the input, if any. writes_residual: whether the group's output is added to the residual
    stream.
    """
    linear = next(iter(group.values()))
    writer = plan.skeleton.model.get_submodule(linear.name) if writes_residual and plan.recipe.needs_original else None
    return partial_call(
        InputStatistics,
        linear.in_features,
        plan.skeleton.device,
        writer_NK=None if writer is None else weight_of(writer),
        scale_K=scale_K,
        exact=plan.recipe.exact_hessian,
    )


def _statistics(
    run: Run, index: int, inputs: Iterator[GroupInput], name: str, empty: Callable[[], InputStatistics]
) -> InputStatistics:
    """Return the statistics of an input group over the samples of all ranks. name: one of its linears, for messages."""
    run.report_progress(Phase.BLOCKS, index, "forward")
    statistics = run.ranks.sum_statistics(
        _piece_statistics(run, _checked_finite(run.plan, inputs, index, name), empty), empty
    )
    trim_heap()
    return statistics


def _piece_statistics(
    run: Run, inputs: Iterator[GroupInput], empty: Callable[[], InputStatistics]
) -> Iterator[tuple[int, InputStatistics]]:
    """Yield the number and the statistics of each of this rank's pieces of the samples (`reduction.py`) in order."""
    for piece, of_piece in groupby(inputs, lambda group_input: piece_of(group_input.samples[0], run.num_samples)):
        # Another rank adds the samples that rank 0 runs only for `_num_searched`.
        if piece not in run.ranks.pieces:
            continue
        statistics = empty()
        while several := _next_inputs(run, of_piece):
            with run.log.timed("statistics"):
                _add(run.plan.recipe, several, statistics, split_of(several[0].samples[0], run.num_samples))
            # Without `del`, this list would stay in memory until the next list is complete.
            del several
        yield piece, statistics


def _next_inputs(run: Run, inputs: Iterator[GroupInput]) -> list[GroupInput]:
    """Run the next few samples to the input group, and return its inputs; empty after the last sample."""
    several: list[GroupInput] = []
    with run.log.timed("forward"):
        for group_input in inputs:
            several.append(group_input)
            if sum(len(each.samples) for each in several) >= SEQUENCES_AT_ONCE:
                break
    return several


def _add(recipe: Recipe, several: Sequence[GroupInput], statistics: InputStatistics, split: int) -> None:
    """Add the inputs of several samples, all in one split of the text, to the statistics."""
    fields = zip(*(_used_tensors(recipe, each) for each in several), strict=True)
    xs, originals, gaps = ([tensor for tensor in field if tensor is not None] for field in fields)
    if len(originals) in (0, len(xs)) and len(gaps) in (0, len(xs)):
        joined = (torch.cat(tensors) if tensors else None for tensors in (originals, gaps))
        statistics.add(torch.cat(xs), *joined, split=split)
    else:  # the original model routed some samples elsewhere, so they have no original input
        for each in several:
            statistics.add(*_used_tensors(recipe, each), split=split)


def _used_tensors(recipe: Recipe, group_input: GroupInput) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the tensors of a sample that a recipe uses: both models' inputs and `residual_drift_TR`."""
    original_x_TK = group_input.original_x_TK if recipe.correct_input_error else None
    return group_input.x_TK, original_x_TK, group_input.residual_drift_TR if recipe.correct_residual_error else None


def _checked_finite(plan: Plan, inputs: Iterable[GroupInput], index: int, name: str) -> Iterator[GroupInput]:
    """Yield the inputs unchanged. Raises UserError after the last one if any was not finite.

    An input that is finite but too large to be squared is accepted here; the solver handles its Hessian. The inputs are
    checked together at the end, because each check waits for a GPU.
    """
    checked: list[tuple[range, str]] = []
    flags: list[Tensor] = []
    for group_input in inputs:
        for x_TK, model in ((group_input.x_TK, "quantized"), (group_input.original_x_TK, "original")):
            if x_TK is not None:
                checked.append((group_input.samples, model))
                flags.append(finite_flag(x_TK))
        yield group_input
        del group_input, x_TK
    is_finite = torch.stack(flags).tolist() if flags else []
    for samples, model in (which for which, finite in zip(checked, is_finite, strict=True) if not finite):
        for tensor in plan.tensors_of_block(index):
            read_finite(plan.skeleton, tensor)
        raise UserError(
            f"{plan.path}: block {index}: NaN or inf in the input of '{name}' of the {model} model, in "
            f"calibration {_describe(samples)}; the model overflows in "
            f"{dtype_name(plan.skeleton.dtype)} on this text: try --dtype bfloat16 or float32, with --restart"
        )


def _digests(plan: Plan, results: Mapping[str, LinearResult]) -> list[str]:
    """Return the digests of quantized weights; on a GPU in threads, because a CPU is busy with the computation."""
    if plan.skeleton.device.type != "cuda":
        return [result.weight.digest() for result in results.values()]
    with ThreadPoolExecutor(min(len(results), HASHING_THREADS)) as pool:  # hashlib releases the interpreter's lock
        return list(pool.map(lambda result: result.weight.digest(), results.values()))


def _describe(samples: range) -> str:
    return f"sample {samples[0]}" if len(samples) == 1 else f"samples {samples[0]} to {samples[-1]}"


def _quantize_group(
    run: Run,
    index: int,
    group: Mapping[str, LinearPlan],
    statistics: InputStatistics,
    factors: Mapping[str, CrossRowFactors],
) -> dict[str, LinearResult]:
    """Quantize the linears of an input group, divided among the ranks, and put dequantized weights into the block."""
    run.report_progress(Phase.BLOCKS, index, ", ".join(name.rpartition(".")[2] for name in group))
    with run.log.timed("solving"):
        costs = {name: linear.in_features * linear.out_features for name, linear in group.items()}
        work = partial_call(_quantize_some, run.plan, index, group, statistics, factors)
        results = run.ranks.divide(costs, work)
        if run.ranks.is_main:
            for (name, result), digest in zip(results.items(), _digests(run.plan, results), strict=True):
                run.record_linear(group[name], result, digest, statistics)
    install_dequantized(run.plan, group, {name: result.weight for name, result in results.items()})
    trim_heap()
    mean_error = sum(result.error for result in results.values()) / len(results)
    run.report_progress(Phase.BLOCKS, index, error=mean_error)
    return results


def _quantize_some(
    plan: Plan,
    index: int,
    group: Mapping[str, LinearPlan],
    statistics: InputStatistics,
    factors: Mapping[str, CrossRowFactors],
    names: Sequence[str],
) -> dict[str, LinearResult]:
    """Quantize the named linears of an input group from the weights in the block. The results are in CPU memory."""
    block = plan.skeleton.model.get_submodule(plan.block_names[index])
    weights = {name: weight_of(block.get_submodule(name)) for name in group}
    for name, weight_NK in weights.items():
        if not all_finite(weight_NK):
            raise damaged_weights_error(plan.path, f"{group[name].checkpoint_name}.weight")
    specs = {name: linear.quant_spec for name, linear in group.items()}
    own_factors = {name: factor.to(plan.skeleton.device) for name, factor in factors.items() if name in names}
    results = quantize_linears(weights, specs, statistics, plan.recipe, storage_limits(plan), names, own_factors)
    # Other ranks, which receive the results, have other devices.
    return {name: replace(result, weight=result.weight.to("cpu")) for name, result in results.items()}


def _round_uncalibrated(
    run: Run, linears: Mapping[str, LinearPlan], structure: BlockStructure
) -> dict[str, LinearResult]:
    """Round to nearest the linears of a block that have no statistics."""
    results = {}
    for name, linear in linears.items():
        weight_NK = weight_of(run.plan.skeleton.model.get_submodule(linear.name))
        results[name] = round_without_data(weight_NK, linear.quant_spec, storage_limits(run.plan))
        reason = (
            "is called more than once per forward pass" if name in structure.repeated else "saw no calibration token"
        )
        run.record_linear(linear, results[name], results[name].weight.digest())
        run.log.fallback(linear.name, f"{reason}: rounded to nearest")
    return results


def round_blocks(run: Run) -> None:
    """Round every linear to nearest, without calibration. Memory holds one block of weights at a time."""
    plan, log = run.plan, run.log
    for index, part in enumerate(part_names(plan)):
        run.report_progress(Phase.BLOCKS, index, "rounding")
        if run.checkpoint.has_part(part):
            log.restore(run.checkpoint.part_note(part))
            continue
        results = {}
        linears = plan.linears_of_block(index)
        for name, linear in linears.items():
            with log.timed("solving"):
                results[name] = round_alone(plan, linear)
            run.record_linear(linear, results[name], results[name].weight.digest())
        with log.timed("writing"):
            part_tensors = pack_part(plan, index, linears, results)
            run.checkpoint.add_part(part, part_tensors, log.record_of(linears.values()))
    run.report_progress(Phase.BLOCKS, run.num_blocks)
