"""The quantizer's Triton kernels in Triton's interpreter, compared with PyTorch (`test_solver_kernels.py`)."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmquant.algorithms.coordinate_descent import descend
from llmquant.algorithms.gptq import column_order, damped, factor_inverse, gptq_round
from llmquant.algorithms.grid import find_grid
from llmquant.kernels import solver
from llmquant.spec import QuantSpec

K, N = 150, 21
"""In_features and out_features: more than one panel, and neither a multiple of anything."""


@contextmanager
def by_torch(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(solver, "can_run", lambda weight: False)
        yield


def problem(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(K) + 0.3 * torch.randn(K, K, generator=generator)
    x = torch.randn(4 * K, K, generator=generator) @ mixing
    weight = 0.05 * torch.randn(K, N, generator=generator)
    weight[:, 3] = 0
    weight[5:9] *= 30
    return weight, x.T @ x / len(x)


DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SPECS = [
    QuantSpec(bits=4, group_size=64, symmetric=False),
    QuantSpec(bits=3, group_size=48, symmetric=True),
    QuantSpec(bits=8, group_size=-1, symmetric=False),
]


@pytest.mark.parametrize("spec", SPECS[:2], ids=QuantSpec.describe)
def test_column_loops_give_the_codes_of_the_torch_form(monkeypatch, spec):
    weight, hessian = problem()
    factor = factor_inverse(hessian, column_order(hessian))
    damped_hessian = damped(hessian, 0.01)
    with by_torch(monkeypatch):
        grid = find_grid(weight, None, spec, torch.float16)
        expected = gptq_round(weight, factor, grid, spec)
        expected_descent = descend(weight, expected, grid, damped_hessian, spec)
    assert solver.can_run(weight)
    q = gptq_round(weight, factor, grid, spec)
    assert torch.equal(q, expected)
    descent = descend(weight, q, grid, damped_hessian, spec)
    assert torch.equal(descent, expected_descent)
    assert not torch.equal(descent, q)


@pytest.mark.parametrize(("spec", "dtype"), list(zip(SPECS, DTYPES, strict=True)))
@pytest.mark.parametrize("min_zero", [0, 1])
def test_range_search_gives_the_grid_of_the_torch_form(monkeypatch, spec, dtype, min_zero):
    weight, hessian = problem(1)
    importance = hessian.diagonal().clone()
    importance[5:9] *= 1e-6  # the large weights do not matter, so the best range leaves them out
    arguments = (weight, importance, spec, dtype, min_zero, 5)
    with by_torch(monkeypatch):
        expected = find_grid(*arguments)
        unsearched = find_grid(weight, None, *arguments[2:])
    grid = find_grid(*arguments)
    assert torch.equal(grid.scale_GN, expected.scale_GN) and torch.equal(grid.zero_GN, expected.zero_GN)
    assert not torch.equal(grid.scale_GN, unsearched.scale_GN)


@pytest.mark.parametrize(("in_features", "out_features"), [(40, 21), (1, 3), (130, 1)])
def test_column_loops_of_small_weights(monkeypatch, in_features, out_features):
    weight, hessian = problem(2)
    weight = weight[:in_features, :out_features].contiguous()
    hessian = hessian[:in_features, :in_features].contiguous()
    spec = QuantSpec(bits=4, group_size=-1, symmetric=False)
    factor = factor_inverse(hessian, column_order(hessian))
    with by_torch(monkeypatch):
        grid = find_grid(weight, None, spec, torch.float16)
        expected = gptq_round(weight, factor, grid, spec)
    assert torch.equal(gptq_round(weight, factor, grid, spec), expected)


def test_a_value_that_is_not_a_number_shows_in_the_levels_of_its_row():
    weight, hessian = problem()
    spec = SPECS[0]
    grid = find_grid(weight, None, spec, torch.float16)
    weight[2, 4] = float("nan")
    q = gptq_round(weight, factor_inverse(hessian, column_order(hessian)), grid, spec)
    assert q[2, 4].isnan() and not q[:, :4].isnan().any() and not q[:, 5:].isnan().any()


def test_wrong_arguments_are_refused():
    weight, hessian = problem()
    grid = solver.PanelGrid(torch.zeros(K, dtype=torch.int64), torch.ones(1, N), torch.zeros(1, N), 15)
    with pytest.raises(AssertionError):
        solver.round_panel(weight, hessian, grid, torch.empty_like(weight), torch.empty_like(weight))
    few, grid = weight[:8], grid._replace(group_B=grid.group_B[:8])
    with pytest.raises(AssertionError):
        solver.round_panel(few, hessian[:8, :8].T, grid, few.T.clone().T, torch.empty_like(few))


class CountedOperations(TorchDispatchMode):
    """Counts the operations that compute something, which are launches on a GPU. Views compute nothing."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_a_linear_takes_at_most_one_percent_of_the_launches_of_the_torch_form(monkeypatch):
    weight, hessian = problem()
    weight, hessian = weight.repeat(4, 1)[:512], torch.block_diag(*[hessian] * 4)[:512, :512].contiguous()
    spec = QuantSpec(bits=4, group_size=128, symmetric=False)
    factor = factor_inverse(hessian, column_order(hessian))

    def quantize():
        grid = find_grid(weight, hessian.diagonal(), spec, torch.float16)
        descend(weight, gptq_round(weight, factor, grid, spec), grid, hessian, spec)

    with by_torch(monkeypatch), CountedOperations() as torch_form:
        quantize()
    launched = []
    with monkeypatch.context() as patch:
        patch.setattr(solver, "_launch_panel", lambda *arguments: launched.append("panel"))
        patch.setattr(solver, "search_ranges", lambda weight, *_, **__: launched.append("search") or _zeros(weight))
        with CountedOperations() as kernels:
            quantize()
    assert launched.count("search") == 1 and launched.count("panel") == 2 * 4
    assert len(launched) + kernels.count <= 0.01 * torch_form.count, (launched, kernels.count, torch_form.count)


def _zeros(weight):
    return weight.new_ones(4, weight.shape[1]), weight.new_zeros(4, weight.shape[1])
