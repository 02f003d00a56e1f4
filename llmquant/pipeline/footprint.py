"""How much memory a run will take, and how much of its activations has to go to the disk for it to fit.

Counted from what the code holds at its widest moments, measured against real runs by `scripts/bench_memory`:

    runtime       Python, torch, transformers and the tokenizer: what the process holds now, and the pages of torch's
                  libraries that come in when it first computes
    work          one block and its solution; what one sequence makes while it runs, times as many as run between two
                  trims; and the wider of the statistics and the solver
    activations   what all sequences keep while they wait beside that work
    moments       what needs memory before or after, when no sequence waits: the sensitivities that a budget asks for,
                  both models while they are compared

The calibration text itself is not counted: it is read whole, and tokenized in small pieces.

Letters: K in_features, N out_features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from llmquant.algorithms.feedback import row_slices
from llmquant.errors import UserError
from llmquant.memory import peak_resident_bytes, resident_bytes
from llmquant.models.blocks import weight_of
from llmquant.models.skeleton import measuring_dtype
from llmquant.models.walk import SEQUENCES_AT_ONCE, SEQUENCES_BETWEEN_TRIMS
from llmquant.pipeline.calibration import num_held_out
from llmquant.pipeline.held_out import num_windows, window_length
from llmquant.pipeline.plan import LinearPlan, Plan

LIBRARY_BYTES = 45 * 2**20
"""Pages of torch's libraries that come in with the first products and factorizations, measured."""
RTN_BYTES = 18
"""Of a weight while it is rounded to nearest: its float32 copy, steps, their codes and temporaries."""
FACTOR_BYTES, SOLVE_BYTES = 34, 16
"""Of an element of the Hessian: while its inverse is factored in float64, and afterwards."""
TARGET_BYTES = 44
"""Of a weight while its linear is solved: target, grid search, steps, errors, each in float32, for GPTQ and for RTN."""
FEEDBACK_BYTES = 12
"""Of a weight where its rows make up for each other: what they were rounded to, their errors, and their steps."""
MEASURED_TOKENS = 4096
"""Calibration tokens that run for the sensitivities of linears (`sensitivity.py`), in whole sequences."""
GRADIENT_TOKENS = 2048
"""Calibration tokens that run forward and backward through a block for the feedback of its outputs (`feedback.py`)."""
CHUNK_TOKENS = 64
"""Tokens whose logits are there at one time, for the gradient of the loss."""
COMPARED_POSITIONS, COMPARED_BYTES = 64, 24
"""Positions whose predictions are compared at a time (`verify.py`), and bytes of a prediction meanwhile."""
PACKING_BYTES = 12
"""Of a weight of the linear that is being packed into words."""


@dataclass(frozen=True)
class Footprint:
    """Memory in bytes, by what needs it; on a GPU's run that of the GPU."""

    runtime_bytes: int
    work_bytes: int
    activation_bytes: int
    moments: Mapping[str, int]
    """What is needed when no activations wait, in words, with its bytes."""
    past_bytes: int
    """Largest memory of the process so far: a peak cannot be lower."""
    limit_bytes: int | None
    """What `--max-memory` allows."""

    @property
    def budget_bytes(self) -> int | None:
        """Activations that may stay in memory; None where all may."""
        if self.limit_bytes is None or self._needed_bytes <= self.limit_bytes:
            return None
        return max(self.limit_bytes - self.runtime_bytes - self.work_bytes, 0)

    @property
    def spilled_bytes(self) -> int:
        """Activations that go to the disk."""
        return 0 if self.budget_bytes is None else self.activation_bytes - self.budget_bytes

    @property
    def peak_bytes(self) -> int:
        """The predicted peak."""
        moment = self.runtime_bytes + max(self.moments.values(), default=0)
        return max(self._needed_bytes - self.spilled_bytes, moment, self.past_bytes)

    def to_dict(self) -> dict[str, int]:
        """What is predicted, for JSON."""
        return {"peak_bytes": self.peak_bytes, "spilled_bytes": self.spilled_bytes}

    @property
    def _needed_bytes(self) -> int:
        return self.runtime_bytes + self.work_bytes + self.activation_bytes

    def check(self) -> None:
        """UserError where the run does not fit even with all activations on the disk."""
        if self.limit_bytes is None:
            return
        work = "the largest block and the solver, with all activations on the disk,"
        what, most = max({work: self.work_bytes, **self.moments}.items(), key=lambda item: item[1])
        least = self.runtime_bytes + most
        if least > self.limit_bytes:
            raise UserError(
                f"max_memory {self.limit_bytes / 1e9:.2f} GB: {what} would take {least / 1e9:.2f} GB; use --max-memory "
                f"{least / 1e9 + 0.05:.1f}GB"
            )


