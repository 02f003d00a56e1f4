"""Every backend computes what `reference.py` defines, and the operator behind them behaves like an operator."""

from __future__ import annotations

import pytest
import torch

from llmquant.errors import UserError
from llmquant.kernels.dispatch import BACKENDS, choose_backend, explain_choice, matmul
from llmquant.kernels.layout import LinearShape
from llmquant.runtime.linear import QuantizedLinear
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

CPU = torch.device("cpu")


def random_weight(
    out_features: int,
    in_features: int,
    *,
    bits: int = 4,
    group_size: int = 64,
    symmetric: bool = True,
    moving: bool = False,
) -> QuantizedWeight:
    spec = QuantSpec(bits=bits, group_size=group_size, symmetric=symmetric)
    num_groups = spec.num_groups(in_features)
    generator = torch.Generator().manual_seed(out_features * 7919 + in_features)
    zero_NG = torch.randint(0, 2**bits, (out_features, num_groups), generator=generator, dtype=torch.uint8)
    group_index_K = torch.randint(0, num_groups, (in_features,), generator=generator) if moving else None
    return QuantizedWeight(
        codes_NK=torch.randint(0, 2**bits, (out_features, in_features), generator=generator, dtype=torch.uint8),
        # Exact in float16 and in bfloat16: what a kernel loses by rounding the scale is a test of its own.
        scale_NG=(torch.rand(out_features, num_groups, generator=generator) * 0.02 + 0.005).bfloat16().half(),
        zero_NG=torch.full_like(zero_NG, spec.mid_code) if symmetric else zero_NG,
        spec=spec,
        group_index_K=group_index_K,
    )


def relative_error(y: torch.Tensor, truth: torch.Tensor) -> float:
    return ((y.double() - truth).norm() / truth.norm()).item()


def truth(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ W.T + bias in float64."""
    group_K = weight.group_of_column_K
    step_NK = weight.codes_NK.double() - weight.zero_NG.double()[:, group_K]
    y = x.double() @ (weight.scale_NG.double()[:, group_K] * step_NK).T
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("name", BACKENDS)
def test_one_hot_rows_return_the_weight(name: str) -> None:
    weight = random_weight(48, 96, bits=4, group_size=32, symmetric=False)
    if (why := BACKENDS[name].refuses(LinearShape.of(weight), CPU, torch.bfloat16)) is not None:
        pytest.skip(why)
    linear = QuantizedLinear(weight, None, dtype=torch.bfloat16, device=CPU, backend=name)
    torch.testing.assert_close(linear(torch.eye(96).bfloat16()).T, weight.dequantize(torch.bfloat16))


def test_unknown_backend_is_a_user_error() -> None:
    with pytest.raises(UserError, match="not one of auto"):
        choose_backend(LinearShape.of(random_weight(16, 64)), CPU, torch.bfloat16, "cuda")


def test_environment_decides_where_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMQUANT_BACKEND", "torch")
    choice = explain_choice(LinearShape.of(random_weight(16, 64)), CPU, torch.bfloat16)
    assert choice.backend.name == "torch" and "LLMQUANT_BACKEND" in choice.reason


def test_operator_passes_opcheck() -> None:
    linear = QuantizedLinear(random_weight(16, 64), None, dtype=torch.float32, device=CPU, backend="torch")
    x = torch.randn(3, 64, requires_grad=True)
    torch.library.opcheck(matmul, (x, list(linear.prepared), None, "torch", linear.layer.as_ints()))


def test_gradient_of_the_input_is_that_of_the_dense_linear() -> None:
    weight = random_weight(16, 64)
    linear = QuantizedLinear(weight, torch.randn(16), dtype=torch.float32, device=CPU, backend="torch")
    x = torch.randn(3, 5, 64, requires_grad=True)
    linear(x).square().sum().backward()
    grad, x.grad = x.grad, None
    torch.nn.functional.linear(x, weight.dequantize(), linear.bias).square().sum().backward()
    torch.testing.assert_close(grad, x.grad)
