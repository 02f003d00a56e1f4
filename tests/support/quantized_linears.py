"""Quantized linears of backend `triton` on the CPU, alone and in small models.

The backend refuses the CPU unless TRITON_INTERPRET=1 is set.
"""

from __future__ import annotations

from typing import Any

import torch
from kernel_cases import random_weight
from tiny_models import ARCHITECTURES, random_model

from llmquant.models.blocks import is_linear, linear_shape, linears_of
from llmquant.runtime.linear import QuantizedLinear


def quantized(out_features: int, in_features: int = 128, *, bias: bool = False, **options: Any) -> QuantizedLinear:
    """Return a linear with a random weight. options: dtype or backend of the linear, else arguments of
    `random_weight`."""
    dtype, backend = options.pop("dtype", torch.bfloat16), options.pop("backend", "triton")
    weight = random_weight(out_features, in_features, symmetric=False, **options)
    bias_N = torch.linspace(-1, 1, out_features).to(dtype) if bias else None
    return QuantizedLinear(weight, bias_N, dtype=dtype, device="cpu", backend=backend).eval()


def quantized_model(family: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Return a small model with random quantized linears in its blocks, on the CPU with backend `triton`."""
    model = random_model(ARCHITECTURES[family](), dtype=dtype)
    head = model.get_output_embeddings()
    for name, linear in linears_of(model).items():
        if linear is head:
            continue
        out_features, in_features = linear_shape(linear)
        has_bias = linear._parameters.get("bias") is not None
        twin = quantized(out_features, in_features, bias=has_bias, group_size=32, dtype=dtype)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, twin)
    assert not any(is_linear(module) and module is not head for module in model.modules())
    return model
