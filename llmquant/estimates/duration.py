"""An estimate of the duration of a run, from timings on this machine, made before any weight is read.

Each distinct shape of linear in the decoder blocks is timed once on random numbers: a matmul in the dtype of the model,
the input statistics of a few hundred tokens, and the rounding of some rows with the recipe. These times are scaled to
all tokens, all rows and all blocks. A linear that is wider than MAX_COLUMNS is timed at that width, and each step is
scaled by its growth with the width. The factors below were fitted to runs of SmolLM2-135M. Other work on the machine
slows down both the timings and the run.

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
from llmquant.models.skeleton import comparison_dtype
from llmquant.planning.held_out import num_windows, window_length
from llmquant.planning.linears import LinearPlan
from llmquant.planning.plan import Plan
from llmquant.solver.gradients import MEASURED_TOKENS
from llmquant.solver.output_hessian import GRADIENT_TOKENS
from llmquant.solver.quantize_linear import quantize_linears, round_without_data, storage_limits
from llmquant.spec import QuantSpec

MAX_COLUMNS = 1024
"""Largest K that is timed."""
MANY_ROWS, FEW_ROWS = 128, 32
"""Rows in the two timings of the rounding. The difference gives the time per row, and the rest is the time of factoring
the Hessian."""
MAX_TOKENS = 512
"""Tokens of the timed forward passes and statistics."""
FORWARD_OVERHEAD = 1.6
"""Time of a forward pass through a block / time of its matmuls. The rest is attention, norms, activations and
copies."""
FORWARD_BACKWARD = 3.0
"""Time of a forward and backward pass / time of a forward pass."""
MIN_SINGLE_TIMING_SECONDS = 0.05
"""Duration from which on a step is timed once. A shorter step is timed twice, because the first run warms up."""
HASHED_BYTES_PER_SECOND = 1.0e9
"""Speed of reading and SHA-256 on one core."""


@dataclass(frozen=True)
class DurationEstimate:
    """The estimated duration of a run, without downloads."""

    steps: Mapping[str, float]
    """Estimated seconds of each step of the run, by name."""

    @property
    def seconds(self) -> float:
        """Estimated seconds of all steps together."""
        return sum(self.steps.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the estimate as plain values, for JSON."""
        return {"predicted_seconds": self.seconds, "predicted_seconds_of_steps": dict(self.steps)}


@dataclass(frozen=True)
class _Shape:
    """The shapes and grids of the linears of one input group."""

    in_features: int
    """K of all linears."""
    out_features: tuple[int, ...]
    """N of each linear."""
    specs: tuple[QuantSpec, ...]
    """Grid of each linear."""
    adds_to_residual: bool
    """Whether the output is assumed to be added to the residual stream: true for a linear that shares no input."""


@dataclass
class _Seconds:
    """Seconds of each step for the linears of one input group."""

    forward: float = 0.0
    """Seconds per token of the forward pass."""
    statistics: float = 0.0
    """Seconds per token of the input statistics."""
    solving: float = 0.0
    """Seconds of quantizing all linears of the group."""


def estimate_duration(plan: Plan) -> DurationEstimate:
    """Estimate the duration of a run on the plan's device. This takes a second or two, and reads no weights."""
    steps: defaultdict[str, float] = defaultdict(float, hashing=plan.reader.total_bytes / HASHED_BYTES_PER_SECOND)
    tokens, recipe = plan.num_tokens, plan.recipe
    block_forward = 0.0
    shapes = Counter(_shapes(plan))
    for shape, count in shapes.items():
        seconds = _time_steps(plan, shape)
        block_forward += count * seconds.forward
        steps["statistics"] += count * seconds.statistics * tokens
        steps["solving"] += count * seconds.solving
    head = _head_seconds(plan, plan.skeleton.dtype)
    steps["forward"] = block_forward * tokens * (2 if recipe.needs_original else 1)
    if recipe.runs_backward:
        steps["gradients"] = FORWARD_BACKWARD * tokens * (block_forward + head)
    elif recipe.compensates_across_rows:
        steps["outputs"] = FORWARD_BACKWARD * min(tokens, GRADIENT_TOKENS) * block_forward
    if recipe.has_budget:
        steps["sensitivity"] = FORWARD_BACKWARD * min(tokens, MEASURED_TOKENS) * (block_forward + head)
    if plan.options.verify:
        # Both the result and the original model run through all blocks and the head.
        dtype, length = comparison_dtype(plan.skeleton.dtype, plan.skeleton.device), window_length(plan.config)
        compared = sum(count * _forward_seconds(plan, shape, dtype) for shape, count in shapes.items())
        steps["verifying"] = 2 * num_windows(length) * length * (compared + _head_seconds(plan, dtype))
    return DurationEstimate(dict(steps))


def input_groups(plan: Plan, index: int) -> list[list[LinearPlan]]:
    """Return the presumed input groups of a block: each fused set of an engine, and every other linear by itself."""
    linears = {linear.name: linear for linear in plan.linears_of_block(index).values()}
    groups = [tuple(names) for names in fused_sets(linears).values()]
    fused = {name for names in groups for name in names}
    return [[linears[name] for name in names] for names in (*groups, *((n,) for n in linears if n not in fused))]


