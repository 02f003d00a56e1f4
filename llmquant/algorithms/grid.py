"""The affine integer grid: `weight = scale * (code - zero)`, its range search, and round-to-nearest.

A grid is one scale and one integer zero-point per output row and group of input columns. Computations use the
transposed weight, weight_KN, in which the columns of a group are contiguous rows in memory.

Range search ("hessian"): each shrink factor p gives the grid of the range (p * lo, p * hi). For each row and group, the
grid with the least `sum_k H_kk (w_k - scale * (code_k - zero))^2` is kept. This sum is the output error that rounding
to nearest would cause if the input columns were uncorrelated.

The scale is rounded to the dtype it is stored in before any code is computed, so that no later cast moves a weight.

Letters: N out_features, K in_features, G groups, S columns of one group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llmquant.kernels import solver
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight, group_of_column

SHRINK_STEPS = 31
"""Number of shrink factors that the range search tries."""
SMALLEST_SHRINK = 0.4
"""The smallest shrink factor."""
# A symmetric grid has one code less on the positive side, so a slightly larger scale is sometimes better.
LARGEST_SYMMETRIC_SHRINK = 1.08
# The reciprocal of a number below float32's normal range can overflow. Of the scale dtypes, only float16 has a much
# narrower range.
SMALLEST_SCALE, LARGEST_SCALE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
# A scale of this many smallest subnormals has 8 significant bits, like bfloat16. A smaller scale has fewer.
MIN_SUBNORMALS_PER_SCALE = 2**7


@dataclass(frozen=True)
class QuantParams:
    """Scales and zero-points of every group, float32 [G, N] each; the scales are exact in their storage dtype."""

    scale_GN: Tensor
    zero_GN: Tensor


def group_slices(in_features: int, group_size: int) -> Iterator[slice]:
    """Yield the column range of each group in order; the last one may be shorter."""
    step = in_features if group_size == -1 else group_size
    for start in range(0, in_features, step):
        yield slice(start, min(start + step, in_features))


def scale_limits(scale_dtype: torch.dtype) -> tuple[float, float]:
    """Return the smallest and largest scale of a dtype.

    They are 2^-24 and 65504 in float16, 2^-126 and about 2^128 in bfloat16 and float32.
    """
    return max(_smallest_subnormal(scale_dtype), SMALLEST_SCALE), min(torch.finfo(scale_dtype).max, LARGEST_SCALE)


def _smallest_subnormal(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).tiny * torch.finfo(dtype).eps


def whole_groups(in_features: int, group_size: int) -> Iterator[tuple[slice, slice]]:
    """Yield (columns, groups) of all groups of full size together, then of the shorter last group, if there are any."""
    step = in_features if group_size == -1 else min(group_size, in_features)
    num_full, rest = divmod(in_features, step)
    yield slice(0, num_full * step), slice(0, num_full)
    if rest:
        yield slice(num_full * step, in_features), slice(num_full, num_full + 1)


def as_stored(scale: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """Return the scale as it will be read back: within `scale_limits`, rounded to scale_dtype, in float32."""
    smallest, largest = scale_limits(scale_dtype)
    return scale.clamp(min=smallest, max=largest).to(scale_dtype).float()


def count_unfit_groups(weight_KN: Tensor, spec: QuantSpec, scale_dtype: torch.dtype) -> tuple[int, int]:
    """Count the groups whose weights are too small, and those whose weights are too large, for scales in scale_dtype.

    Weights below float32's normal range count as zeros, and groups of zeros are not counted.
    """
    smallest, largest = scale_limits(scale_dtype)
    finest = max(MIN_SUBNORMALS_PER_SCALE * _smallest_subnormal(scale_dtype), smallest)
    too_small = too_large = 0
    for columns, groups in whole_groups(weight_KN.shape[0], spec.group_size):
        weight_GSN = weight_KN[columns].unflatten(0, (groups.stop - groups.start, -1))
        low_GN, high_GN = extremes(weight_GSN, spec.symmetric)
        scale_GN = (high_GN - low_GN) / spec.max_code
        too_small += int(((scale_GN < finest) & (high_GN - low_GN >= SMALLEST_SCALE)).sum())
        too_large += int((scale_GN > largest).sum())
    return too_small, too_large


def extremes(weight_GSN: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return the lowest and highest value of each row and group, float32 [G, N] each, widened to contain 0.

    weight_GSN: columns of the groups; [S, N] for one group, which gives [N]. A group of zeros gets (-1, 1), so that its
    scale is a normal number and its codes are the zero-point.
    """
    low_N, high_N = weight_GSN.amin(-2).clamp_(max=0), weight_GSN.amax(-2).clamp_(min=0)
    if symmetric:
        high_N = torch.maximum(high_N, -low_N)
        low_N = -high_N
    dead_N = high_N <= low_N
    return low_N.masked_fill(dead_N, -1.0), high_N.masked_fill(dead_N, 1.0)


