"""GPTQ rounding (Frantar et al. 2022, algorithm 1), with activation order and static groups.

GPTQ rounds the input columns of a weight one at a time, and changes the columns still to come so that they compensate
for each error. This keeps `tr((W - Q) H (W - Q)^T)` small: the squared error of the linear's output over the
calibration tokens.

Order: columns are rounded by descending H_kk, so that many columns remain to compensate for the important ones. Groups
and their grids stay those of the original order ("static groups"), so the stored weight needs no permutation.

Factor: let H + damp * mean(diag H) * I = M M^T with M upper triangular (the Cholesky factor of the flipped matrix,
flipped back). Then U = M^-1 is the upper factor of the inverse: (H + damping)^-1 = U^T U. The inverse is never formed.

Column i (the paper's loop):  e = (w_i - q_i) / U_ii,  w_j -= U_ij e  for every later column j.
All columns of a block are rounded before their errors are applied, in one product, to the columns after the block. This
changes only the order of the arithmetic (a test compares all codes in float64).

Letters: N out_features, K in_features, G groups, B columns of one block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmquant.algorithms.grid import QuantParams
from llmquant.kernels import solver
from llmquant.spec import QuantSpec
from llmquant.weight import group_of_column

BLOCK_COLUMNS = 128
"""Number of columns that are rounded before their errors are applied to the columns after them."""
INVERTED_COLUMNS = 256
"""Size of the triangular matrices that are inverted in one piece."""
DAMPING_LADDER = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Dampings as fractions of mean(diag H). If the factorization fails with one, the next is tried."""


@dataclass(frozen=True)
class InverseFactor:
    """The factor of one inverse Hessian, for GPTQ and the error correction; all linears of an input group share it."""

    upper_KK: Tensor
    """U of (H + damping)^-1 = U^T U in processing order, in the dtype given to `factor_inverse`."""
    order_K: Tensor
    """Column processed at each step, int64."""
    damping: float
    """Fraction of mean(diag H) at which the factorization succeeded."""
    added_K: Tensor
    """Increase of each diagonal entry, float [K], in the original column order."""


def column_order(hessian_KK: Tensor, by_activation: bool = True) -> Tensor:
    """Return the processing order of the columns, int64 [K]: by descending H_kk (stable), or as stored."""
    diagonal_K = hessian_KK.diagonal()
    if not by_activation:
        return torch.arange(len(diagonal_K), device=hessian_KK.device)
    return torch.argsort(diagonal_K, descending=True, stable=True)


def damping_unit(diagonal_K: Tensor, scale_K: Tensor | None = None) -> Tensor:
    """Return the increase of a Hessian's diagonal at a damping of 1, float [K]: the mean of the diagonal.

    scale_K: scale that AWQ divided the inputs by. The division makes the diagonal more even and changes its mean. So
    the mean of the undivided diagonal is used, divided by the squared scale. The damped problem is then the same as
    without scales. Otherwise the correction of `error_correction.py` would fit the noise of the calibration text.
    """
    if scale_K is None:
        return diagonal_K.mean().expand_as(diagonal_K)
    square_K = scale_K.to(diagonal_K.dtype).square()
    return (diagonal_K * square_K).mean() / square_K


def damped_diagonal(diagonal_K: Tensor, damping: float, scale_K: Tensor | None = None) -> Tensor:
    """Return the diagonal of a Hessian raised by a fraction of `damping_unit`, float [K]; 1 where it is 0."""
    raised_K = diagonal_K + damping * damping_unit(diagonal_K, scale_K)
    return torch.where(diagonal_K > 0, raised_K, torch.ones_like(diagonal_K))


def damped(hessian_KK: Tensor, damping: float, scale_K: Tensor | None = None) -> Tensor:
    """Return the Hessian with its `damped_diagonal`."""
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
    """Factor the inverse of a Hessian, float32 [K, K], with the first damping of the ladder at which this succeeds.

    scale_K: scale that AWQ divided the inputs by (`damping_unit`).

    A dead column (its input is always 0, so H_kk = 0) gets H_kk = 1, so that it is rounded on its own. Returns None if
    every damping of the ladder fails or the Hessian is not finite.
    """
    if not torch.isfinite(hessian_KK).all():
        return None
    flipped_K = order_K.flip(0)
    diagonal_K = hessian_KK.diagonal().double()
    for damping in ladder:
        # One matrix of this size is held in float64: it becomes its factor, and the factor its inverse. LAPACK stores
        # columns one after the other, and the transpose of a symmetric matrix is that matrix.
        lower_KK = hessian_KK[flipped_K][:, flipped_K].double().T
        lower_KK.diagonal().copy_(damped_diagonal(diagonal_K, damping, scale_K)[flipped_K])
        failed = torch.zeros((), dtype=torch.int32, device=lower_KK.device)
        torch.linalg.cholesky_ex(lower_KK, out=(lower_KK, failed))
        if failed.item() == 0:
            # H = M M^T with M = flip(L), so U = M^-1 = flip(L^-1).
            invert_lower_(lower_KK)
            inverse_KK = lower_KK.to(dtype, memory_format=torch.contiguous_format, copy=True)
            del lower_KK
            added_K = (damped_diagonal(diagonal_K, damping, scale_K) - diagonal_K).to(dtype)
            return InverseFactor(inverse_KK.flip(0, 1), order_K, damping, added_K)
        del lower_KK
    return None


