"""Cross-row error compensation: the rows of a weight that are rounded later compensate for the errors of earlier rows.

GPTQ assumes that all outputs of a linear matter equally and independently. That is rarely true: an error in a query
matters only in the directions that the keys span, and vice versa. An error E of the weight costs

    tr(G E H E^T)

(the Kronecker form of the curvature, as in YAQA, Tseng et al. 2025). G is the output-side Hessian: the mean of g g^T,
with g the gradient of the loss at the linear's outputs. Let G = R^T R with R lower triangular. The cost of E then
equals the cost of R E under H alone. So the rows are rounded one row block after another. In block P, the values

    W_P + R_PP^-1 R_P,before E_before

are rounded instead of W_P, with E = W - Q. They compensate for the errors of the blocks before it. Within a block, the
rows are treated as independent. Important rows (large G_nn) come first, while many are left to compensate.

A measured G contains noise, and depends on the loss it was measured with. So it is tested before it is used. G is
measured on each of two splits of the text, and compensation with one must lower the cost under the other
(`OutputHessian.validated_factors`). If G is measured on one decoder block, the splits also differ in the channels of
the block's output (`solver/output_hessian.py`).

Letters: N out_features, K in_features, P rows of a row block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest

import torch
from torch import Tensor

from llmquant.algorithms.grid import QuantParams, values_on_grid
from llmquant.algorithms.statistics import add_product, sums_in_float32
from llmquant.spec import QuantSpec

MAX_SLICE_ROWS = 1024
"""Maximum number of rows that share one G. A linear with more rows is divided into slices, each with its own G."""
MAX_ROW_BLOCKS, MIN_BLOCK_ROWS = 16, 16
"""Maximum number of row blocks of a slice, and minimum number of rows of a block. Smaller blocks gain little."""
DAMPING = 0.3
"""Value added to the diagonal of G, as a fraction of the diagonal's mean."""


