"""An estimate of the memory of a run, and of the activations that `--max-memory` moves to the disk.

The estimate adds up the tensors that the code holds at its peaks. `scripts/bench/memory.py` compares it with real runs.

    runtime       Python, torch, transformers and the tokenizer: the current memory of the process, the pages of torch's
                  libraries that are loaded at the first computation, and the compiled attention
    work          one block and its quantized weights; the temporaries of the sequences that run between two heap trims;
                  and the larger of the statistics and the solver
    activations   the activations of all sequences, which are kept during that work
    other phases  phases before or after the blocks, without these activations: the sensitivities for a budget, the
                  backward pass, and the comparison of both models

The calibration text is not part of the estimate. It is read whole, and tokenized in small pieces.

Letters: K in_features, N out_features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from llmquant.algorithms.cross_row import row_slices
from llmquant.data.calibration import num_held_out
from llmquant.errors import UserError
from llmquant.estimates.machines import on_machine, parse_machine
from llmquant.eval.divergence import COMPARED_POSITIONS
from llmquant.memory import peak_resident_bytes, resident_bytes
from llmquant.models.blocks import weight_of
from llmquant.models.blockwise_forward import PASS_TOKENS, SEQUENCES_AT_ONCE, SEQUENCES_BETWEEN_TRIMS
from llmquant.models.skeleton import comparison_dtype
from llmquant.planning.held_out import num_windows, window_length
from llmquant.planning.linears import LinearPlan
from llmquant.planning.plan import Plan
from llmquant.runtime.attention import attention_bytes
from llmquant.solver.gradients import (
    CHUNK_TOKENS,
    GPU_CHUNK_TOKENS,
    tokens_at_once,
)

LIBRARY_BYTES = 45 * 2**20
"""Pages of torch's libraries that are loaded with the first matmuls and factorizations, as measured."""
RTN_BYTES = 18
"""Bytes per weight during rounding to nearest: float32 copy, integer levels, codes and temporaries."""
FACTOR_BYTES = 32
"""Bytes per element of the Hessian while its inverse is factored in float64."""
SOLVE_BYTES = 16
"""Bytes per element of the Hessian after the factorization."""
TARGET_BYTES = 44
"""Bytes per weight while its linear is quantized: rounding target, grid search, integer levels and errors, each in
float32, for GPTQ and for RTN."""
CROSS_ROW_BYTES = 12
"""Additional bytes per weight with cross-row error compensation: rounded values, their errors, and integer levels."""
COMPARED_BYTES = 24
"""Bytes per logit while the predictions of two models are compared."""
PACKING_BYTES = 12
"""Bytes per weight of the linear that is being packed into words."""


@dataclass(frozen=True)
class MemoryEstimate:
    """The estimated memory of a run in bytes: of the GPU if the run computes on one, else of the process."""

    runtime_bytes: int
    """Memory of the process without the tensors of the run."""
    work_bytes: int
    """Memory of the largest block while it is quantized."""
    activation_bytes: int
    """Activations of all sequences, which are kept during that work."""
    other_phases: Mapping[str, int]
    """Bytes of each phase that runs without these activations, by a description for messages."""
    peak_so_far_bytes: int
    """Largest memory of the process so far, which is a lower bound of the peak."""
    limit_bytes: int | None
    """Value of `--max-memory`; None without a limit."""

    @property
    def budget_bytes(self) -> int | None:
        """Bytes of the activations that may stay in memory; None if all may stay."""
        if self.limit_bytes is None or self._needed_bytes <= self.limit_bytes:
            return None
        return max(self.limit_bytes - self.runtime_bytes - self.work_bytes, 0)

    @property
    def spilled_bytes(self) -> int:
        """Bytes of the activations that are written to the disk."""
        return 0 if self.budget_bytes is None else self.activation_bytes - self.budget_bytes

    @property
    def peak_bytes(self) -> int:
        """The estimated peak of the memory."""
        other_peak = self.runtime_bytes + max(self.other_phases.values(), default=0)
        return max(self._needed_bytes - self.spilled_bytes, other_peak, self.peak_so_far_bytes)

    @property
    def least_bytes(self) -> int:
        """The estimated peak with all activations on the disk."""
        return self.runtime_bytes + max([self.work_bytes, *self.other_phases.values()])

    def to_dict(self) -> dict[str, int]:
        """Return the estimated peak and the activations on the disk, for JSON."""
        return {"peak_bytes": self.peak_bytes, "spilled_bytes": self.spilled_bytes}

    @property
    def _needed_bytes(self) -> int:
        return self.runtime_bytes + self.work_bytes + self.activation_bytes

    def check_limit(self) -> None:
        """Raise UserError if the run exceeds the limit even with all activations on the disk."""
        if self.limit_bytes is None:
            return
        work = "the largest block and the solver, with all activations on the disk,"
        phase, phase_bytes = max({work: self.work_bytes, **self.other_phases}.items(), key=lambda item: item[1])
        minimum = self.runtime_bytes + phase_bytes
        if minimum > self.limit_bytes:
            raise UserError(
                f"max_memory {self.limit_bytes / 1e9:.2f} GB: {phase} would take {minimum / 1e9:.2f} GB; use "
                f"--max-memory {minimum / 1e9 + 0.05:.1f}GB"
            )


