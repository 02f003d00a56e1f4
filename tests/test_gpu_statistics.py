"""Statistics with 16-bit products that are summed in float32, as on a GPU. A CPU computes such products in float32."""

from __future__ import annotations

import pytest
import torch

from llmquant.algorithms import statistics
from llmquant.algorithms.statistics import InputStatistics

TOKENS, IN_FEATURES, OUT_FEATURES = 4096, 12, 5


@pytest.fixture
def products_in_float32(monkeypatch):
    """Replace the products that a CPU cannot compute; count them."""
    calls = []

    def add_product(sums_KN, x_TK, y_TN):
        assert x_TK.dtype == y_TN.dtype and x_TK.itemsize == 2 and sums_KN.dtype == torch.float32
        calls.append(x_TK.dtype)
        return sums_KN.addmm_(x_TK.float().T, y_TN.float())

    monkeypatch.setattr(statistics, "add_product", add_product)
    monkeypatch.setattr(statistics, "sums_in_float32", lambda x: x.itemsize == 2)
    return calls


def collect(dtype, size, writer_NK=None, drift=None):
    generator = torch.Generator().manual_seed(0)
    x = size * (1 + 0.01 * torch.randn(TOKENS, IN_FEATURES, generator=generator))
    original = x + 0.05 * size
    sums = InputStatistics(IN_FEATURES, torch.device("cpu"), writer_NK=writer_NK)
    sums.add(x.to(dtype), original.to(dtype), drift)
    return sums


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [0.5, 30.0])
def test_sums_are_those_of_float32_inputs(dtype, size, products_in_float32):
    found = collect(dtype, size)
    assert products_in_float32, "the products were replaced"
    x = collect(dtype, size)
    exact = InputStatistics(IN_FEATURES, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    plain = size * (1 + 0.01 * torch.randn(TOKENS, IN_FEATURES, generator=generator))
    exact.add(plain.to(dtype).float(), (plain + 0.05 * size).to(dtype).float())
    weight_KN = torch.eye(IN_FEATURES)
    torch.testing.assert_close(x.hessian_KK, exact.hessian_KK, rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(found.moments_KN(weight_KN), exact.moments_KN(weight_KN), strict=True):
        assert torch.isfinite(ours).all()
        # The drift is rounded to the dtype of the inputs, unless that is float16.
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-3 * size**2)


def test_a_moment_with_a_float32_factor_keeps_its_precision(products_in_float32):
    generator = torch.Generator().manual_seed(1)
    x_TK = torch.randn(TOKENS, IN_FEATURES, generator=generator).bfloat16()
    y_TN = torch.randn(TOKENS, OUT_FEATURES, generator=generator)
    product_KN = statistics.product_with_float32(x_TK, y_TN)
    exact_KN = x_TK.double().T @ y_TN.double()
    rounded_KN = x_TK.double().T @ y_TN.bfloat16().double()
    assert len(products_in_float32) == 2
    error, rounded_error = ((value.double() - exact_KN).norm() for value in (product_KN, rounded_KN))
    assert error < rounded_error / 100
