"""How long a run will take: an estimate from timings of this machine, made before any weight is read.

Each distinct shape of linear in the decoder blocks is timed once on random numbers: a matmul in the dtype of the
network, the input statistics of a piece of text, and the rounding of some rows by the recipe's own steps. These times
are scaled to all tokens, all rows and all blocks. A linear that is wider than MAX_COLUMNS is timed at that width and
scaled by how each step grows with the width. The factors below were fitted to runs of SmolLM2-135M; on a machine with
other work the estimate and the run both take longer.

Letters: K in_features, N out_features, T tokens.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from llmquant.algorithms.statistics import InputStatistics
from llmquant.formats.fused import fused_sets
from llmquant.models.blocks import weight_of
from llmquant.models.skeleton import measuring_dtype
from llmquant.pipeline.footprint import GRADIENT_TOKENS, MEASURED_TOKENS
from llmquant.pipeline.held_out import num_windows, window_length
from llmquant.pipeline.parts import stored_numbers
from llmquant.pipeline.plan import LinearPlan, Plan
from llmquant.pipeline.solve import solve_stage, solve_without_data
from llmquant.spec import QuantSpec

MAX_COLUMNS, MAX_ROWS, FEW_ROWS = 1024, 128, 32
"""Largest K that is timed; rows that are rounded in the longer and in the shorter timing. Their difference is what rows
cost, the rest what the Hessian costs."""
MAX_TOKENS = 512
"""Tokens of the piece of text that is timed."""
FORWARD_OVERHEAD = 1.6
"""Time of a forward pass through a block relative to that of its matmuls: attention, norms, activations, copies."""
BACKWARD = 3.0
"""Time of a pass forward and backward relative to one forward."""
WARM_SECONDS = 0.05
"""A step that takes longer is timed once."""
HASHED_BYTES_PER_SECOND = 1.0e9
"""SHA-256 and reading, on one core."""


@dataclass(frozen=True)
class Duration:
    """Predicted seconds of a run by step; downloads are not counted."""

    steps: Mapping[str, float]

    @property
    def seconds(self) -> float:
        """Of all steps together."""
        return sum(self.steps.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"predicted_seconds": self.seconds, "predicted_seconds_of_steps": dict(self.steps)}


@dataclass(frozen=True)
class _Shape:
    """Linears that read one input: K, and the outputs and grid of each."""

    in_features: int
    outputs: tuple[int, ...]
    specs: tuple[QuantSpec, ...]
    writes: bool
    """Whether it is taken to write to the residual stream: a linear that shares its input with none."""


@dataclass
class _Seconds:
    """What one shape costs: per token, and once per linear."""

    forward: float = 0.0
    statistics: float = 0.0
    solving: float = 0.0


def estimate(plan: Plan) -> Duration:
    """The predicted duration of a run on the plan's device. Takes a second or two; reads nothing."""
    steps: defaultdict[str, float] = defaultdict(float, hashing=plan.reader.total_bytes / HASHED_BYTES_PER_SECOND)
    tokens, recipe = plan.num_tokens, plan.recipe
    block_forward = 0.0
    shapes = Counter(_shapes(plan))
    for shape, count in shapes.items():
        cost = _timed(plan, shape)
        block_forward += count * cost.forward
        steps["statistics"] += count * cost.statistics * tokens
        steps["solving"] += count * cost.solving
    head = _head_seconds(plan, plan.skeleton.dtype)
    steps["forward"] = block_forward * tokens * (2 if recipe.needs_original else 1)
    if recipe.runs_backward:
        steps["gradients"] = BACKWARD * tokens * (block_forward + head)
    elif recipe.feeds_back:
        steps["outputs"] = BACKWARD * min(tokens, GRADIENT_TOKENS) * block_forward
    if recipe.has_budget:
        steps["sensitivity"] = BACKWARD * min(tokens, MEASURED_TOKENS) * (block_forward + head)
    if plan.options.verify:
        # The result and the original, each through all blocks and the head.
        dtype, length = measuring_dtype(plan.skeleton.dtype, plan.skeleton.device), window_length(plan.config)
        compared = sum(count * _forward_seconds(plan, shape, dtype) for shape, count in shapes.items())
        steps["verifying"] = 2 * num_windows(length) * length * (compared + _head_seconds(plan, dtype))
    return Duration(dict(steps))