def estimate_memory(plan: Plan) -> MemoryEstimate:
    """Estimate the memory of a run from the shapes of its model and the current memory of the process.

    If the options name a machine, the estimate is that of one of its GPUs.
    """
    if plan.options.machine is not None:
        plan = on_machine(plan, parse_machine(plan.options.machine))
    on_gpu = plan.skeleton.device.type != "cpu"
    blocks = range(len(plan.block_names))
    outside = max((math.prod(info.shape) for info in plan.tensors_outside().values()), default=0)
    if plan.recipe.needs_data:
        works = [_block_bytes(plan, index) for index in blocks]
        # The embeddings are in memory while the inputs of the first block are computed.
        activations, work = _activation_bytes(plan), max([*works, outside * plan.skeleton.dtype.itemsize])
    else:
        work = max(_rounding_bytes(plan, index) for index in blocks)
        activations = 0
    phases = {}
    if plan.recipe.has_budget:
        phases["measuring the sensitivity to each grid, for the budget,"] = _sensitivity_bytes(plan)
    if plan.recipe.runs_backward:
        phases["running the model backward, for cross-row error compensation,"] = _output_hessian_phase_bytes(plan)
    if plan.options.verify:
        phases["comparing the result with the original (--no-verify leaves it out)"] = _comparison_bytes(plan, outside)
    runtime = 0
    if not on_gpu:
        # This comes first, because it loads LLVM, which `resident_bytes` then includes.
        compiled = attention_bytes(plan.skeleton.model, plan.skeleton.device)
        runtime = resident_bytes() + LIBRARY_BYTES + compiled
    return MemoryEstimate(
        runtime_bytes=runtime,
        work_bytes=work,
        activation_bytes=activations,
        other_phases=phases,
        peak_so_far_bytes=0 if on_gpu else peak_resident_bytes(),
        limit_bytes=plan.options.max_memory_bytes,
    )


def output_hessian_bytes(plan: Plan, indices: Iterable[int]) -> int:
    """Return the bytes of the output-side Hessians of the linears of some blocks, for one split of the text.

    Their factors have the same size.
    """
    linears = [linear for index in indices for linear in plan.linears_of_block(index).values()]
    row_blocks = [rows for linear in linears for rows in row_slices(linear.out_features)]
    return sum(4 * (rows.stop - rows.start) ** 2 for rows in row_blocks)


def _sensitivity_bytes(plan: Plan) -> int:
    """Return the bytes of measuring sensitivities for a budget. The backward pass rounds the linears one by one."""

    def rounding(index: int) -> int:
        linears = plan.linears_of_block(index).values()
        widest = max((linear.in_features for linear in linears), default=0)
        return FACTOR_BYTES * widest**2 + TARGET_BYTES * max(map(_num_weights, linears), default=0)

    return _backprop_bytes(plan, rounding)


def _output_hessian_phase_bytes(plan: Plan) -> int:
    """Return the bytes of the backward pass that measures output-side Hessians.

    The Hessians of one block, for both splits of the text, are in memory three times: as terms, as sums so far, and as
    the copies that are written.
    """
    return _backprop_bytes(plan, lambda index: 3 * 2 * output_hessian_bytes(plan, [index]))


