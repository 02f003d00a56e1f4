"""GPTQ rounding (Frantar et al. 2022, algorithm 1), with activation order and static groups.

Rounds the input columns of a weight one at a time and moves each column's error onto the columns still to come, so that
`tr((W - Q) H (W - Q)^T)` stays small: the squared error of the linear's output over the calibration tokens.

Order: columns by descending H_kk, the important ones first, while many columns are left to take up their error. Groups
and their grids stay those of the original order ("static groups"), so the stored weight needs no permutation.

Factor: with H + damp * mean(diag H) * I = M M^T, M upper triangular (the Cholesky factor of the flipped matrix, flipped
back), U = M^-1 is the upper factor of the inverse: (H + damping)^-1 = U^T U. The inverse itself is never formed.

Column i (the paper's loop):  e = (w_i - q_i) / U_ii,  w_j -= U_ij e  for every later column j.
A block of columns is finished before its errors are applied to the columns behind the block, in one product; that
changes the order of the arithmetic and nothing else (a test holds it code for code in float64).

Letters: N out_features, K in_features, G groups, B columns of one block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmquant.algorithms.affine import Grid
from llmquant.spec import QuantSpec
from llmquant.weight import group_of_column

BLOCK_COLUMNS = 128
DAMPING_LADDER = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Damping as a fraction of mean(diag H): where a matrix cannot be factored, the next step is tried."""


@dataclass(frozen=True)
class InverseFactor:
    """What GPTQ and the target correction need of one Hessian; shared by all linears that read the same input."""

    upper_KK: Tensor
    """U of (H + damping)^-1 = U^T U in processing order, float32 unless asked otherwise."""
    order_K: Tensor
    """int64, column processed at each step."""
    damping: float
    """The fraction of mean(diag H) that made the factorization succeed."""
    added_K: Tensor
    """What the diagonal was raised by, float [K], in the original column order."""


def column_order(hessian_KK: Tensor, by_activation: bool = True) -> Tensor:
    """Processing order of the columns, int64 [K]: by descending H_kk (stable), or as they are."""
    diagonal_K = hessian_KK.diagonal()
    if not by_activation:
        return torch.arange(len(diagonal_K), device=hessian_KK.device)
    return torch.argsort(diagonal_K, descending=True, stable=True)


def damping_unit(diagonal_K: Tensor, scale_K: Tensor | None = None) -> Tensor:
    """What the diagonal of a Hessian is raised by at a damping of 1, float [K]: its mean.

    scale_K: what AWQ divided the inputs by. Scaling levels the diagonal, and the mean with it; so it is the mean of the
    undivided inputs that counts, divided as they are: the damped problem stays the one it is without scales. Otherwise
    the targets of `targets.py` fit the noise of the calibration text.
    """
    if scale_K is None:
        return diagonal_K.mean().expand_as(diagonal_K)
    square_K = scale_K.to(diagonal_K.dtype).square()
    return (diagonal_K * square_K).mean() / square_K


def damped_diagonal(diagonal_K: Tensor, damping: float, scale_K: Tensor | None = None) -> Tensor:
    """The diagonal of a Hessian raised by a fraction of `damping_unit`, float [K]; 1 for a dead column."""
    raised_K = diagonal_K + damping * damping_unit(diagonal_K, scale_K)
    return torch.where(diagonal_K > 0, raised_K, torch.ones_like(diagonal_K))


def damped(hessian_KK: Tensor, damping: float, scale_K: Tensor | None = None) -> Tensor:
    """The Hessian with a `damped_diagonal`."""
    damped_KK = hessian_KK.clone()
    damped_KK.diagonal().copy_(damped_diagonal(hessian_KK.diagonal(), damping, scale_K))
    return damped_KK


