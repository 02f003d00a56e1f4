"""The definition: y = x @ W.T + bias with W = scale * (code - zero), in plain torch.

Every other backend is tested against this file. It takes any bits, any group size, a short last group and columns that
name their own group, on any device; it is also the backend of last resort. It costs one byte per weight, and the
whole dense weight for the time of a call.

Prepared tensors, in order: codes_NK uint8, scale_NG floating (as stored), zero_NG uint8, group_of_column_K int64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmquant.kernels.layout import LinearShape
from llmquant.weight import QuantizedWeight


def refuses(layer: LinearShape, device: torch.device, dtype: torch.dtype) -> str | None:
    """Nothing is refused."""
    return None


def prepare(weight: QuantizedWeight, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """The logical weight itself, on the device; dtype leaves no trace, the scale stays as it is stored."""
    tensors = weight.codes_NK, weight.scale_NG, weight.zero_NG, weight.group_of_column_K
    return tuple(tensor.to(device).contiguous() for tensor in tensors)


def dequantize(prepared: tuple[Tensor, ...], layer: LinearShape, dtype: torch.dtype) -> Tensor:
    """The dense weight [N, K]: computed in float32 and rounded once to dtype."""
    codes_NK, scale_NG, zero_NG, group_of_column_K = prepared
    step_NK = codes_NK.float() - zero_NG.float()[:, group_of_column_K]
    return (scale_NG.float()[:, group_of_column_K] * step_NK).to(dtype)


def restore(prepared: tuple[Tensor, ...], layer: LinearShape, group_K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """codes_NK, scale_NG and zero_NG as they were before `prepare`."""
    codes_NK, scale_NG, zero_NG, _ = prepared
    return codes_NK, scale_NG, zero_NG


def matmul(x_MK: Tensor, prepared: tuple[Tensor, ...], bias_N: Tensor | None, layer: LinearShape) -> Tensor:
    """x_MK of any floating dtype -> y_MN in the same dtype; leading dimensions of x are kept."""
    return F.linear(x_MK, dequantize(prepared, layer, x_MK.dtype), bias_N)
