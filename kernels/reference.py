"""Backend `torch`, the definition of the result: y = x @ W.T + bias with W = scale * (code - zero), in plain torch.

Every other backend is tested against this file. It supports any number of bits, any group size, a short last group and
act-order group indices, on any device, so it runs the linears that no other backend supports. A weight takes one byte.
During a call, the dense weight takes memory too.

Prepared tensors, in order: codes_NK uint8, scale_NG floating (as stored), zero_NG uint8, group_of_column_K int64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmquant.kernels.layout import LinearShape
from llmquant.weight import QuantizedWeight


def refuses(shape: LinearShape, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None: this backend runs every linear."""
    return None


def prepare(weight: QuantizedWeight, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Return the tensors of the weight on the device. The dtype is ignored; the scale keeps its stored dtype."""
    tensors = weight.codes_NK, weight.scale_NG, weight.zero_NG, weight.group_of_column_K
    return tuple(tensor.to(device).contiguous() for tensor in tensors)


def dequantize(prepared: tuple[Tensor, ...], shape: LinearShape, dtype: torch.dtype) -> Tensor:
    """Return the dense weight [N, K], computed in float32 and rounded once to dtype."""
    codes_NK, scale_NG, zero_NG, group_of_column_K = prepared
    q_NK = codes_NK.float() - zero_NG.float()[:, group_of_column_K]
    return (scale_NG.float()[:, group_of_column_K] * q_NK).to(dtype)


def restore(prepared: tuple[Tensor, ...], shape: LinearShape, group_K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the codes_NK, scale_NG and zero_NG that `prepare` got."""
    codes_NK, scale_NG, zero_NG, _ = prepared
    return codes_NK, scale_NG, zero_NG


def matmul(x: Tensor, prepared: tuple[Tensor, ...], bias_N: Tensor | None, shape: LinearShape) -> Tensor:
    """x [..., K] of any floating dtype -> y [..., N] in the same dtype."""
    return F.linear(x, dequantize(prepared, shape, x.dtype), bias_N)