def _backprop_bytes(plan: Plan, extra_bytes: Callable[[int], int]) -> int:
    """Return the bytes of a forward and backward pass with one block in memory.

    They are the weights outside the blocks, the inputs of all blocks, and one block with all its activations.

    extra_bytes: additional bytes of the block with an index.
    """
    itemsize, blocks = plan.skeleton.dtype.itemsize, range(len(plan.block_names))
    hidden = _hidden_size(plan)
    machine = plan.options.machine
    at_once = tokens_at_once(plan, parse_machine(machine).memory_bytes if machine else None)
    tokens = min(max(at_once, plan.options.seq_len), plan.num_tokens)
    # A tied embedding is read twice.
    outside = 2 * sum(math.prod(info.shape) for info in plan.tensors_outside().values()) * itemsize
    inside = 0
    for index in blocks:
        weights = sum(math.prod(info.shape) for info in plan.tensors_of_block(index).values())
        linears = plan.linears_of_block(index).values()
        features = sum(linear.in_features + linear.out_features for linear in linears)
        inside = max(inside, weights * itemsize + tokens * features * itemsize + extra_bytes(index))
    chunk = GPU_CHUNK_TOKENS if _is_on_gpu(plan) else CHUNK_TOKENS
    logits = COMPARED_BYTES * chunk * weight_of(plan.skeleton.model.get_input_embeddings()).shape[0]
    return outside + len(blocks) * tokens * hidden * itemsize + max(inside, logits)


def _rounding_bytes(plan: Plan, index: int) -> int:
    """Return the bytes of rounding a block without data: codes, the linear being rounded, and the packed block."""
    linears = plan.linears_of_block(index).values()
    largest = max((_num_weights(linear) for linear in linears), default=0)
    codes = sum(map(_num_weights, linears))
    return codes + max(RTN_BYTES * largest, PACKING_BYTES * largest + sum(map(plan.packed_bytes, linears)))


def _block_bytes(plan: Plan, index: int) -> int:
    """Return the bytes of one block while it is quantized with calibration data.

    They are the weights of the block (twice if the original model runs beside the quantized one), the codes, and the
    largest of the statistics, the solver, the packing and the temporaries of running sequences.
    """
    itemsize, recipe = plan.skeleton.dtype.itemsize, plan.recipe
    linears = plan.linears_of_block(index)
    weights = sum(math.prod(info.shape) for info in plan.tensors_of_block(index).values())
    held = weights * itemsize * (2 if recipe.needs_original else 1) + sum(map(_num_weights, linears.values()))
    if recipe.uses_awq:
        # The block in float32, a copy with its scales folded in, and the Hessians of all its inputs at once.
        held += 2 * 4 * weights + sum(4 * linear.in_features**2 for linear in linears.values())
    peak = 0
    if recipe.compensates_across_rows:
        hessians = output_hessian_bytes(plan, [index])
        if recipe.runs_backward:
            held += hessians
        else:  # the forward and backward pass of one sequence, and the Hessians of both splits
            features = sum(linear.in_features + 2 * linear.out_features for linear in linears.values())
            peak = 2 * hessians + plan.options.seq_len * features * itemsize
    for input_group in _input_groups(linears):
        peak = max(peak, _statistics_bytes(plan, input_group), _solver_bytes(plan, input_group))
    packing = PACKING_BYTES * max((_num_weights(linear) for linear in linears.values()), default=0)
    # The temporaries of a sequence within the block are chiefly the outputs of gate and up, and their product.
    temporaries = 3 * max((linear.out_features for linear in linears.values()), default=0)
    running = SEQUENCES_BETWEEN_TRIMS * plan.options.seq_len * temporaries * itemsize
    if _is_on_gpu(plan):  # a block is packed while the next one is quantized
        return held + packing + max(peak, running, PASS_TOKENS * temporaries * itemsize)
    return held + max(peak, packing, running)


def _is_on_gpu(plan: Plan) -> bool:
    """Whether the run, or the one that is predicted for another machine, is on a GPU."""
    return plan.options.machine is not None or plan.skeleton.device.type != "cpu"