def footprint_of(plan: Plan) -> Footprint:
    """The memory of a run, from the shapes of its model and the process as it is now."""
    on_device = plan.skeleton.device.type != "cpu"
    blocks = range(len(plan.block_names))
    outside = max((math.prod(info.shape) for info in plan.tensors_outside().values()), default=0)
    if plan.recipe.needs_data:
        works = [_block_bytes(plan, index) for index in blocks]
        # The embeddings are in memory while the sequences come in.
        activations, work = _activation_bytes(plan), max([*works, outside * plan.skeleton.dtype.itemsize])
    else:
        work = max(_rounding_bytes(plan, index) for index in blocks)
        activations = 0
    moments = {}
    if plan.recipe.has_budget:
        moments["measuring what grids cost, for the budget,"] = _sensitivity_bytes(plan)
    if plan.recipe.runs_backward:
        moments["running the network backward, for the feedback between outputs,"] = _backward_bytes(plan)
    if plan.options.verify:
        moments["comparing the result with the original (--no-verify leaves it out)"] = _verifying_bytes(plan, outside)
    return Footprint(
        runtime_bytes=0 if on_device else resident_bytes() + LIBRARY_BYTES,
        work_bytes=work,
        activation_bytes=activations,
        moments=moments,
        past_bytes=0 if on_device else peak_resident_bytes(),
        limit_bytes=plan.options.max_memory_bytes,
    )


def feedback_bytes(plan: Plan, indices: Iterable[int]) -> int:
    """What the output moments of the linears of some blocks take, of one half of the text; or their factors."""
    linears = [linear for index in indices for linear in plan.linears_of_block(index).values()]
    rows = [rows for linear in linears for rows in row_slices(linear.out_features)]
    return sum(4 * (part.stop - part.start) ** 2 for part in rows)


def _sensitivity_bytes(plan: Plan) -> int:
    """Grids to a budget: while a block has run, its linears are rounded."""

    def rounding(index: int) -> int:
        linears = plan.linears_of_block(index).values()
        widest = max((linear.in_features for linear in linears), default=0)
        return FACTOR_BYTES * widest**2 + TARGET_BYTES * max(map(_size, linears), default=0)

    return _both_ways_bytes(plan, rounding)


def _backward_bytes(plan: Plan) -> int:
    """Output moments: those of a block of both halves, the sums so far that they are added to, and as they are
    written."""
    return _both_ways_bytes(plan, lambda index: 3 * 2 * feedback_bytes(plan, [index]))


def _both_ways_bytes(plan: Plan, beside: Callable[[int], int]) -> int:
    """The network forward and backward: what is outside the blocks, the inputs of all blocks, and one block with all
    that it makes.

    beside: what else there is of a block then.
    """
    itemsize, blocks = plan.skeleton.dtype.itemsize, range(len(plan.block_names))
    hidden = _hidden_size(plan)
    tokens = min(max(MEASURED_TOKENS, plan.options.seq_len), plan.num_tokens)
    # A tied embedding is read twice.
    outside = 2 * sum(math.prod(info.shape) for info in plan.tensors_outside().values()) * itemsize
    inside = 0
    for index in blocks:
        weights = sum(math.prod(info.shape) for info in plan.tensors_of_block(index).values())
        linears = plan.linears_of_block(index).values()
        made = sum(linear.in_features + linear.out_features for linear in linears)
        inside = max(inside, weights * itemsize + tokens * made * itemsize + beside(index))
    logits = COMPARED_BYTES * CHUNK_TOKENS * weight_of(plan.skeleton.model.get_input_embeddings()).shape[0]
    return outside + len(blocks) * tokens * hidden * itemsize + max(inside, logits)


def _rounding_bytes(plan: Plan, index: int) -> int:
    """Without data: the codes of a block, the linear that is being rounded, then the packed block."""
    linears = plan.linears_of_block(index).values()
    largest = max((_size(linear) for linear in linears), default=0)
    codes = sum(map(_size, linears))
    return codes + max(RTN_BYTES * largest, PACKING_BYTES * largest + sum(map(plan.packed_bytes, linears)))


