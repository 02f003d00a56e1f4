"""What the Triton kernels compute, in PyTorch on the CPU, from the same tensors; `pretend_gpu` puts them in place.

Letters: M rows of x, N out_features, K in_features, S columns in slot order, B blocks of columns, G groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmquant.kernels import gpu
from llmquant.kernels.layout import LinearShape, join_planes


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
    """Do what `solver.search_ranges` does: the range of all groups, scale_GN and zero_GN."""
    assert len(shrinks) > 0
    columns = weight_KN.split(len(weight_KN) if group_size == -1 else group_size)
    weights = importance_K.split([len(values_SN) for values_SN in columns])
    found = []
    for values_SN, importance_S in zip(columns, weights, strict=True):
        low_N, high_N = values_SN.amin(0).clamp(max=0), values_SN.amax(0).clamp(min=0)
        if symmetric:
            high_N = torch.maximum(high_N, -low_N)
            low_N = -high_N
        candidates = []
        for shrink in (1.0, *shrinks):
            scale_N = (shrink * (high_N - low_N) / max_code).clamp(*scale_limits).to(scale_dtype).float()
            zero_N = (-shrink * low_N / scale_N).round().clamp(min_zero, max_code)
            zero_N = torch.full_like(scale_N, mid_code) if symmetric else zero_N
            q_SN = (values_SN / scale_N).round().clamp(-zero_N, max_code - zero_N)
            candidates.append((importance_S @ (q_SN * scale_N - values_SN).square(), scale_N, zero_N))
        losses, scales, zeros = (torch.stack(values) for values in zip(*candidates, strict=True))
        best_1N = losses.argmin(0, keepdim=True)
        found.append((scales.gather(0, best_1N)[0], zeros.gather(0, best_1N)[0]))
    scale_GN, zero_GN = (torch.stack(values) for values in zip(*found, strict=True))
    return scale_GN, zero_GN


def launch(
    x_MK: Tensor, prepared: tuple[Tensor, ...], bias_N: Tensor | None, shape: LinearShape, *tiles: object
) -> Tensor:
    """Do what `gpu.launch` does. The padding of x_MK to whole tiles meets weights that are 0."""
    y_MN = F.linear(x_MK.float(), dense_weight(prepared, shape, x_MK.shape[1]).float())
    return (y_MN if bias_N is None else y_MN + bias_N.float()).to(x_MK.dtype)


def dense_weight(prepared: tuple[Tensor, ...], shape: LinearShape, num_columns: int) -> Tensor:
    """Do what `gpu._dense_weight` does: the prepared tensors -> the weight [N, num_columns], columns in slot order."""
    words, meta, _, _, dtype_holder, _ = prepared
    codes_NS, (scale_NB, zero_NB) = gpu.unpack_words(words), gpu.unpack_meta(meta, dtype_holder.dtype)
    if shape.bits == 8:
        codes_NS, scale_NB, zero_NB = join_planes(codes_NS, scale_NB, zero_NB)
    columns_per_block = codes_NS.shape[1] // scale_NB.shape[1]
    scale_NS, zero_NS = (values.float().repeat_interleave(columns_per_block, dim=1) for values in (scale_NB, zero_NB))
    weight_NS = (scale_NS * (codes_NS.float() - zero_NS)).to(dtype_holder.dtype)
    return weight_NS[: shape.out_features, :num_columns]