def invert_lower_(lower_KK: Tensor) -> None:
    """Replace a lower triangular matrix, floating point [K, K], by its inverse.

    The inverse of [[A, 0], [B, C]] is [[A^-1, 0], [-C^-1 B A^-1, C^-1]], and A and C are divided further. This takes a
    third of the multiplications of a triangular solve with the identity, and a quarter of its memory.
    """
    if len(lower_KK) <= INVERTED_COLUMNS:
        identity_KK = torch.eye(len(lower_KK), dtype=lower_KK.dtype, device=lower_KK.device)
        lower_KK.copy_(torch.linalg.solve_triangular(lower_KK, identity_KK, upper=False))
        return
    half = len(lower_KK) // 2
    first, below, last = lower_KK[:half, :half], lower_KK[half:, :half], lower_KK[half:, half:]
    solved = torch.linalg.solve_triangular(last, below, upper=False)
    below.copy_(torch.linalg.solve_triangular(first, solved, upper=False, left=False)).neg_()
    del solved
    invert_lower_(first)
    invert_lower_(last)


def half_solve(factor: InverseFactor, rhs_KN: Tensor) -> Tensor:
    """Return y = U rhs, [K, N] in processing order: y^T y' = rhs^T (H + damping)^-1 rhs' for two right-hand sides."""
    return factor.upper_KK @ rhs_KN[factor.order_K].to(factor.upper_KK.dtype)


def finish_solve(factor: InverseFactor, half_KN: Tensor) -> Tensor:
    """Return (H + damping)^-1 rhs = U^T (U rhs) from its `half_solve`, [K, N] in the original column order."""
    return (factor.upper_KK.T @ half_KN)[torch.argsort(factor.order_K)]


def gptq_round(
    weight_KN: Tensor,
    factor: InverseFactor,
    grid: QuantParams,
    spec: QuantSpec,
    block_columns: int = BLOCK_COLUMNS,
) -> Tensor:
    """Round a weight with GPTQ; return its integer levels `code - zero`, [K, N] in the dtype of the weight.

    weight_KN: the values to round, in the original column order. grid: grid of the groups of that order.
    """
    in_features = weight_KN.shape[0]
    group_K = group_of_column(in_features, spec.group_size, weight_KN.device)[factor.order_K]
    scale_GN, zero_GN = grid.scale_GN.to(weight_KN.dtype), grid.zero_GN.to(weight_KN.dtype)
    upper_KK = factor.upper_KK.to(weight_KN.dtype)

    remaining_KN = weight_KN[factor.order_K]
    ordered_q_KN = torch.empty_like(remaining_KN)
    round_panel = solver.round_panel if solver.can_run(weight_KN) else round_panel_torch
    for start in range(0, in_features, block_columns):
        stop = min(start + block_columns, in_features)
        error_BN = torch.empty_like(remaining_KN[start:stop])
        round_panel(
            remaining_KN[start:stop],
            upper_KK[start:stop, start:stop],
            solver.PanelGrid(group_K[start:stop], scale_GN, zero_GN, spec.max_code),
            ordered_q_KN[start:stop],
            error_BN,
        )
        remaining_KN[stop:].addmm_(upper_KK[start:stop, stop:].T, error_BN, alpha=-1)
    return ordered_q_KN[torch.argsort(factor.order_K)]


def refuses_column_loops(device: torch.device) -> str | None:
    """Return why the kernels of the column loops cannot run on a device, or None if they can (`solver.refuses`)."""
    return solver.refuses(device)


def round_panel_torch(
    values_BN: Tensor, upper_BB: Tensor, grid: solver.PanelGrid, q_BN: Tensor, error_BN: Tensor
) -> None:
    """Round the columns of one panel, one after the other, by PyTorch operations.

    On a GPU, `solver.round_panel` replaces this. values_BN: the values to round, which are overwritten. upper_BB: block
    of U on the diagonal. q_BN, error_BN: receive the integer levels and the errors e.
    """
    lowest_GN, highest_GN = -grid.zero_GN, grid.max_code - grid.zero_GN
    groups, pivots = grid.group_B.tolist(), upper_BB.diagonal().tolist()
    for column, (group, pivot) in enumerate(zip(groups, pivots, strict=True)):
        value_N, scale_N = values_BN[column], grid.scale_GN[group]
        q_N = torch.div(value_N, scale_N, out=q_BN[column])
        q_N.round_().clamp_(min=lowest_GN[group], max=highest_GN[group])
        error_N = torch.addcmul(value_N, q_N, scale_N, value=-1, out=error_BN[column])
        error_N.div_(pivot)
        values_BN[column + 1 :].addr_(upper_BB[column, column + 1 :], error_N, alpha=-1)
