"""Coordinate descent that lowers the output error of a rounded weight, over its codes and scales in turn.

GPTQ rounds each column once, and only later columns can compensate for its error. A sweep of coordinate descent rounds
every column again, given the current codes of all others. With everything else fixed, the best integer levels of column
i are the nearest grid points to

    Q_i + (H (W - Q))_i / H_ii

so a sweep never makes `tr((W - Q) H (W - Q)^T)` larger. The scales have a closed form: with the codes fixed, Q is
linear in the scales of a row, so the best scales solve a small least-squares problem per row (G x G, G groups).

Letters: N out_features, K in_features, G groups, B columns of one block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmquant.algorithms.gptq import BLOCK_COLUMNS
from llmquant.algorithms.grid import QuantParams, as_stored, group_slices, values_on_grid
from llmquant.spec import QuantSpec
from llmquant.weight import group_of_column

MAX_SCALE_CHANGE = 0.3
"""Largest relative change of a scale. It is limited because the codes were chosen for the old scale."""
RIDGE = 1e-3
"""Fraction by which the diagonal of the normal equations is raised."""


def descend(
    target_KN: Tensor,
    q_KN: Tensor,
    grid: QuantParams,
    hessian_KK: Tensor,
    spec: QuantSpec,
    block_columns: int = BLOCK_COLUMNS,
) -> Tensor:
    """Return better integer levels, [K, N], after one sweep of coordinate descent over the columns.

    target_KN: the weight to approximate. q_KN: its integer levels so far. hessian_KK: damped, so that its diagonal is
    positive.
    """
    in_features = target_KN.shape[0]
    group_K = group_of_column(in_features, spec.group_size, target_KN.device).tolist()
    scale_GN, zero_GN = grid.scale_GN.to(target_KN.dtype), grid.zero_GN.to(target_KN.dtype)
    lowest_GN, highest_GN = -zero_GN, spec.max_code - zero_GN
    curvature = hessian_KK.diagonal().tolist()
    q_KN = q_KN.clone()
    # H (W - Q) is minus half the gradient of the objective with respect to Q.
    descent_KN = hessian_KK @ (target_KN - values_on_grid(q_KN, grid, spec))
    for start in range(0, in_features, block_columns):
        stop = min(start + block_columns, in_features)
        changes_BN = torch.empty_like(target_KN[start:stop])
        for column in range(start, stop):
            group = group_K[column]
            old_N = q_KN[column]
            new_N = torch.addcdiv(old_N, descent_KN[column], scale_GN[group], value=1 / curvature[column])
            new_N.round_().clamp_(min=lowest_GN[group], max=highest_GN[group])
            change_N = torch.mul(new_N - old_N, scale_GN[group], out=changes_BN[column - start])
            q_KN[column] = new_N
            # Only the later columns of the block need the update now; columns before this one are already rounded.
            descent_KN[column + 1 : stop].addr_(hessian_KK[column + 1 : stop, column], change_N, alpha=-1)
        descent_KN[stop:].addmm_(hessian_KK[stop:, start:stop], changes_BN, alpha=-1)
    return q_KN


def refit_scales(
    target_KN: Tensor, q_KN: Tensor, grid: QuantParams, hessian_KK: Tensor, spec: QuantSpec, scale_dtype: torch.dtype
) -> QuantParams:
    """Return the grid whose scales fit the target best for fixed codes, solved jointly for all groups of a row.

    The scales are rounded to scale_dtype; the zero-points do not change.
    """
    columns = list(group_slices(target_KN.shape[0], spec.group_size))
    num_groups, out_features = len(columns), target_KN.shape[1]
    descent_KN = hessian_KK @ (target_KN - values_on_grid(q_KN, grid, spec))
    normal_NGG = target_KN.new_zeros(out_features, num_groups, num_groups)
    right_NG = target_KN.new_zeros(out_features, num_groups)
    for group, own in enumerate(columns):
        product_KN = hessian_KK[:, own] @ q_KN[own]
        for other in range(group, num_groups):
            entry_N = (q_KN[columns[other]] * product_KN[columns[other]]).sum(0)
            normal_NGG[:, group, other] = normal_NGG[:, other, group] = entry_N
        right_NG[:, group] = (q_KN[own] * descent_KN[own]).sum(0)
    normal_NGG.diagonal(dim1=1, dim2=2).mul_(1 + RIDGE).add_(torch.finfo(target_KN.dtype).tiny)
    change_GN = torch.linalg.solve(normal_NGG.double(), right_NG.double()).to(target_KN.dtype).T
    limit_GN = MAX_SCALE_CHANGE * grid.scale_GN
    scale_GN = as_stored(grid.scale_GN + change_GN.clamp(min=-limit_GN, max=limit_GN), scale_dtype)
    return QuantParams(scale_GN, grid.zero_GN)