def _shapes(plan: Plan) -> Iterator[_Shape]:
    """Yield the shapes of the input groups of all blocks."""
    for index in range(len(plan.block_names)):
        for members in input_groups(plan, index):
            yield _Shape(
                members[0].in_features,
                tuple(linear.out_features for linear in members),
                tuple(linear.quant_spec for linear in members),
                adds_to_residual=len(members) == 1,
            )


def _time_steps(plan: Plan, shape: _Shape) -> _Seconds:
    """Time the steps of an input group on random numbers, and scale the times to its real size."""
    device, dtype, recipe = plan.skeleton.device, plan.skeleton.dtype, plan.recipe
    columns = min(shape.in_features, MAX_COLUMNS)
    generator = torch.Generator(device=device).manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device)

    num_tokens = min(max(plan.num_tokens, 64), MAX_TOKENS)
    x_TK = random(num_tokens, columns).to(dtype)
    weight_NK = random(min(sum(shape.out_features), MAX_COLUMNS), columns)
    seconds = _Seconds(forward=_forward_seconds(plan, shape, dtype))
    if not recipe.needs_data:
        seconds.solving = _rounding_seconds(plan, shape, weight_NK)
        return seconds
    dense_NK = weight_NK.to(dtype)
    writer_NK = dense_NK if shape.adds_to_residual and recipe.needs_original else None
    statistics = InputStatistics(columns, device, writer_NK=writer_NK, exact=recipe.exact_hessian)
    original_TK = x_TK + 0.1 * random(num_tokens, columns).to(dtype) if recipe.needs_original else None
    drift_TN = random(num_tokens, len(dense_NK)) if writer_NK is not None and recipe.correct_residual_error else None
    measured = _time(lambda: statistics.add(x_TK, original_TK, drift_TN), device) / num_tokens
    seconds.statistics = measured * (shape.in_features / columns) ** 2
    if writer_NK is not None:
        statistics = InputStatistics(columns, device, exact=recipe.exact_hessian)
        statistics.add(x_TK, original_TK)
    seconds.solving = _solving_seconds(plan, shape, weight_NK, statistics)
    return seconds


def _rounding_seconds(plan: Plan, shape: _Shape, weight_NK: torch.Tensor) -> float:
    """Return the seconds of rounding all linears of an input group without data."""
    limits, wider = storage_limits(plan), shape.in_features / weight_NK.shape[1]
    total = 0.0
    for num_rows, spec in zip(shape.out_features, shape.specs, strict=True):
        rows_NK = weight_NK[: min(num_rows, MANY_ROWS)]
        measured = _time(lambda: round_without_data(rows_NK, spec, limits), plan.skeleton.device)  # noqa: B023
        total += measured * wider * num_rows / len(rows_NK)
    return total


def _solving_seconds(plan: Plan, shape: _Shape, weight_NK: torch.Tensor, statistics: InputStatistics) -> float:
    """Return the seconds of quantizing all linears of an input group from the statistics of its input.

    A few rows and more rows are timed. The difference gives the time per row, and the rest is the time of the Hessian,
    which grows with the cube of the width.
    """
    limits, wider = storage_limits(plan), shape.in_features / weight_NK.shape[1]
    rows = [min(num_rows, MANY_ROWS) for num_rows in shape.out_features]
    few, many = min(FEW_ROWS, min(rows)), min(max(rows), len(weight_NK))

    def measured(num_rows: int) -> float:
        weights, specs = {"w": weight_NK[:num_rows]}, {"w": shape.specs[0]}
        return _time(lambda: quantize_linears(weights, specs, statistics, plan.recipe, limits), plan.skeleton.device)

    first, second = measured(few), measured(many) if many > few else 0.0
    per_row = max(second - first, 0.0) / (many - few) if many > few else first / few
    hessian = max(first - few * per_row, 0.0)
    return hessian * wider**3 + per_row * wider * sum(shape.out_features)


def _forward_seconds(plan: Plan, shape: _Shape, dtype: torch.dtype) -> float:
    """Return the seconds per token of a forward pass through an input group, with its share of the block's other
    work."""
    return FORWARD_OVERHEAD * _matmul_seconds(plan.skeleton.device, dtype, shape.in_features, sum(shape.out_features))


def _head_seconds(plan: Plan, dtype: torch.dtype) -> float:
    """Return the seconds per token of the matmul of the LM head."""
    vocabulary, hidden = weight_of(plan.skeleton.model.get_input_embeddings()).shape
    return _matmul_seconds(plan.skeleton.device, dtype, hidden, vocabulary)


def _matmul_seconds(device: torch.device, dtype: torch.dtype, in_features: int, out_features: int) -> float:
    """Return the seconds per token of a matmul of many tokens with a weight of a given shape."""
    x_TK = torch.randn(MAX_TOKENS, min(in_features, MAX_COLUMNS), device=device).to(dtype)
    weight_NK = torch.randn(min(out_features, MAX_COLUMNS), x_TK.shape[1], device=device).to(dtype)
    scale = in_features * out_features / weight_NK.numel()
    return _time(lambda: x_TK @ weight_NK.T, device) * scale / len(x_TK)


def _time(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a call. A short call is repeated, and the second call counts, because the first warms
    up."""
    for _ in range(2):
        start = perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = perf_counter() - start
        if seconds > MIN_SINGLE_TIMING_SECONDS:
            break
    return seconds