def factor_inverse(
    hessian_KK: Tensor,
    order_K: Tensor,
    ladder: tuple[float, ...] = DAMPING_LADDER,
    dtype: torch.dtype = torch.float32,
    scale_K: Tensor | None = None,
) -> InverseFactor | None:
    """Factor the inverse of a Hessian, float32 [K, K], raising the damping along the ladder until it succeeds.

    scale_K: what AWQ divided the inputs by (`damping_unit`).

    A dead column (H_kk = 0: never an input) gets H_kk = 1, so that it is rounded on its own. None when the whole ladder
    fails or the Hessian is not finite.
    """
    if not torch.isfinite(hessian_KK).all():
        return None
    flipped_K = order_K.flip(0)
    flipped_KK = hessian_KK[flipped_K][:, flipped_K].double()
    diagonal_K = hessian_KK.diagonal().double()
    for damping in ladder:
        # Of matrices this large, no more than two are held in float64 at a time.
        flipped_KK.diagonal().copy_(damped_diagonal(diagonal_K, damping, scale_K)[flipped_K])
        lower_KK, failed = torch.linalg.cholesky_ex(flipped_KK)
        if failed.item() == 0:
            del flipped_KK
            # H = M M^T with M = flip(L), so U = M^-1 = flip(L^-1).
            inverse_KK = torch.eye(len(order_K), dtype=torch.float64, device=hessian_KK.device)
            torch.linalg.solve_triangular(lower_KK, inverse_KK, upper=False, out=inverse_KK)
            del lower_KK
            added_K = (damped_diagonal(diagonal_K, damping, scale_K) - diagonal_K).to(dtype)
            return InverseFactor(inverse_KK.to(dtype).flip(0, 1), order_K, damping, added_K)
    return None


def half_solve(factor: InverseFactor, rhs_KN: Tensor) -> Tensor:
    """U rhs, [K, N] in processing order: y^T y' = rhs^T (H + damping)^-1 rhs' for two of these."""
    return factor.upper_KK @ rhs_KN[factor.order_K].to(factor.upper_KK.dtype)


def finish_solve(factor: InverseFactor, half_KN: Tensor) -> Tensor:
    """(H + damping)^-1 rhs = U^T (U rhs) from its `half_solve`, [K, N] in the original column order."""
    result_KN = torch.empty_like(half_KN)
    result_KN[factor.order_K] = factor.upper_KK.T @ half_KN
    return result_KN


def gptq_round(
    weight_KN: Tensor,
    factor: InverseFactor,
    grid: Grid,
    spec: QuantSpec,
    block_columns: int = BLOCK_COLUMNS,
) -> Tensor:
    """Signed steps `code - zero`, [K, N] in the dtype of the weight.

    weight_KN: the values to be rounded, in the original column order. grid: static, of the original order.
    """
    in_features = weight_KN.shape[0]
    group_K = group_of_column(in_features, spec.group_size, weight_KN.device)[factor.order_K].tolist()
    scale_GN, zero_GN = grid.scale_GN.to(weight_KN.dtype), grid.zero_GN.to(weight_KN.dtype)
    lowest_GN, highest_GN = -zero_GN, spec.max_code - zero_GN
    upper_KK = factor.upper_KK.to(weight_KN.dtype)
    pivots = upper_KK.diagonal().tolist()

    remaining_KN = weight_KN[factor.order_K]
    ordered_steps_KN = torch.empty_like(remaining_KN)
    for start in range(0, in_features, block_columns):
        stop = min(start + block_columns, in_features)
        block_BN = remaining_KN[start:stop]
        error_BN = torch.empty_like(block_BN)
        for column in range(start, stop):
            row, group = column - start, group_K[column]
            value_N, scale_N = block_BN[row], scale_GN[group]
            step_N = torch.div(value_N, scale_N, out=ordered_steps_KN[column])
            step_N.round_().clamp_(min=lowest_GN[group], max=highest_GN[group])
            error_N = torch.addcmul(value_N, step_N, scale_N, value=-1, out=error_BN[row])
            error_N.div_(pivots[column])
            block_BN[row + 1 :].addr_(upper_KK[column, column + 1 : stop], error_N, alpha=-1)
        remaining_KN[stop:].addmm_(upper_KK[start:stop, stop:].T, error_BN, alpha=-1)
    steps_KN = torch.empty_like(ordered_steps_KN)
    steps_KN[factor.order_K] = ordered_steps_KN
    return steps_KN