def _statistics_bytes(plan: Plan, input_group: list[LinearPlan]) -> int:
    """Return the bytes of accumulating the statistics of one input group."""
    itemsize, in_features = plan.skeleton.dtype.itemsize, input_group[0].in_features
    # The sums so far, of one chunk of samples and of one piece: a Hessian, and a moment with the original's input.
    sums = 3 * 4 * in_features**2 * (2 if plan.recipe.needs_original else 1)
    tokens = max(SEQUENCES_AT_ONCE * plan.options.seq_len, PASS_TOKENS if _is_on_gpu(plan) else 0)
    return sums + tokens * in_features * (3 * itemsize + 12 if plan.recipe.needs_original else itemsize + 4)


def _solver_bytes(plan: Plan, input_group: list[LinearPlan]) -> int:
    """Return the bytes of quantizing the linears of one input group, one after the other."""
    recipe, square = plan.recipe, input_group[0].in_features ** 2
    weights = max(map(_num_weights, input_group))
    # The corrections of all linears are computed before the first linear is quantized.
    corrections = 4 * (sum(map(_num_weights, input_group)) - weights) if recipe.needs_original else 0
    target_bytes = TARGET_BYTES + (CROSS_ROW_BYTES if recipe.compensates_across_rows else 0)
    solving = SOLVE_BYTES * square + target_bytes * weights + corrections
    return max(solving, FACTOR_BYTES * square + 4 * weights) if recipe.uses_gptq else solving


def _comparison_bytes(plan: Plan, outside: int) -> int:
    """Return the bytes of comparing the result with the original model at the end.

    They are the activations of all windows, and the larger of one block and of both heads with the predictions for one
    window, some of them in float32.

    outside: number of elements of the largest tensor outside the blocks.
    """
    itemsize = comparison_dtype(plan.skeleton.dtype, plan.skeleton.device).itemsize
    hidden = _hidden_size(plan)
    vocabulary = weight_of(plan.skeleton.model.get_input_embeddings()).shape[0]
    seq_len = window_length(plan.config)
    num_tokens, longest = num_windows(seq_len) * seq_len, seq_len
    if plan.recipe.needs_data:
        num_tokens += num_held_out(plan.options.num_samples) * plan.options.seq_len
        longest = max(longest, plan.options.seq_len)
    # Before a block, each window keeps the input of the block and the embeddings, in both models.
    activations = 2 * 2 * hidden * num_tokens * itemsize
    block = max(
        sum(math.prod(info.shape) for info in plan.tensors_of_block(index).values())
        for index in range(len(plan.block_names))
    )
    copies = 3 if itemsize == 4 else 2  # a float32 matmul copies its operands
    heads = copies * (outside + longest * vocabulary) * itemsize + COMPARED_BYTES * COMPARED_POSITIONS * vocabulary
    return activations + max(block * itemsize, heads)


def _activation_bytes(plan: Plan) -> int:
    """Return the bytes of the activations that all sequences keep while a block is quantized.

    Before the widest linear, a sequence keeps its embeddings, the block input, the residual stream, its normed copy,
    and the input of the linear. In the original model, most sequences are at the block input and keep the first two.
    """
    hidden = _hidden_size(plan)
    widest = max(linear.in_features for linear in plan.quantized)
    quantized_features, original_features = 4 * hidden + widest, 2 * hidden if plan.recipe.needs_original else 0
    return (quantized_features + original_features) * plan.num_tokens * plan.skeleton.dtype.itemsize


def _input_groups(linears: dict[str, LinearPlan]) -> list[list[LinearPlan]]:
    """Return groups of linears that probably share one input: linears of one module with the same in_features.

    The run finds the actual groups in the forward pass.
    """
    input_groups: dict[tuple[str, int], list[LinearPlan]] = {}
    for name, linear in linears.items():
        input_groups.setdefault((name.rpartition(".")[0], linear.in_features), []).append(linear)
    return list(input_groups.values())


def _hidden_size(plan: Plan) -> int:
    """Return the width of the residual stream: the hidden_size of the configuration, or the width of the embeddings."""
    hidden = getattr(plan.config.get_text_config(decoder=True), "hidden_size", None)
    return hidden if isinstance(hidden, int) else weight_of(plan.skeleton.model.get_input_embeddings()).shape[1]


def _num_weights(linear: LinearPlan) -> int:
    """Return the number of weights of a linear."""
    return linear.in_features * linear.out_features
