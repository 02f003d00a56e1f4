"""AWQ's scale search (Lin et al. 2023, section 3.2), from second moments alone.

Rounding hurts most in the columns with the largest inputs. Multiply those columns by t > 1 and divide their inputs by
it: the product is the same, the rounding error of the column shrinks relative to its weight. With Q for rounding to
nearest, the mean squared output error over the calibration tokens is

    tr(E H E^T),   E = Q(W t) / t - W,   H = X^T X / T

so the search needs W and H only, and never runs the network. Candidates, for r = 0, 1/20 … 19/20:

    t = mean|x|^r                            and ("duo")      t = mean|x|^r / (mean normalised |w|)^(1 - r)

each divided by sqrt(max t * min t); no scaling at all (t = 1) is always one of them. "Normalised" means by the largest
weight of the row's group. All linears that read the input share the scale: their errors are added.

The scale belongs to the rows that produce the input. Where one row makes several channels (heads that share a key-value
head), the means are taken over them, and so they get one scale.

Letters: N out_features, K in_features, R rows of the producer, S columns of one group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmquant.algorithms.affine import find_grid, group_slices, round_to_grid, values_on_grid
from llmquant.algorithms.statistics import output_errors
from llmquant.spec import QuantSpec

NUM_RATIOS = 20
SEARCH_ROWS = 512
"""Rows of each reader that the search looks at, evenly spread: they stand for the rest."""
LARGEST_SCALE = 2.0**10
SMALLEST_MEAN = 1e-5
"""Means below this fraction of the largest are raised to it: a channel that is hardly ever used needs no scale."""


@dataclass(frozen=True)
class Reader:
    """Linears of one grid that read the scaled input."""

    weight_NK: Tensor
    """Their weights, one below the other, float32."""
    spec: QuantSpec
    hessian_KK: Tensor
    """Mean second moment of its input, float32."""
    mean_abs_K: Tensor
    """Mean absolute input, float32."""
    row_K: Tensor
    """int64, the producer's row that makes each channel; -1 where it cannot be scaled."""

    def scale_K(self, scale_R: Tensor) -> Tensor:
        """The scale of every input channel, given those of the producer's rows."""
        return torch.where(self.row_K >= 0, scale_R[self.row_K.clamp(min=0)], 1.0)


@dataclass(frozen=True)
class Search:
    """What a search found."""

    scale_R: Tensor
    """float32: inputs are divided by it, columns multiplied. All ones where nothing was better."""
    loss: float
    """Output error with this scale."""
    plain_loss: float
    """Without any."""


def search_scale(
    readers: Sequence[Reader], num_rows: int, scale_dtype: torch.dtype, min_zero: int = 0, range_steps: int = 0
) -> Search:
    """The scale of a producer's rows that leaves the least output error after rounding to nearest.

    scale_dtype, min_zero: as the format stores its grid. range_steps: shrink factors tried for every group's range
    while searching, 0 for the plain extremes.
    """
    steps = [-(-reader.weight_NK.shape[0] // SEARCH_ROWS) for reader in readers]
    weights = [reader.weight_NK[::step].T.contiguous() for reader, step in zip(readers, steps, strict=True)]

    def loss(scale_R: Tensor) -> float:
        total = 0.0
        for reader, weight_KN in zip(readers, weights, strict=True):
            scale_K = reader.scale_K(scale_R)
            error = scaled_error(weight_KN, scale_K, reader.hessian_KK, reader.spec, scale_dtype, min_zero, range_steps)
            # The rows that are left out err as those that are looked at.
            total += error * reader.weight_NK.shape[0] / weight_KN.shape[1]
        return total

    best_R = torch.ones(num_rows, device=readers[0].weight_NK.device)
    plain = best = loss(best_R)
    for scale_R in candidate_scales(readers, num_rows):
        trial = loss(scale_R)
        if trial < best:
            best, best_R = trial, scale_R
    return Search(best_R, best, plain)


def candidate_scales(readers: Sequence[Reader], num_rows: int) -> Iterator[Tensor]:
    """Every scale_R to be tried, float32 [R]; rows that make no channel keep 1."""
    device = readers[0].weight_NK.device
    count_R = torch.zeros(num_rows, device=device)
    sum_of_inputs_R, sum_of_weights_R = torch.zeros_like(count_R), torch.zeros_like(count_R)
    for reader in readers:
        known_K = reader.row_K >= 0
        rows = reader.row_K[known_K]
        # Every reader counts with its number of rows, as if they were one matrix.
        size = float(reader.weight_NK.shape[0])
        count_R.index_add_(0, rows, torch.full_like(rows, size, dtype=torch.float32))
        sum_of_inputs_R.index_add_(0, rows, size * reader.mean_abs_K[known_K])
        sum_of_weights_R.index_add_(0, rows, size * normalised_weight(reader.weight_NK, reader.spec)[known_K])
    used_R = count_R > 0
    if not used_R.any():
        return
    input_R = _floored(sum_of_inputs_R / count_R.clamp(min=1), used_R)
    weight_R = _floored(sum_of_weights_R / count_R.clamp(min=1), used_R)
    for step in range(NUM_RATIOS):
        ratio = step / NUM_RATIOS
        for scale_R in (input_R**ratio, input_R**ratio / weight_R ** (1 - ratio)):
            used = scale_R[used_R]
            scale_R = (scale_R / (used.max() * used.min()).sqrt()).clamp(1 / LARGEST_SCALE, LARGEST_SCALE)
            yield torch.where(used_R, scale_R, 1.0)


def normalised_weight(weight_NK: Tensor, spec: QuantSpec) -> Tensor:
    """Mean over the rows of |w| / max|w| of its group, float32 [K]."""
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
    """tr(E H E^T) of rounding W t to nearest and dividing by t again."""
    scaled_KN = weight_KN * scale_K[:, None]
    importance_K = hessian_KK.diagonal() / scale_K.square() if range_steps else None
    grid = find_grid(scaled_KN, importance_K, spec, scale_dtype, min_zero, range_steps)
    rounded_KN = values_on_grid(round_to_grid(scaled_KN, grid, spec), grid, spec)
    return output_errors(rounded_KN / scale_K[:, None] - weight_KN, hessian_KK).sum(dtype=torch.float64).item()
