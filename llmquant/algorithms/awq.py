"""AWQ's scale search (Lin et al. 2023, section 3.2), from statistics of the inputs.

Rounding errors matter most in the columns with the largest inputs. If those columns are multiplied by t > 1 and their
inputs divided by t, the product stays the same, and the rounding error of the columns shrinks relative to their
weights. The mean squared output error over the calibration tokens is, with Q for rounding to nearest,

    tr(E H E^T),   E = Q(W t) / t - W,   H = X^T X / T

so a scale is evaluated from W and H, without a run of the model. The candidates, for r = 0, 1/20 … 19/20, are

    t = mean|x|^r                 and ("duo scaling")         t = mean|x|^r / (mean normalised |w|)^(1 - r)

each divided by sqrt(max t * min t); t = 1 (no scaling) is always a candidate. A weight is normalised by the largest
weight of its row's group. All linears that read the input share the scale, and their errors are added.

The scale belongs to the rows of the producer, the norm or linear whose output becomes the input. One row may produce
several channels (heads that share a key-value head). The means are then taken over these channels, which share a scale.

Letters: N out_features, K in_features, R rows of the producer, S columns of one group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmquant.algorithms.grid import find_grid, group_slices, round_to_grid, values_on_grid
from llmquant.algorithms.statistics import output_errors
from llmquant.spec import QuantSpec

NUM_RATIOS = 20
"""Number of exponents r that are tried."""
SEARCH_ROWS = 512
"""Maximum number of rows of each weight that the search rounds. They are evenly spaced and represent the others."""
MAX_CHANNEL_SCALE = 2.0**10
"""Scales are clamped between this and its reciprocal."""
SMALLEST_MEAN = 1e-5
"""Means below this fraction of the largest mean are raised to it, since a channel hardly ever used needs no scale."""


@dataclass(frozen=True)
class ConsumerLinears:
    """Linears with the same `QuantSpec` that read the scaled input."""

    weight_NK: Tensor
    """Weights of the linears, concatenated along the rows, float32."""
    spec: QuantSpec
    """Grid of the linears."""
    hessian_KK: Tensor
    """Mean second moment of their input, float32."""
    mean_abs_K: Tensor
    """Mean absolute input of each column, float32."""
    row_K: Tensor
    """Row of the producer that makes each channel, int64; -1 for a channel that cannot be scaled."""


@dataclass(frozen=True)
class ScaleSearchResult:
    """The best scale of a search, and the output error with and without it."""

    scale_R: Tensor
    """Scale of each row of the producer, float32. Inputs are divided by it and columns multiplied by it. It is all ones
    if no candidate was better."""
    loss: float
    """Output error with this scale."""
    unscaled_loss: float
    """Output error without a scale."""


def scale_of_channels(scale_R: Tensor, row_K: Tensor) -> Tensor:
    """Return the scale of every input channel, [K], from the scales of the producer's rows; 1 where row_K is -1."""
    return torch.where(row_K >= 0, scale_R[row_K.clamp(min=0)], 1.0)


