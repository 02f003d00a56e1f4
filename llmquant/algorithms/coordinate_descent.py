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
from llmquant.algorithms.grid import QuantParams, as_stored, group_slices, values_on_grid, whole_groups
from llmquant.kernels import solver
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
    group_K = group_of_column(in_features, spec.group_size, target_KN.device)
    scale_GN, zero_GN = grid.scale_GN.to(target_KN.dtype), grid.zero_GN.to(target_KN.dtype)
    new_q_KN = torch.empty_like(q_KN)
    # H (W - Q) is minus half the gradient of the objective with respect to Q.
    descent_KN = hessian_KK @ (target_KN - values_on_grid(q_KN, grid, spec))
    descend_panel = solver.descend_panel if solver.can_run(target_KN) else descend_panel_torch
    for start in range(0, in_features, block_columns):
        stop = min(start + block_columns, in_features)
        change_BN = torch.empty_like(target_KN[start:stop])
        descend_panel(
            descent_KN[start:stop],
            hessian_KK[start:stop, start:stop],
            solver.PanelGrid(group_K[start:stop], scale_GN, zero_GN, spec.max_code),
            q_KN[start:stop],
            new_q_KN[start:stop],
            change_BN,
        )
        descent_KN[stop:].addmm_(hessian_KK[stop:, start:stop], change_BN, alpha=-1)
    return new_q_KN


def descend_panel_torch(
    descent_BN: Tensor, hessian_BB: Tensor, grid: solver.PanelGrid, q_BN: Tensor, new_q_BN: Tensor, change_BN: Tensor
) -> None:
    """Round the columns of one panel again, one after the other, by PyTorch operations.

    On a GPU, `solver.descend_panel` replaces this. descent_BN: rows of H (W - Q), which are overwritten. hessian_BB:
    block of H on the diagonal. q_BN: integer levels so far. new_q_BN, change_BN: receive the new levels and the changes
    of the weight.
    """
    lowest_GN, highest_GN = -grid.zero_GN, grid.max_code - grid.zero_GN
    groups, curvatures = grid.group_B.tolist(), hessian_BB.diagonal().tolist()
    for column, (group, curvature) in enumerate(zip(groups, curvatures, strict=True)):
        old_N = q_BN[column]
        new_N = torch.addcdiv(old_N, descent_BN[column], grid.scale_GN[group], value=1 / curvature)
        new_N.round_().clamp_(min=lowest_GN[group], max=highest_GN[group])
        change_N = torch.mul(new_N - old_N, grid.scale_GN[group], out=change_BN[column])
        new_q_BN[column] = new_N
        # Only the later columns of the panel need the update now; columns before this one are already rounded.
        descent_BN[column + 1 :].addr_(hessian_BB[column + 1 :, column], change_N, alpha=-1)


def refit_scales(
    target_KN: Tensor, q_KN: Tensor, grid: QuantParams, hessian_KK: Tensor, spec: QuantSpec, scale_dtype: torch.dtype
) -> QuantParams:
    """Return the grid whose scales fit the target best for fixed codes, solved jointly for all groups of a row.

    The scales are rounded to scale_dtype; the zero-points do not change.
    """
    in_features, out_features = target_KN.shape
    num_groups = spec.num_groups(in_features)
    descent_KN = hessian_KK @ (target_KN - values_on_grid(q_KN, grid, spec))
    right_GN = sums_by_group(q_KN * descent_KN, spec.group_size)
    normal_GGN = target_KN.new_empty(num_groups, num_groups, out_features)
    for group, own in enumerate(group_slices(in_features, spec.group_size)):
        product_KN = hessian_KK[:, own] @ q_KN[own]
        normal_GGN[group] = sums_by_group(product_KN.mul_(q_KN), spec.group_size)
    # The system is symmetric. Taking one half of it twice keeps it so in spite of rounding.
    normal_NGG = normal_GGN.permute(2, 0, 1).triu()
    del normal_GGN
    normal_NGG += normal_NGG.triu(1).mT
    normal_NGG.diagonal(dim1=1, dim2=2).mul_(1 + RIDGE).add_(torch.finfo(target_KN.dtype).tiny)
    change_GN = torch.linalg.solve(normal_NGG.double(), right_GN.T.double()).to(target_KN.dtype).T
    limit_GN = MAX_SCALE_CHANGE * grid.scale_GN
    scale_GN = as_stored(grid.scale_GN + change_GN.clamp(min=-limit_GN, max=limit_GN), scale_dtype)
    return QuantParams(scale_GN, grid.zero_GN)


def sums_by_group(values_KN: Tensor, group_size: int) -> Tensor:
    """Return the sums over the columns of each group, [G, N]."""
    sums = [
        values_KN[columns].unflatten(0, (groups.stop - groups.start, -1)).sum(1)
        for columns, groups in whole_groups(values_KN.shape[0], group_size)
    ]
    return torch.cat(sums)