def grid_of_range(
    low_N: Tensor, high_N: Tensor, spec: QuantSpec, scale_dtype: torch.dtype, min_zero: int = 0
) -> tuple[Tensor, Tensor]:
    """Return scale and zero-point, float32 [N] each, of the grid that spans [low, high]."""
    scale_N = as_stored((high_N - low_N) / spec.max_code, scale_dtype)
    if spec.symmetric:
        return scale_N, torch.full_like(scale_N, float(spec.mid_code))
    return scale_N, torch.round(-low_N / scale_N).clamp_(min_zero, spec.max_code)


def integer_levels(weight: Tensor, scale: Tensor, zero: Tensor, max_code: int) -> Tensor:
    """Return the integer levels q = `code - zero` of the nearest grid points; `scale * q` is the rounded weight."""
    return torch.round(weight / scale).clamp_(min=-zero, max=max_code - zero)


def shrink_factors(spec: QuantSpec, num_steps: int = SHRINK_STEPS) -> list[float]:
    """Return the shrink factors that the range search tries after the range itself."""
    start = LARGEST_SYMMETRIC_SHRINK if spec.symmetric else 1.0
    return torch.linspace(start, SMALLEST_SHRINK, num_steps).tolist()


def search_range(
    weight_SN: Tensor,
    importance_S: Tensor,
    spec: QuantSpec,
    scale_dtype: torch.dtype,
    min_zero: int = 0,
    num_steps: int = SHRINK_STEPS,
) -> tuple[Tensor, Tensor]:
    """Search the range of one group; return its scale and zero-point, float32 [N] each.

    weight_SN: float32, the group's columns. importance_S: float32 weight of each column's squared error.
    """
    low_N, high_N = extremes(weight_SN, spec.symmetric)
    scale_N, zero_N = grid_of_range(low_N, high_N, spec, scale_dtype, min_zero)
    scratch_SN = torch.empty_like(weight_SN)

    def loss_N(scale_N: Tensor, zero_N: Tensor) -> Tensor:
        torch.div(weight_SN, scale_N, out=scratch_SN)
        scratch_SN.round_().clamp_(min=-zero_N, max=spec.max_code - zero_N)
        return importance_S @ scratch_SN.mul_(scale_N).sub_(weight_SN).square_()

    best_N = loss_N(scale_N, zero_N)
    for shrink in shrink_factors(spec, num_steps):
        trial_scale_N, trial_zero_N = grid_of_range(shrink * low_N, shrink * high_N, spec, scale_dtype, min_zero)
        trial_N = loss_N(trial_scale_N, trial_zero_N)
        better_N = trial_N < best_N
        best_N = torch.where(better_N, trial_N, best_N)
        scale_N = torch.where(better_N, trial_scale_N, scale_N)
        zero_N = torch.where(better_N, trial_zero_N, zero_N)
    return scale_N, zero_N