def search_scale(
    consumers: Sequence[ConsumerLinears],
    num_rows: int,
    scale_dtype: torch.dtype,
    min_zero: int = 0,
    range_steps: int = 0,
) -> ScaleSearchResult:
    """Find the scale of a producer's rows that leaves the least output error after rounding to nearest.

    num_rows: number of rows of the producer. scale_dtype, min_zero: dtype of the format's scales, and its smallest
    zero-point. range_steps: number of shrink factors tried for every group's range; 0 takes the extremes of the group.
    """
    strides = [-(-consumer.weight_NK.shape[0] // SEARCH_ROWS) for consumer in consumers]
    weights = [consumer.weight_NK[::stride].T.contiguous() for consumer, stride in zip(consumers, strides, strict=True)]

    def loss(scale_R: Tensor) -> float:
        total = 0.0
        for consumer, weight_KN in zip(consumers, weights, strict=True):
            scale_K = scale_of_channels(scale_R, consumer.row_K)
            error = scaled_error(
                weight_KN, scale_K, consumer.hessian_KK, consumer.spec, scale_dtype, min_zero, range_steps
            )
            # The skipped rows are assumed to have the same mean error as the sampled ones.
            total += error * consumer.weight_NK.shape[0] / weight_KN.shape[1]
        return total

    best_R = torch.ones(num_rows, device=consumers[0].weight_NK.device)
    unscaled = best = loss(best_R)
    for scale_R in candidate_scales(consumers, num_rows):
        trial = loss(scale_R)
        if trial < best:
            best, best_R = trial, scale_R
    return ScaleSearchResult(best_R, best, unscaled)


def candidate_scales(consumers: Sequence[ConsumerLinears], num_rows: int) -> Iterator[Tensor]:
    """Yield every scale_R to try, float32 [R]; rows that make no channel keep 1."""
    device = consumers[0].weight_NK.device
    count_R = torch.zeros(num_rows, device=device)
    sum_of_inputs_R, sum_of_weights_R = torch.zeros_like(count_R), torch.zeros_like(count_R)
    for consumer in consumers:
        known_K = consumer.row_K >= 0
        rows = consumer.row_K[known_K]
        # Each consumer is weighted by its number of rows, as if all were one matrix.
        size = float(consumer.weight_NK.shape[0])
        count_R.index_add_(0, rows, torch.full_like(rows, size, dtype=torch.float32))
        sum_of_inputs_R.index_add_(0, rows, size * consumer.mean_abs_K[known_K])
        sum_of_weights_R.index_add_(0, rows, size * normalised_weight(consumer.weight_NK, consumer.spec)[known_K])
    used_R = count_R > 0
    if not used_R.any():
        return
    input_R = _floored(sum_of_inputs_R / count_R.clamp(min=1), used_R)
    weight_R = _floored(sum_of_weights_R / count_R.clamp(min=1), used_R)
    for step in range(NUM_RATIOS):
        ratio = step / NUM_RATIOS
        for scale_R in (input_R**ratio, input_R**ratio / weight_R ** (1 - ratio)):
            used = scale_R[used_R]
            scale_R = (scale_R / (used.max() * used.min()).sqrt()).clamp(1 / MAX_CHANNEL_SCALE, MAX_CHANNEL_SCALE)
            yield torch.where(used_R, scale_R, 1.0)


def normalised_weight(weight_NK: Tensor, spec: QuantSpec) -> Tensor:
    """Return the mean over the rows of |w| / (largest |w| in the group of the row), float32 [K]."""
    mean_K = torch.empty(weight_NK.shape[1], device=weight_NK.device)
    for columns in group_slices(weight_NK.shape[1], spec.group_size):
        group_NS = weight_NK[:, columns].abs()
        largest_N1 = group_NS.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        mean_K[columns] = (group_NS / largest_N1).mean(0)
    return mean_K


def _floored(mean_R: Tensor, used_R: Tensor) -> Tensor:
    return mean_R.clamp(min=max(SMALLEST_MEAN * mean_R[used_R].max().item(), torch.finfo(torch.float32).tiny))


def scaled_error(
    weight_KN: Tensor,
    scale_K: Tensor,
    hessian_KK: Tensor,
    spec: QuantSpec,
    scale_dtype: torch.dtype,
    min_zero: int = 0,
    range_steps: int = 0,
) -> float:
    """Return tr(E H E^T) for the error E of rounding W t to nearest and dividing by t again."""
    scaled_KN = weight_KN * scale_K[:, None]
    importance_K = hessian_KK.diagonal() / scale_K.square() if range_steps else None
    grid = find_grid(scaled_KN, importance_K, spec, scale_dtype, min_zero, range_steps)
    rounded_KN = values_on_grid(round_to_grid(scaled_KN, grid, spec), grid, spec)
    return output_errors(rounded_KN / scale_K[:, None] - weight_KN, hessian_KK).sum(dtype=torch.float64).item()
