"""Random quantized linears for the tests of kernels, and the results that they must give."""

from __future__ import annotations

import torch

from llmquant.runtime.linear import QuantizedLinear
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

CPU = torch.device("cpu")

SHAPES = {
    "small model": {"out_features": 192, "in_features": 576, "group_size": 64},
    "ragged M, N and K": {"out_features": 100, "in_features": 200, "group_size": 64, "symmetric": False},
    "one group": {"out_features": 40, "in_features": 100, "group_size": -1, "symmetric": False},
    "group 48 fits no block": {"out_features": 33, "in_features": 160, "group_size": 48, "symmetric": False},
    "group 4, half of every block empty": {"out_features": 70, "in_features": 36, "group_size": 4},
    "act-order": {"out_features": 64, "in_features": 256, "group_size": 64, "symmetric": False, "act_order": True},
    "float16 scales and zero-points": {
        "out_features": 64,
        "in_features": 256,
        "symmetric": False,
        "float16_scales": True,
    },
    "2 bits": {"out_features": 64, "in_features": 256, "bits": 2, "symmetric": False},
    "3 bits": {"out_features": 64, "in_features": 256, "bits": 3, "symmetric": False},
    "8 bits": {"out_features": 64, "in_features": 256, "bits": 8, "symmetric": False},
}
"""Arguments of `random_weight`, by the name of the case."""


def random_weight(
    out_features: int,
    in_features: int,
    *,
    bits: int = 4,
    group_size: int = 64,
    symmetric: bool = True,
    act_order: bool = False,
    float16_scales: bool = False,
) -> QuantizedWeight:
    """Return a weight with random codes, scales and zero-points.

    act_order: give each column a random group. float16_scales: use scales that bfloat16 would round; otherwise the
    scales are exact in float16 and in bfloat16.
    """
    spec = QuantSpec(bits=bits, group_size=group_size, symmetric=symmetric)
    num_groups = spec.num_groups(in_features)
    generator = torch.Generator().manual_seed(out_features * 7919 + in_features)
    zero_NG = torch.randint(0, 2**bits, (out_features, num_groups), generator=generator, dtype=torch.uint8)
    group_index_K = torch.randint(0, num_groups, (in_features,), generator=generator) if act_order else None
    scale_NG = torch.rand(out_features, num_groups, generator=generator) * 0.02 + 0.005
    return QuantizedWeight(
        codes_NK=torch.randint(0, 2**bits, (out_features, in_features), generator=generator, dtype=torch.uint8),
        scale_NG=scale_NG.half() if float16_scales else scale_NG.bfloat16().half(),
        zero_NG=torch.full_like(zero_NG, spec.mid_code) if symmetric else zero_NG,
        spec=spec,
        group_index_K=group_index_K,
    )


def llvm_linear(case: dict, dtype: torch.dtype = torch.bfloat16) -> QuantizedLinear:
    """Return a linear of backend `llvm` with a bias. `case` is one of SHAPES."""
    weight = random_weight(**case)
    bias = torch.linspace(-1, 1, weight.out_features).to(dtype)
    return QuantizedLinear(weight, bias, dtype=dtype, device=CPU, backend="llvm")


def exact_product(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x @ W.T + bias in float64."""
    group_K = weight.group_of_column_K
    q_NK = weight.codes_NK.double() - weight.zero_NG.double()[:, group_K]
    y = x.double() @ (weight.scale_NG.double()[:, group_K] * q_NK).T
    return y if bias is None else y + bias.double()


def relative_error(y: torch.Tensor, truth: torch.Tensor) -> float:
    """Return the Frobenius norm of y - truth divided by that of truth."""
    return ((y.double() - truth).norm() / truth.norm()).item()