def _block_bytes(plan: Plan, index: int) -> int:
    """One block: its weights, those that the original network still walks through, codes, statistics and solver."""
    itemsize, recipe = plan.skeleton.dtype.itemsize, plan.recipe
    linears = plan.linears_of_block(index)
    weights = sum(math.prod(info.shape) for info in plan.tensors_of_block(index).values())
    held = weights * itemsize * (2 if recipe.needs_original else 1) + sum(map(_size, linears.values()))
    if recipe.smooths:
        # The block in float32, once more with its scales folded in, and the moments of all its inputs at a time.
        held += 2 * 4 * weights + sum(4 * linear.in_features**2 for linear in linears.values())
    piece = SEQUENCES_AT_ONCE * plan.options.seq_len
    widest, target_bytes = 0, TARGET_BYTES
    if recipe.feeds_back:
        target_bytes += FEEDBACK_BYTES
        moments = feedback_bytes(plan, [index])
        if recipe.runs_backward:
            held += moments
        else:  # one sequence forward and backward, and the moments of both halves
            made = sum(linear.in_features + 2 * linear.out_features for linear in linears.values())
            widest = 2 * moments + plan.options.seq_len * made * itemsize
    for stage in _stages(linears):
        in_features = stage[0].in_features
        square, weight = in_features**2, max(map(_size, stage))
        # The sums so far, and those of one lane of the samples: Hessian, and with the original network a moment.
        sums = 2 * 4 * square * (2 if recipe.needs_original else 1)
        statistics = sums + piece * in_features * (3 * itemsize + 12 if recipe.needs_original else itemsize + 4)
        # One linear after the other; the corrections of all are there before.
        corrections = 4 * (sum(map(_size, stage)) - weight) if recipe.needs_original else 0
        solving = SOLVE_BYTES * square + target_bytes * weight + corrections
        if recipe.compensates:
            solving = max(solving, FACTOR_BYTES * square + 4 * weight)
        widest = max(widest, statistics, solving)
    packing = PACKING_BYTES * max((_size(linear) for linear in linears.values()), default=0)
    # What a sequence makes on its way through the block, chiefly gate, up and their product.
    passing = 3 * max((linear.out_features for linear in linears.values()), default=0)
    running = SEQUENCES_BETWEEN_TRIMS * plan.options.seq_len * passing * itemsize
    return held + max(widest, packing, running)


def _verifying_bytes(plan: Plan, outside: int) -> int:
    """At the end, the original beside the result: what all windows keep while they wait, and one block of either, or
    both heads, the predictions for one window, and a few in float32."""
    itemsize = measuring_dtype(plan.skeleton.dtype, plan.skeleton.device).itemsize
    hidden = _hidden_size(plan)
    vocabulary = weight_of(plan.skeleton.model.get_input_embeddings()).shape[0]
    seq_len = window_length(plan.config)
    num_tokens, longest = num_windows(seq_len) * seq_len, seq_len
    if plan.recipe.needs_data:
        num_tokens += num_held_out(plan.options.num_samples) * plan.options.seq_len
        longest = max(longest, plan.options.seq_len)
    # In front of a block: its input and the embeddings.
    waiting = 2 * 2 * hidden * num_tokens * itemsize
    block = max(
        sum(math.prod(info.shape) for info in plan.tensors_of_block(index).values())
        for index in range(len(plan.block_names))
    )
    copies = 3 if itemsize == 4 else 2  # a product in float32 copies what it reads
    heads = copies * (outside + longest * vocabulary) * itemsize + COMPARED_BYTES * COMPARED_POSITIONS * vocabulary
    return waiting + max(block * itemsize, heads)


def _activation_bytes(plan: Plan) -> int:
    """What waits: in front of the widest linear a sequence holds its embeddings, the block's input, the residual
    stream, its normed copy and the linear's input. Most originals wait at the block's door, with two of these."""
    hidden = _hidden_size(plan)
    widest = max(linear.in_features for linear in plan.quantized)
    inside, at_door = 4 * hidden + widest, 2 * hidden
    originals = at_door * plan.num_tokens if plan.recipe.needs_original else 0
    return (inside * plan.num_tokens + originals) * plan.skeleton.dtype.itemsize


def _stages(linears: dict[str, LinearPlan]) -> list[list[LinearPlan]]:
    """Linears that probably read one input: those of one module with the same width. It is seen for sure in the run."""
    stages: dict[tuple[str, int], list[LinearPlan]] = {}
    for name, linear in linears.items():
        stages.setdefault((name.rpartition(".")[0], linear.in_features), []).append(linear)
    return list(stages.values())


def _hidden_size(plan: Plan) -> int:
    """Width of the residual stream; that of the embeddings if the configuration has no such number."""
    hidden = getattr(plan.config.get_text_config(decoder=True), "hidden_size", None)
    return hidden if isinstance(hidden, int) else weight_of(plan.skeleton.model.get_input_embeddings()).shape[1]


def _size(linear: LinearPlan) -> int:
    return linear.in_features * linear.out_features
