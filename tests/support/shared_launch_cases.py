"""Tests of joined weights with the Triton kernels, in Triton's interpreter on the CPU. `test_fused_linears.py` runs
this file.

It runs in a process of its own, because TRITON_INTERPRET=1 must be set before the kernels are imported.
"""

from __future__ import annotations

import pytest
import torch
from kernel_cases import CPU, exact_product, random_weight, relative_error
from torch import Tensor, nn

from llmquant.kernels import gpu
from llmquant.kernels.layout import LinearShape
from llmquant.runtime.linear import QuantizedLinear
from llmquant.runtime.shared_launch import share_launches
from llmquant.weight import QuantizedWeight

CASES: dict[str, list[dict]] = {
    "padding between the weights": [{"out_features": n, "in_features": 256} for n in (128, 100, 64, 33)],
    "groups of 32 and a ragged K": [{"out_features": n, "in_features": 208, "group_size": 32} for n in (64, 128)],
    "one tile along K": [{"out_features": n, "in_features": 128, "group_size": 128} for n in (64, 70)],
    "split-K": [{"out_features": n, "in_features": 1152, "group_size": 128} for n in (64, 64)],
    "3 and 4 bits": [{"out_features": 64, "in_features": 256, "bits": bits} for bits in (3, 4)],
    "8 bits": [{"out_features": n, "in_features": 256, "bits": 8} for n in (64, 100)],
    "one act-order": [{"out_features": 64, "in_features": 256, "act_order": True}] * 2,
}


@pytest.fixture(autouse=True)
def _nan_memory_and_seed() -> None:
    """Fill new tensors with NaN, so that memory which a kernel does not write is noticed; and set a seed."""
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)


@pytest.fixture(params=CASES.values(), ids=CASES)
def weights(request: pytest.FixtureRequest) -> list[QuantizedWeight]:
    return [random_weight(**case, symmetric=False) for case in request.param]


def test_the_views_are_the_weights(weights: list[QuantizedWeight]) -> None:
    shapes = [LinearShape.of(weight) for weight in weights]
    prepared = [gpu.prepare(weight, torch.float16, CPU) for weight in weights]
    x = torch.randn(3, weights[0].in_features).half()
    before = [gpu.matmul(x, each, None, shape) for each, shape in zip(prepared, shapes, strict=True)]
    dense = [gpu.dequantize(each, shape, torch.float16) for each, shape in zip(prepared, shapes, strict=True)]
    _, views = gpu.join_weights(prepared)
    for weight, shape, view, y, weight_NK in zip(weights, shapes, views, before, dense, strict=True):
        assert torch.equal(gpu.matmul(x, view, None, shape), y)
        assert torch.equal(gpu.dequantize(view, shape, torch.float16), weight_NK)
        codes_NK, scale_NG, zero_NG = gpu.restore(view, shape, weight.group_of_column_K)
        assert torch.equal(codes_NK, weight.codes_NK) and torch.equal(zero_NG, weight.zero_NG)
        assert torch.equal(scale_NG.float(), weight.scale_NG.float())


class Readers(nn.Module):
    """A model of linears that read one tensor."""

    device = CPU

    def __init__(self, weights: list[QuantizedWeight]) -> None:
        super().__init__()
        biases = [torch.randn(weight.out_features) for weight in weights]
        self.linears = nn.ModuleList(
            QuantizedLinear(weight, bias_N, dtype=torch.float16, device=CPU, backend="triton")
            for weight, bias_N in zip(weights, biases, strict=True)
        )

    def forward(self, tokens_SL: Tensor, use_cache: bool = False) -> list[Tensor]:
        return self.outputs(torch.zeros(1, self.linears[0].in_features, dtype=torch.float16))

    def outputs(self, x: Tensor) -> list[Tensor]:
        return [linear(x) for linear in self.linears]


def test_one_launch_multiplies_by_all(weights: list[QuantizedWeight], monkeypatch: pytest.MonkeyPatch) -> None:
    model = Readers(weights)
    assert len(share_launches(model)) == 1
    launches: list[int] = []
    original = gpu.launch

    def launch(*arguments: object) -> Tensor:
        launches.append(arguments[3].out_features)  # type: ignore[attr-defined]
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(gpu, "launch", launch)
    x = torch.randn(5, weights[0].in_features).half()
    outputs = model.outputs(x)
    assert len(launches) == 1
    for weight, linear, y in zip(weights, model.linears, outputs, strict=True):
        assert relative_error(y, exact_product(x, weight, linear.bias.detach())) < 6e-4