def _shapes(plan: Plan) -> Iterator[_Shape]:
    """The inputs of all quantized linears of the blocks, by the fused sets that engines know; the others are alone."""
    for index in range(len(plan.block_names)):
        linears = {linear.name: linear for linear in plan.linears_of_block(index).values()}
        together = [tuple(names) for names in fused_sets(linears).values()]
        fused = {name for names in together for name in names}
        for names in (*together, *((name,) for name in linears if name not in fused)):
            members: list[LinearPlan] = [linears[name] for name in names]
            yield _Shape(
                members[0].in_features,
                tuple(linear.out_features for linear in members),
                tuple(linear.grid for linear in members),
                writes=len(members) == 1,
            )


def _timed(plan: Plan, shape: _Shape) -> _Seconds:
    """Time the steps of one input's linears on random numbers, scaled to their real size."""
    device, dtype, recipe = plan.skeleton.device, plan.skeleton.dtype, plan.recipe
    columns = min(shape.in_features, MAX_COLUMNS)
    wider = shape.in_features / columns
    generator = torch.Generator(device=device).manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device)

    num_tokens = min(max(plan.num_tokens, 64), MAX_TOKENS)
    x_TK = random(num_tokens, columns).to(dtype)
    all_rows = sum(shape.outputs)
    weight_NK = random(min(all_rows, MAX_COLUMNS), columns)
    dense_NK = weight_NK.to(dtype)
    cost = _Seconds(forward=_forward_seconds(plan, shape, dtype))
    stored = stored_numbers(plan)
    rows = [min(count, MAX_ROWS) for count in shape.outputs]
    if not recipe.needs_data:
        for count, outputs, spec in zip(rows, shape.outputs, shape.specs, strict=True):
            piece_NK = weight_NK[: min(count, len(weight_NK))]
            seconds = _seconds(lambda: solve_without_data(piece_NK, spec, stored), device)  # noqa: B023
            cost.solving += seconds * wider * outputs / len(piece_NK)
        return cost
    writer_NK = dense_NK if shape.writes and recipe.needs_original else None
    statistics = InputStatistics(columns, device, writer_NK=writer_NK, exact=recipe.exact_hessian)
    original_TK = x_TK + 0.1 * random(num_tokens, columns).to(dtype) if recipe.needs_original else None
    gap_TN = random(num_tokens, len(dense_NK)) if writer_NK is not None and recipe.residual_target else None
    seconds = _seconds(lambda: statistics.add(x_TK, original_TK, gap_TN), device) / num_tokens
    cost.statistics = seconds * wider**2
    # The rounding of few and of more rows: the difference is what a row costs, the rest what the Hessian costs.
    if writer_NK is not None:
        statistics = InputStatistics(columns, device, exact=recipe.exact_hessian)
        statistics.add(x_TK, original_TK)
    spec = shape.specs[0]
    few, many = min(FEW_ROWS, min(rows)), min(max(rows), len(weight_NK))

    def solve(count: int) -> float:
        piece = {"w": weight_NK[:count]}
        return _seconds(lambda: solve_stage(piece, {"w": spec}, statistics, recipe, stored), device)

    first, second = solve(few), solve(many) if many > few else 0.0
    per_row = max(second - first, 0.0) / (many - few) if many > few else first / few
    fixed = max(first - few * per_row, 0.0)
    cost.solving = fixed * wider**3 + per_row * wider * all_rows
    return cost


def _forward_seconds(plan: Plan, shape: _Shape, dtype: torch.dtype) -> float:
    """A forward pass through the linears of one input and what belongs to them, for one token."""
    return FORWARD_OVERHEAD * _matmul_seconds(plan.skeleton.device, dtype, shape.in_features, sum(shape.outputs))


def _head_seconds(plan: Plan, dtype: torch.dtype) -> float:
    """The head's matmul, for one token."""
    vocabulary, hidden = weight_of(plan.skeleton.model.get_input_embeddings()).shape
    return _matmul_seconds(plan.skeleton.device, dtype, hidden, vocabulary)


def _matmul_seconds(device: torch.device, dtype: torch.dtype, in_features: int, out_features: int) -> float:
    """A matmul with a weight of that shape, for one token of many."""
    x_TK = torch.randn(MAX_TOKENS, min(in_features, MAX_COLUMNS), device=device).to(dtype)
    weight_NK = torch.randn(min(out_features, MAX_COLUMNS), x_TK.shape[1], device=device).to(dtype)
    scale = in_features * out_features / weight_NK.numel()
    return _seconds(lambda: x_TK @ weight_NK.T, device) * scale / len(x_TK)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of a run; of the second one where the first is so short that warming up is a part of it."""
    for _ in range(2):
        start = perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = perf_counter() - start
        if seconds > WARM_SECONDS:
            break
    return seconds