def find_grid(
    weight_KN: Tensor,
    importance_K: Tensor | None,
    spec: QuantSpec,
    scale_dtype: torch.dtype,
    min_zero: int = 0,
    num_steps: int = SHRINK_STEPS,
) -> QuantParams:
    """Return the grid of every group of a weight.

    importance_K: float32 weight of each column's squared error for the search of each range (`search_range`); None
    takes the extremes of the group without a search.
    """
    in_features, out_features = weight_KN.shape
    if importance_K is not None and solver.can_run(weight_KN):
        scale_GN, zero_GN = solver.search_ranges(
            weight_KN,
            importance_K,
            shrink_factors(spec, num_steps),
            group_size=spec.group_size,
            symmetric=spec.symmetric,
            max_code=spec.max_code,
            mid_code=spec.mid_code,
            min_zero=min_zero,
            scale_dtype=scale_dtype,
            scale_limits=scale_limits(scale_dtype),
        )
        return QuantParams(scale_GN, zero_GN)
    scale_GN = weight_KN.new_empty(spec.num_groups(in_features), out_features)
    zero_GN = torch.empty_like(scale_GN)
    if importance_K is None:
        for columns, groups in whole_groups(in_features, spec.group_size):
            weight_GSN = weight_KN[columns].unflatten(0, (groups.stop - groups.start, -1))
            low_GN, high_GN = extremes(weight_GSN, spec.symmetric)
            scale_GN[groups], zero_GN[groups] = grid_of_range(low_GN, high_GN, spec, scale_dtype, min_zero)
    else:
        # One group at a time fits in the cache of a processor.
        for group, columns in enumerate(group_slices(in_features, spec.group_size)):
            scale_GN[group], zero_GN[group] = search_range(
                weight_KN[columns], importance_K[columns], spec, scale_dtype, min_zero, num_steps
            )
    return QuantParams(scale_GN, zero_GN)


def round_to_grid(weight_KN: Tensor, grid: QuantParams, spec: QuantSpec) -> Tensor:
    """Round to nearest; return the integer levels `code - zero`, float32 [K, N]."""
    q_KN = torch.empty_like(weight_KN)
    for columns, groups in whole_groups(weight_KN.shape[0], spec.group_size):
        sizes = (groups.stop - groups.start, -1)
        weight_GSN, q_GSN = weight_KN[columns].unflatten(0, sizes), q_KN[columns].unflatten(0, sizes)
        zero_G1N = grid.zero_GN[groups][:, None]
        torch.div(weight_GSN, grid.scale_GN[groups][:, None], out=q_GSN)
        q_GSN.round_().clamp_(min=-zero_G1N, max=spec.max_code - zero_G1N)
    return q_KN


def values_on_grid(q_KN: Tensor, grid: QuantParams, spec: QuantSpec) -> Tensor:
    """Return the weights that integer levels stand for, float32 [K, N]: `scale * q`."""
    group_K = group_of_column(q_KN.shape[0], spec.group_size, q_KN.device)
    return q_KN * grid.scale_GN[group_K]


def to_quantized_weight(q_KN: Tensor, grid: QuantParams, spec: QuantSpec, scale_dtype: torch.dtype) -> QuantizedWeight:
    """Return the `QuantizedWeight` of integer levels and their grid."""
    group_K = group_of_column(q_KN.shape[0], spec.group_size, q_KN.device)
    codes_KN = (q_KN + grid.zero_GN[group_K]).to(torch.uint8)
    return QuantizedWeight(
        codes_NK=codes_KN.T.contiguous(),
        scale_NG=grid.scale_GN.T.to(scale_dtype).contiguous(),
        zero_NG=grid.zero_GN.T.to(torch.uint8).contiguous(),
        spec=spec,
    )


def round_to_nearest(
    weight_NK: Tensor, spec: QuantSpec, scale_dtype: torch.dtype, min_zero: int = 0
) -> QuantizedWeight:
    """Round to nearest on the extremes of each group (RTN), without data: the baseline that every method must beat."""
    weight_KN = weight_NK.float().T.contiguous()
    grid = find_grid(weight_KN, None, spec, scale_dtype, min_zero)
    return to_quantized_weight(round_to_grid(weight_KN, grid, spec), grid, spec, scale_dtype)
