"""The quantizer's column loops and range search on a GPU: the checks and launches of the kernels in `triton_solver.py`.

Each function has the contract of its PyTorch form in `algorithms/`, which the tests compare it with.

Letters: N out_features, K in_features, G groups, B columns of a panel.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from llmquant.kernels import gpu
from llmquant.kernels.layout import LinearShape
from llmquant.spec import QuantSpec

PANEL_COLUMNS = 128
"""Columns that one launch rounds. Their effect on the later columns is applied in one matrix product."""
PANEL_ROWS = 16
"""Rows of one program of the column loop."""
SEARCH_ROWS, SEARCH_COLUMNS = 32, 32
"""Rows of one program of the range search, and columns that it reads at a time."""

SCALE_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Dtypes of scales, as the kernel of the range search numbers them."""


def can_run(weight: Tensor) -> bool:
    """Whether the kernels can round this weight: float32 on an NVIDIA GPU that Triton supports."""
    return weight.dtype == torch.float32 and refuses(weight.device) is None


def refuses(device: torch.device) -> str | None:
    """Return why the kernels cannot run on this device, or None if they can."""
    return _refusal(device, os.environ.get("TRITON_INTERPRET"))


@lru_cache(maxsize=64)
def _refusal(device: torch.device, interpreted: str | None) -> str | None:
    return gpu.refuses(LinearShape.of_sizes(64, 128, QuantSpec()), device, torch.bfloat16)


@lru_cache(maxsize=64)
def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return values in float32 on a device. They are kept, since a copy to a GPU waits for its queue."""
    return torch.tensor(values, dtype=torch.float32, device=device)


class PanelGrid(NamedTuple):
    """The grid of the columns of one panel."""

    group_B: Tensor
    """Group of each column, int64."""
    scale_GN: Tensor
    """Scales of all groups, float32, contiguous."""
    zero_GN: Tensor
    """Zero-points of all groups, float32, contiguous."""
    max_code: int
    """Largest code."""


def round_panel(values_BN: Tensor, upper_BB: Tensor, grid: PanelGrid, q_BN: Tensor, error_BN: Tensor) -> None:
    """Round the columns of one panel with GPTQ, one after the other (`algorithms/gptq.py:round_panel_torch`).

    values_BN, q_BN, error_BN: float32 [B, N], contiguous, with at most PANEL_COLUMNS columns. upper_BB: float32 with
    contiguous rows.
    """
    _launch_panel(values_BN, upper_BB, grid, None, q_BN, error_BN)


def descend_panel(
    descent_BN: Tensor, hessian_BB: Tensor, grid: PanelGrid, q_BN: Tensor, new_q_BN: Tensor, change_BN: Tensor
) -> None:
    """Round the columns of one panel again (`algorithms/coordinate_descent.py:descend_panel_torch`).

    descent_BN, q_BN, new_q_BN, change_BN: float32 [B, N], contiguous, with at most PANEL_COLUMNS columns. hessian_BB:
    float32, symmetric, with contiguous rows.
    """
    _launch_panel(descent_BN, hessian_BB, grid, q_BN, new_q_BN, change_BN)


def _launch_panel(
    values_BN: Tensor, matrix_BB: Tensor, grid: PanelGrid, old_q_BN: Tensor | None, q_BN: Tensor, error_BN: Tensor
) -> None:
    group_B, scale_GN, zero_GN, max_code = grid
    num_columns, num_rows = values_BN.shape
    assert num_columns <= PANEL_COLUMNS and matrix_BB.stride(1) == 1 and group_B.dtype == torch.int64
    tensors = (values_BN, scale_GN, zero_GN, q_BN, error_BN, values_BN if old_q_BN is None else old_q_BN)
    assert all(tensor.is_contiguous() and tensor.dtype == torch.float32 for tensor in tensors)
    kernels = _kernels()
    with torch.cuda.device_of(values_BN):  # Triton launches on the current GPU
        kernels.round_panel_kernel[(-(-num_rows // PANEL_ROWS),)](
            values_BN,
            values_BN if old_q_BN is None else old_q_BN,
            matrix_BB,
            group_B,
            scale_GN,
            zero_GN,
            q_BN,
            error_BN,
            num_rows,
            num_columns,
            matrix_BB.stride(0),
            float(max_code),
            DESCEND=old_q_BN is not None,
            B=PANEL_COLUMNS,
            R=PANEL_ROWS,
            num_warps=1,
        )


def search_ranges(
    weight_KN: Tensor,
    importance_K: Tensor,
    shrinks: list[float],
    *,
    group_size: int,
    symmetric: bool,
    max_code: int,
    mid_code: int,
    min_zero: int,
    scale_dtype: torch.dtype,
    scale_limits: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """Search the range of all groups in one launch; return scales and zero-points, float32 [G, N] each.

    weight_KN: float32 [K, N]. importance_K: float32 [K]. group_size: columns of a group, -1 for all. scale_limits:
    smallest and largest scale.
    """
    in_features, out_features = weight_KN.shape
    group_size = in_features if group_size == -1 else group_size
    num_groups = -(-in_features // group_size)
    scale_GN = weight_KN.new_empty(num_groups, out_features)
    zero_GN = torch.empty_like(scale_GN)
    kernels = _kernels()
    with torch.cuda.device_of(weight_KN):
        kernels.search_range_kernel[-(-out_features // SEARCH_ROWS), num_groups](
            weight_KN.contiguous(),
            importance_K.contiguous(),
            _on_device(tuple(shrinks), weight_KN.device),
            scale_GN,
            zero_GN,
            out_features,
            in_features,
            group_size,
            len(shrinks),
            float(max_code),
            float(min_zero),
            float(mid_code),
            *scale_limits,
            SYMMETRIC=symmetric,
            DTYPE=SCALE_DTYPES[scale_dtype],
            C=SEARCH_COLUMNS,
            R=SEARCH_ROWS,
            num_warps=1,
        )
    return scale_GN, zero_GN


@lru_cache(maxsize=1)
def _kernels():
    """Return the module of the kernels. The first call imports it, because Triton is not installed everywhere."""
    from llmquant.kernels import triton_solver

    return triton_solver
