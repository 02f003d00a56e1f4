"""Improve a rounded weight by coordinate descent on the true objective, codes and scales in turn.

GPTQ decides each column once, looking only at the columns still to come. Here every column is looked at again, with all
others as they now are: the best code of column i, everything else fixed, is the nearest grid point to

    q_i + (H (W - Q))_i / H_ii

which never makes `tr((W - Q) H (W - Q)^T)` larger. The scales have a closed form: with the codes fixed, Q is linear in
the scales of a row, so the best ones solve a small least-squares problem per row (G x G, G groups).

Letters: N out_features, K in_features, G groups, B columns of one block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmquant.algorithms.affine import Grid, group_slices, store, values_on_grid
from llmquant.algorithms.gptq import BLOCK_COLUMNS
from llmquant.spec import QuantSpec
from llmquant.weight import group_of_column

# A scale may move by this share of itself at most: the codes were chosen for the old one.
LARGEST_CHANGE = 0.3
RIDGE = 1e-3


def descend(
    target_KN: Tensor,
    steps_KN: Tensor,
    grid: Grid,
    hessian_KK: Tensor,
    spec: QuantSpec,
    block_columns: int = BLOCK_COLUMNS,
) -> Tensor:
    """One sweep of coordinate descent over the columns: better signed steps, [K, N].

    hessian_KK must have a positive diagonal (damped).
    """
    in_features = target_KN.shape[0]
    group_K = group_of_column(in_features, spec.group_size, target_KN.device).tolist()
    scale_GN, zero_GN = grid.scale_GN.to(target_KN.dtype), grid.zero_GN.to(target_KN.dtype)
    lowest_GN, highest_GN = -zero_GN, spec.max_code - zero_GN
    curvature = hessian_KK.diagonal().tolist()
    steps_KN = steps_KN.clone()
    pull_KN = hessian_KK @ (target_KN - values_on_grid(steps_KN, grid, spec))
    for start in range(0, in_features, block_columns):
        stop = min(start + block_columns, in_features)
        moved_BN = torch.empty_like(target_KN[start:stop])
        for column in range(start, stop):
            group = group_K[column]
            step_N = steps_KN[column]
            wanted_N = torch.addcdiv(step_N, pull_KN[column], scale_GN[group], value=1 / curvature[column])
            new_N = wanted_N.round_().clamp_(min=lowest_GN[group], max=highest_GN[group])
            move_N = torch.mul(new_N - step_N, scale_GN[group], out=moved_BN[column - start])
            steps_KN[column] = new_N
            # Columns before this one in the block have had their turn; their pull is brought up to date with the rest.
            pull_KN[column + 1 : stop].addr_(hessian_KK[column + 1 : stop, column], move_N, alpha=-1)
        pull_KN[stop:].addmm_(hessian_KK[stop:, start:stop], moved_BN, alpha=-1)
    return steps_KN


def refit_scales(
    target_KN: Tensor, steps_KN: Tensor, grid: Grid, hessian_KK: Tensor, spec: QuantSpec, scale_dtype: torch.dtype
) -> Grid:
    """The scales of all groups of a row that fit its target best with the codes fixed, rounded to scale_dtype."""
    columns = list(group_slices(target_KN.shape[0], spec.group_size))
    num_groups, out_features = len(columns), target_KN.shape[1]
    missing_KN = hessian_KK @ (target_KN - values_on_grid(steps_KN, grid, spec))
    normal_NGG = target_KN.new_zeros(out_features, num_groups, num_groups)
    right_NG = target_KN.new_zeros(out_features, num_groups)
    for group, own in enumerate(columns):
        reach_KN = hessian_KK[:, own] @ steps_KN[own]
        for other in range(group, num_groups):
            entry_N = (steps_KN[columns[other]] * reach_KN[columns[other]]).sum(0)
            normal_NGG[:, group, other] = normal_NGG[:, other, group] = entry_N
        right_NG[:, group] = (steps_KN[own] * missing_KN[own]).sum(0)
    normal_NGG.diagonal(dim1=1, dim2=2).mul_(1 + RIDGE).add_(torch.finfo(target_KN.dtype).tiny)
    change_GN = torch.linalg.solve(normal_NGG.double(), right_NG.double()).to(target_KN.dtype).T
    limit_GN = LARGEST_CHANGE * grid.scale_GN
    return Grid(store(grid.scale_GN + change_GN.clamp(min=-limit_GN, max=limit_GN), scale_dtype), grid.zero_GN)