@dataclass(frozen=True)
class RowFactor:
    """The triangular factor of one G."""

    lower_NN: Tensor
    """R of G / mean(diag G) + damping = R^T R in processing order, float32."""
    order_N: Tensor
    """Row processed at each step, int64."""

    def row_blocks(self) -> list[range]:
        """Return the steps of each row block, in processing order."""
        rows = len(self.order_N)
        size = max(MIN_BLOCK_ROWS, -(-rows // MAX_ROW_BLOCKS))
        return [range(start, min(start + size, rows)) for start in range(0, rows, size)]


def factor_output_hessian(hessian_NN: Tensor, damping: float = DAMPING) -> RowFactor | None:
    """Factor a G, float32 [N, N]; None if it is zero, not finite, or cannot be factored."""
    factors = factor_output_hessians(hessian_NN[None], damping)
    return None if factors is None else factors[0]


def factor_output_hessians(hessian_SNN: Tensor, damping: float = DAMPING) -> list[RowFactor] | None:
    """Factor S matrices G of one size together, float32 [S, N, N]; None if `factor_output_hessian` of any is None."""
    diagonal_SN = hessian_SNN.diagonal(dim1=1, dim2=2)
    unit_S = diagonal_SN.mean(1)
    if not (torch.isfinite(hessian_SNN).all() & (unit_S > 0).all()):
        return None
    order_SN = torch.argsort(diagonal_SN, dim=1, descending=True, stable=True)
    # M, the flipped Cholesky factor of the flipped matrix, is upper triangular with G = M M^T; so R = M^T.
    flipped_SNN = _reordered(hessian_SNN, order_SN.flip(1)).double() / unit_S.double()[:, None, None]
    flipped_SNN.diagonal(dim1=1, dim2=2).add_(damping)
    lower_SNN, failed_S = torch.linalg.cholesky_ex(flipped_SNN)
    if failed_S.any():
        return None
    return [
        RowFactor(lower_NN.flip(0, 1).T.float().contiguous(), order_N)
        for lower_NN, order_N in zip(lower_SNN, order_SN, strict=True)
    ]


def _reordered(matrix_SNN: Tensor, order_SN: Tensor) -> Tensor:
    """Return symmetric matrices with their rows and columns in the given orders, int64 [S, N]."""
    rows_SNN = matrix_SNN.gather(1, order_SN[:, :, None].expand_as(matrix_SNN))
    return rows_SNN.gather(2, order_SN[:, None, :].expand_as(matrix_SNN))


def compensated_cost(factor: RowFactor, hessian_NN: Tensor) -> float:
    """Return the cost under hessian_NN of errors that were compensated with the factor of another G.

    The rounding errors are assumed to be independent and of unit variance. Without compensation they cost the trace of
    hessian_NN. With compensation, the errors of the weight are R^-1 diag(R_PP) times the rounding errors.
    """
    return compensated_costs([factor], hessian_NN[None]).item()


def compensated_costs(factors: Sequence[RowFactor], hessian_SNN: Tensor) -> Tensor:
    """Return the `compensated_cost` of several factors of one size, float32 [S], each under its own matrix."""
    lower_SNN = torch.stack([factor.lower_NN for factor in factors])
    own_SNN = torch.zeros_like(lower_SNN)
    for row_block in factors[0].row_blocks():
        inside = slice(row_block.start, row_block.stop)
        own_SNN[:, inside, inside] = lower_SNN[:, inside, inside]
    errors_SNN = torch.linalg.solve_triangular(lower_SNN, own_SNN, upper=False)
    ordered_SNN = _reordered(hessian_SNN, torch.stack([factor.order_N for factor in factors]))
    return ((ordered_SNN @ errors_SNN) * errors_SNN).sum((1, 2))


@dataclass(frozen=True)
class CrossRowFactors:
    """The factors with which the rows of one linear compensate for each other's errors."""

    factors: tuple[RowFactor, ...]
    """Factor of each of the linear's `row_slices`."""
    cost_ratio: float
    """Cost with compensation over the cost without it, for factors of one split evaluated on the other split."""

    def to(self, device: torch.device | str) -> CrossRowFactors:
        """Return the same factors on another device."""
        moved = (RowFactor(factor.lower_NN.to(device), factor.order_N.to(device)) for factor in self.factors)
        return CrossRowFactors(tuple(moved), self.cost_ratio)


class OutputHessian:
    """Running sums of g g^T over the gradients at one linear's outputs, float32, by split of the text and row slice."""

    def __init__(self, out_features: int, device: torch.device | str = "cpu") -> None:
        self._slices = row_slices(out_features)
        self._splits = [
            [torch.zeros(rows.stop - rows.start, rows.stop - rows.start, device=device) for rows in self._slices]
            for _ in range(2)
        ]

    def add(self, gradient_TN: Tensor, split: int) -> None:
        """Add the gradients at the outputs, floating point [T, N], to the sums of split 0 or 1."""
        for rows, sum_NN in zip(self._slices, self._splits[split], strict=True):
            some_TN = gradient_TN[:, rows]
            if sums_in_float32(some_TN):
                add_product(sum_NN, some_TN, some_TN)
            else:
                some_TN = some_TN.float()
                sum_NN.addmm_(some_TN.T, some_TN)

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums by name, in the form that is saved to a file."""
        return {f"{split}.{number}": sum_NN for split, number, sum_NN in self._numbered()}

    def add_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Add the sums of other tokens of the same linear, in the form that `tensors` returns."""
        for split, number, sum_NN in self._numbered():
            sum_NN += tensors[f"{split}.{number}"].to(sum_NN.device)

    def _numbered(self) -> Iterator[tuple[int, int, Tensor]]:
        for split, sums in enumerate(self._splits):
            for number, sum_NN in enumerate(sums):
                yield split, number, sum_NN

    @property
    def is_finite(self) -> bool:
        """Whether all sums are finite; a gradient that is too large overflows them."""
        return all(bool(torch.isfinite(sum_NN).all()) for _, _, sum_NN in self._numbered())

    def validated_factors(self, max_cost_ratio: float) -> CrossRowFactors | None:
        """Factor the sums of both splits together, or return None if the splits do not confirm each other.

        They confirm each other if the factor of each split lowers the cost under the other to less than max_cost_ratio,
        on average over both splits and all slices.
        """
        num_judged = 2 * len(self._slices)
        ratios = 0.0
        for measured, other in (self._splits, self._splits[::-1]):
            for batch in self._batches():
                factors = factor_output_hessians(torch.stack(measured[batch]))
                if factors is None:
                    return None
                other_SNN = torch.stack(other[batch])
                traces_S = other_SNN.diagonal(dim1=1, dim2=2).sum(1).clamp(min=1e-30)
                ratios += (compensated_costs(factors, other_SNN).double() / traces_S.double()).sum().item()
                if not ratios < max_cost_ratio * num_judged:
                    return None
        whole: list[RowFactor] = []
        for batch in self._batches():
            both_SNN = torch.stack(self._splits[0][batch]) + torch.stack(self._splits[1][batch])
            factors = factor_output_hessians(both_SNN)
            if factors is None:
                return None
            whole += factors
        return CrossRowFactors(tuple(whole), ratios / num_judged)

    def _batches(self) -> list[slice]:
        """Return the row slices that are factored together: on a GPU, neighbours of equal size; else each alone.

        A GPU needs about as long for one matrix as for several. On a CPU, the first slices often decide against
        compensation, and the rest need not be factored.
        """
        sizes = [rows.stop - rows.start for rows in self._slices]
        if not self._splits[0][0].is_cuda:
            return [slice(number, number + 1) for number in range(len(sizes))]
        bounds = [0, *(number for number in range(1, len(sizes)) if sizes[number] != sizes[number - 1]), len(sizes)]
        return [slice(*pair) for pair in pairwise(bounds)]


def row_slices(out_features: int) -> list[slice]:
    """Return the row slices of a linear, each with its own G: as few and as even as `MAX_SLICE_ROWS` allows."""
    count = -(-out_features // MAX_SLICE_ROWS)
    return [slice(*bounds) for bounds in pairwise(out_features * number // count for number in range(count + 1))]


def round_row_blocks(
    target_KN: Tensor,
    cross_row: CrossRowFactors,
    spec: QuantSpec,
    search: Callable[[Tensor], tuple[Tensor, QuantParams]],
) -> tuple[Tensor, QuantParams, Tensor]:
    """Round one row block after another, each compensating for the errors of the blocks before it.

    search: returns integer levels and grid for a target [K, P].

    Returns integer levels [K, N], their grid, and rounding_target_KN, the compensated values that were rounded.
    """
    q_KN, rounding_target_KN, error_KN = torch.empty_like(target_KN), target_KN.clone(), torch.zeros_like(target_KN)
    scale_GN = zero_GN = None
    starts = [rows.start for rows in row_slices(target_KN.shape[1])]
    for row_blocks in zip_longest(*(factor.row_blocks() for factor in cross_row.factors)):
        chosen = []
        for start, row_block, factor in zip(starts, row_blocks, cross_row.factors, strict=True):
            if row_block is None:
                continue
            row_N = factor.order_N + start
            now_P, before_N = row_N[row_block.start : row_block.stop], row_N[: row_block.start]
            if row_block.start:
                lower_PN = factor.lower_NN[row_block.start : row_block.stop]
                weight_PN = torch.linalg.solve_triangular(
                    lower_PN[:, row_block.start : row_block.stop], lower_PN[:, : row_block.start], upper=False
                )
                rounding_target_KN[:, now_P] += error_KN[:, before_N] @ weight_PN.T.to(target_KN.dtype)
            chosen.append(now_P)
        rows_P = torch.cat(chosen)
        q_KP, grid = search(rounding_target_KN[:, rows_P])
        if scale_GN is None or zero_GN is None:
            scale_GN = grid.scale_GN.new_empty(len(grid.scale_GN), target_KN.shape[1])
            zero_GN = grid.zero_GN.new_empty(len(grid.zero_GN), target_KN.shape[1])
        q_KN[:, rows_P], scale_GN[:, rows_P], zero_GN[:, rows_P] = q_KP, grid.scale_GN, grid.zero_GN
        error_KN[:, rows_P] = target_KN[:, rows_P] - values_on_grid(q_KP, grid, spec)
    assert scale_GN is not None and zero_GN is not None
    return q_KN, QuantParams(scale_GN, zero_GN), rounding_target_KN
