"""The maths, each against its slow form or a hand-worked case."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmquant.algorithms import coordinate_descent
from llmquant.algorithms.coordinate_descent import descend, refit_scales
from llmquant.algorithms.error_correction import ShrinkageTerms, fit_correction, shrinkage_of
from llmquant.algorithms.gptq import column_order, factor_inverse, finish_solve, gptq_round, half_solve, invert_lower_
from llmquant.algorithms.grid import (
    SMALLEST_SHRINK,
    QuantParams,
    count_unfit_groups,
    find_grid,
    grid_of_range,
    round_to_grid,
    round_to_nearest,
    scale_limits,
    search_range,
    values_on_grid,
)
from llmquant.algorithms.statistics import PANEL_COLUMNS, InputStatistics, output_errors
from llmquant.solver import quantize_linear
from llmquant.solver.quantize_linear import StorageLimits, quantize_linears, round_without_data
from llmquant.spec import QuantSpec, Recipe

SPECS = [
    QuantSpec(bits=bits, group_size=group_size, symmetric=symmetric)
    for bits in (2, 3, 4, 8)
    for group_size in (16, 32, -1)
    for symmetric in (True, False)
]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def correlated_inputs(tokens: int, features: int, seed: int = 0) -> Tensor:
    """Inputs with a few high-activation and many correlated columns, as activations have."""
    mixed = random(tokens, features, seed=seed) + 2 * random(tokens, 4, seed=seed + 1) @ random(
        4, features, seed=seed + 2
    )
    return mixed * (1 + 3 * random(features, seed=seed + 3).abs())


# --- the grid --------------------------------------------------------------------------------------------------------


def test_symmetric_grid_by_hand():
    scale, zero = grid_of_range(torch.tensor([-3.0]), torch.tensor([3.0]), QuantSpec(bits=2), torch.float32)
    assert scale.item() == 2.0 and zero.item() == 2.0


def test_asymmetric_grid_by_hand():
    spec = QuantSpec(bits=4, symmetric=False)
    scale, zero = grid_of_range(torch.tensor([-5.0]), torch.tensor([10.0]), spec, torch.float32)
    assert scale.item() == 1.0 and zero.item() == 5.0


def test_min_zero_keeps_gptq_v1_storable():
    spec = QuantSpec(bits=4, symmetric=False)
    _, zero = grid_of_range(torch.tensor([0.0]), torch.tensor([15.0]), spec, torch.float32, min_zero=1)
    assert zero.item() == 1.0


@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.describe)
@pytest.mark.parametrize("in_features", [64, 40])  # 40: the last group is shorter
def test_round_to_nearest_is_the_nearest_grid_point(spec, in_features):
    weight = random(8, in_features)
    quantized = round_to_nearest(weight, spec, torch.float16)
    group = quantized.group_of_column_K
    scale, zero = quantized.scale_NG.float()[:, group], quantized.zero_NG.float()[:, group]
    candidates = scale[..., None] * (torch.arange(spec.max_code + 1) - zero[..., None])
    distance = (candidates - weight[..., None]).abs().amin(-1)
    assert torch.allclose((quantized.dequantize() - weight).abs(), distance, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_are_exact_in_the_dtype_they_are_stored_in(dtype):
    grid = find_grid(random(64, 8), torch.ones(64), QuantSpec(group_size=16), dtype)
    assert torch.equal(grid.scale_GN, grid.scale_GN.to(dtype).float())
    assert round_to_nearest(random(8, 64), QuantSpec(group_size=16), dtype).scale_NG.dtype == dtype


def test_group_of_zeros_comes_back_as_zeros():
    weight = random(4, 64)
    weight[1, 16:32] = 0
    for symmetric in (True, False):
        spec = QuantSpec(group_size=16, symmetric=symmetric)
        assert round_to_nearest(weight, spec, torch.float16).dequantize()[1, 16:32].abs().max() == 0


def test_range_search_equals_trying_every_range():
    spec, weight, importance = QuantSpec(bits=3, symmetric=False), random(16, 5), random(16, seed=1).square()
    scale, zero = search_range(weight, importance, spec, torch.float32, num_steps=7)
    for row in range(5):
        best = None
        for shrink in [1.0, *torch.linspace(1.0, SMALLEST_SHRINK, 7).tolist()]:
            low, high = shrink * weight[:, row].min().clamp(max=0), shrink * weight[:, row].max().clamp(min=0)
            step = (high - low) / 7
            offset = torch.round(-low / step).clamp(0, 7)
            values = step * (torch.clamp(torch.round(weight[:, row] / step) + offset, 0, 7) - offset)
            loss = (importance * (values - weight[:, row]).square()).sum().item()
            if best is None or loss < best[0]:
                best = (loss, step.item(), offset.item())
        assert scale[row].item() == pytest.approx(best[1], rel=1e-5) and zero[row].item() == best[2]


# --- GPTQ ------------------------------------------------------------------------------------------------------------


def gptq_column_by_column(
    weight_KN: Tensor, hessian_KK: Tensor, order: Tensor, grid: QuantParams, spec: QuantSpec
) -> Tensor:
    """The paper's algorithm as written: the whole inverse Hessian, eliminating one column after the other."""
    weight, q = weight_KN.clone(), torch.zeros_like(weight_KN)
    damped = hessian_KK + 0.01 * hessian_KK.diagonal().mean() * torch.eye(len(hessian_KK), dtype=hessian_KK.dtype)
    remaining = order.tolist()
    size = len(remaining) if spec.group_size == -1 else spec.group_size
    while remaining:
        inverse = torch.linalg.inv(damped[remaining][:, remaining])
        column, group = remaining[0], remaining[0] // size
        scale, zero = grid.scale_GN[group].to(weight.dtype), grid.zero_GN[group].to(weight.dtype)
        q[column] = torch.minimum(torch.maximum(torch.round(weight[column] / scale), -zero), spec.max_code - zero)
        error = (weight[column] - scale * q[column]) / inverse[0, 0]
        weight[remaining] -= inverse[:, :1] * error
        remaining = remaining[1:]
    return q


@pytest.mark.slow
@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.bits in (3, 4)], ids=QuantSpec.describe)
@pytest.mark.parametrize("by_activation", [True, False])
def test_blocked_equals_column_by_column_code_for_code(spec, by_activation):
    x = correlated_inputs(300, 100).double()  # K > 2 groups, and the last group is shorter
    hessian = x.T @ x / len(x)
    weight = random(100, 12, dtype=torch.float64)
    grid = find_grid(weight.float(), hessian.diagonal().float(), spec, torch.float32)
    order = column_order(hessian, by_activation)
    factor = factor_inverse(hessian, order, dtype=torch.float64)
    slow = gptq_column_by_column(weight, hessian, order, grid, spec)
    for block_columns in (1, 7, 16, 128):
        assert torch.equal(gptq_round(weight, factor, grid, spec, block_columns), slow)


@pytest.mark.parametrize("size", [1, 5, 256, 257, 700])
def test_lower_triangular_matrix_is_inverted_in_place(size):
    generator = torch.Generator().manual_seed(size)
    lower = torch.randn(size, size, dtype=torch.float64, generator=generator).tril(-1) / size**0.5
    lower += torch.eye(size, dtype=torch.float64) * (1 + torch.rand(size, dtype=torch.float64, generator=generator))
    inverse = lower.clone()
    invert_lower_(inverse)
    assert torch.equal(inverse, inverse.tril())
    torch.testing.assert_close(inverse @ lower, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)


def test_uncorrelated_inputs_make_gptq_round_to_nearest():
    spec, weight = QuantSpec(group_size=16), random(64, 8)
    hessian = torch.diag(random(64, seed=1).square() + 0.1)
    grid = find_grid(weight, None, spec, torch.float32)
    factor = factor_inverse(hessian, column_order(hessian))
    assert torch.equal(gptq_round(weight, factor, grid, spec), round_to_grid(weight, grid, spec))


def test_activation_order_processes_high_activation_columns_first():
    hessian = torch.diag(torch.tensor([1.0, 9.0, 4.0, 9.0]))
    assert column_order(hessian).tolist() == [1, 3, 2, 0]
    assert column_order(hessian, by_activation=False).tolist() == [0, 1, 2, 3]


def test_inverse_factor_is_the_upper_factor_of_the_inverse():
    x = correlated_inputs(200, 24)
    hessian = x.T @ x / len(x)
    order = column_order(hessian)
    factor = factor_inverse(hessian, order, dtype=torch.float64)
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(24, dtype=torch.float64)
    inverse = torch.linalg.inv(damped)[order][:, order]
    assert torch.allclose(factor.upper_KK.T @ factor.upper_KK, inverse, rtol=1e-6, atol=1e-9)
    rhs = random(24, 3, dtype=torch.float64)
    assert torch.allclose(damped @ finish_solve(factor, half_solve(factor, rhs)), rhs, atol=1e-8)


def test_damping_is_raised_until_the_factorization_succeeds():
    hessian = torch.eye(8)
    hessian[0, 1] = hessian[1, 0] = 1.05  # indefinite: damping .01 and .03 are not enough, .1 is
    factor = factor_inverse(hessian, column_order(hessian))
    assert factor.damping == 0.1
    assert factor_inverse(10 * hessian - 10 * torch.eye(8), column_order(hessian)) is None
    assert factor_inverse(hessian * float("nan"), column_order(hessian)) is None


def test_column_whose_input_is_always_zero_is_rounded_on_its_own():
    x = correlated_inputs(200, 32)
    x[:, 5] = 0
    hessian = x.T @ x / len(x)
    spec, weight = QuantSpec(group_size=16), random(32, 4)
    grid = find_grid(weight, None, spec, torch.float32)
    q = gptq_round(weight, factor_inverse(hessian, column_order(hessian)), grid, spec)
    assert torch.equal(q[5], round_to_grid(weight, grid, spec)[5])


# --- statistics and error correction ---------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [24, PANEL_COLUMNS + 40])
def test_statistics_are_the_moments_of_all_tokens(features):
    x, original, weight = random(90, features), random(90, features, seed=1), random(features, 6, seed=2)
    statistics = InputStatistics(features, torch.device("cpu"))
    for split, rows in enumerate((slice(0, 50), slice(50, 90))):
        statistics.add(x[rows], original[rows], split=split)
    assert statistics.num_tokens == 90
    assert torch.allclose(statistics.hessian_KK, x.T @ x / 90, atol=1e-5)
    assert torch.equal(statistics.hessian_KK, statistics.hessian_KK.T)
    for moment, rows in zip(statistics.moments_KN(weight), (slice(0, 50), slice(50, 90)), strict=True):
        expected = x[rows].T @ ((original - x)[rows] @ weight) / 90
        assert torch.allclose(moment, expected, rtol=1e-4, atol=1e-4)
    assert torch.allclose(statistics.mean_abs_K, x.abs().mean(0), atol=1e-5)


@pytest.mark.parametrize("with_original, with_gap", [(True, True), (True, False), (False, True)])
def test_moment_of_a_writer_to_the_residual_stream_counts_both_gaps(with_original, with_gap):
    x, original, gap, weight = random(90, 24), random(90, 24, seed=1), random(90, 6, seed=2), random(24, 6, seed=3)
    statistics = InputStatistics(24, torch.device("cpu"), writer_NK=weight.T)
    for split, rows in enumerate((slice(0, 50), slice(50, 90))):
        statistics.add(x[rows], original[rows] if with_original else None, gap[rows] if with_gap else None, split=split)
    missing = (original - x) @ weight * with_original + gap * with_gap
    assert torch.allclose(sum(statistics.moments_KN(weight)), x.T @ missing / 90, rtol=1e-4, atol=1e-4)


def test_without_inputs_of_the_original_model_there_is_no_moment():
    statistics = InputStatistics(24, torch.device("cpu"))
    statistics.add(random(90, 24))
    assert statistics.moments_KN(random(24, 6)) == []


@pytest.mark.parametrize("exact, least, most", [(True, 0, 1e-6), (False, 1e-5, 4e-3)])
def test_products_of_the_hessian_are_exact_or_rounded_to_the_inputs_dtype(exact, least, most):
    x = correlated_inputs(256, PANEL_COLUMNS + 40).bfloat16()
    statistics = InputStatistics(x.shape[1], torch.device("cpu"), exact=exact)
    for rows in x.split(64):
        statistics.add(rows)
    expected = x.double().T @ x.double() / len(x)
    worst = ((statistics.hessian_KK - expected).abs().max() / expected.abs().max()).item()
    assert least <= worst < most


def test_float16_inputs_do_not_overflow_the_hessian():
    statistics = InputStatistics(2, torch.device("cpu"))
    statistics.add(torch.full((10, 2), 60000.0, dtype=torch.float16))
    assert torch.allclose(statistics.hessian_KK, torch.full((2, 2), 3.6e9), rtol=1e-3)


def test_corrected_weight_is_the_least_squares_weight():
    x, weight = correlated_inputs(400, 20).double(), random(20, 5, dtype=torch.float64)
    original = x + 0.3 * random(400, 20, seed=9).double()
    gap = random(400, 5, seed=8).double()
    hessian = x.T @ x / 400
    factor = factor_inverse(hessian, column_order(hessian), ladder=(1e-12,))
    moment = x.T @ ((original - x) @ weight + gap) / 400
    correction, terms = fit_correction(factor, [moment])
    expected = torch.linalg.lstsq(x, original @ weight + gap).solution
    assert torch.allclose(weight + correction, expected, atol=1e-6) and shrinkage_of([terms]) == 1


@pytest.mark.parametrize("noise, lowest, highest", [(0.0, 0.95, 1.0), (25.0, 0.3, 0.9), (200.0, 0.0, 0.2)])
def test_shrinkage_of_a_correction_is_the_best_on_other_text(noise, lowest, highest):
    """One part of the error is the same on all text, the other is noise of the tokens that were fitted."""
    common, mixing = 0.2 * random(20, 5, seed=7).double(), random(20, 20, seed=9).double()

    def text(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = random(1000, 20, seed=seed).double() @ mixing
        return x, x @ common + noise * random(1000, 5, seed=seed + 50).double()

    splits = [text(seed) for seed in (1, 2)]
    hessian = sum(x.T @ x for x, _ in splits) / 2000
    factor = factor_inverse(hessian, column_order(hessian), ladder=(1e-12,), dtype=torch.float64)
    whole, terms = fit_correction(factor, [x.T @ missing / 2000 for x, missing in splits])
    shrinkage = shrinkage_of([terms])
    assert lowest <= shrinkage <= highest
    others = [text(seed) for seed in range(3, 43)]

    def error(correction: torch.Tensor) -> float:
        return sum((missing - x @ correction).square().mean().item() for x, missing in others)

    tried = [error(fraction * whole) for fraction in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert error(shrinkage * whole) <= min(tried) + 0.05 * (max(tried) - min(tried))


# --- an input group --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.describe)
def test_a_quantized_linear_is_never_worse_than_rtn(spec):
    statistics = InputStatistics(64, torch.device("cpu"))
    statistics.add(correlated_inputs(256, 64))
    weights = {"a": random(16, 64), "b": random(8, 64, seed=5)}
    results = quantize_linears(
        weights, dict.fromkeys(weights, spec), statistics, Recipe(), StorageLimits(torch.float16)
    )
    hessian = statistics.hessian_KK
    for name, result in results.items():

        def error(quantized, weight=weights[name]):
            difference = quantized.dequantize() - weight
            return ((difference @ hessian) * difference).sum() / ((weight @ hessian) * weight).sum()

        assert result.error == pytest.approx(error(result.weight).item(), rel=1e-3)
        rtn = error(round_to_nearest(weights[name], spec, torch.float16)).item()
        assert result.rtn_error == pytest.approx(rtn, rel=1e-3)
        assert result.error <= rtn * (1 if spec.bits < 8 else 1.001)


def test_rows_on_which_the_search_loses_are_rtn_rows_and_counted(monkeypatch):
    statistics = InputStatistics(64, torch.device("cpu"))
    statistics.add(correlated_inputs(256, 64))
    weights = {"a": random(16, 64), "b": random(8, 64, seed=5)}
    specs = {"a": QuantSpec(group_size=32), "b": QuantSpec(group_size=16)}
    good = quantize_linears(weights, specs, statistics, Recipe(), StorageLimits(torch.float16))
    assert [good[name].rtn_rows for name in weights] == [0, 0]

    def ruined(target_KN, *arguments):
        q_KN = gptq_round(target_KN, *arguments)
        if target_KN.shape[1] == 8:
            q_KN[:, [2, 5]] = 0
        return q_KN

    monkeypatch.setattr(quantize_linear, "gptq_round", ruined)
    results = quantize_linears(weights, specs, statistics, Recipe(), StorageLimits(torch.float16))
    assert [results[name].rtn_rows for name in weights] == [0, 2]
    is_rtn_N = (results["b"].weight.codes_NK == round_to_nearest(weights["b"], specs["b"], torch.float16).codes_NK).all(
        1
    )
    assert is_rtn_N.nonzero().flatten().tolist() == [2, 5]
    assert round_without_data(weights["b"], specs["b"], StorageLimits(torch.float16)).rtn_rows is None


def test_a_correction_that_is_not_finite_is_left_out_and_told(monkeypatch):
    statistics = InputStatistics(64, torch.device("cpu"))
    x_TK = correlated_inputs(256, 64)
    statistics.add(x_TK)
    plain = quantize_linears({"a": random(16, 64)}, {"a": SPECS[0]}, statistics, Recipe(), StorageLimits(torch.float16))
    statistics = InputStatistics(64, torch.device("cpu"))
    statistics.add(x_TK, x_TK + 0.1 * random(256, 64, seed=9))
    limits = StorageLimits(torch.float16)
    corrected = quantize_linears({"a": random(16, 64)}, {"a": SPECS[0]}, statistics, Recipe(), limits)
    assert corrected["a"].correction_shrinkage > 0 and corrected["a"].fallbacks == ()

    def overflowing(factor, moments_KN):
        correction_KN, terms = fit_correction(factor, moments_KN)
        correction_KN[3, 2] = float("inf")
        return correction_KN, terms

    monkeypatch.setattr(quantize_linear, "fit_correction", overflowing)
    result = quantize_linears({"a": random(16, 64)}, {"a": SPECS[0]}, statistics, Recipe(), limits)["a"]
    assert result.fallbacks == ("the error correction is not finite: left out",)
    assert result.correction_shrinkage is None
    assert torch.equal(result.weight.codes_NK, plain["a"].weight.codes_NK)


def test_linears_of_one_input_share_the_shrinkage_of_their_corrections():
    weights = {"a": random(24, 64), "b": random(8, 64, seed=6)}
    specs = {"a": QuantSpec(group_size=32), "b": QuantSpec(bits=8, group_size=32)}
    statistics = InputStatistics(64, torch.device("cpu"))
    for split, x_TK in enumerate(correlated_inputs(512, 64).split(256)):
        statistics.add(x_TK, 0.9 * x_TK + random(256, 64, seed=10 + split), split=split)
    recipe = Recipe()
    results = quantize_linears(weights, specs, statistics, recipe, StorageLimits(torch.float16))
    hessian = statistics.hessian_KK
    factor = factor_inverse(hessian, column_order(hessian), (recipe.damping,))
    together = torch.cat([*weights.values()]).T.contiguous()
    _, terms = fit_correction(factor, statistics.moments_KN(together))
    shrinkage = shrinkage_of([terms])
    assert 0.5 < shrinkage < 0.99
    for name in weights:
        assert results[name].correction_shrinkage == pytest.approx(shrinkage, rel=1e-4)
        alone = quantize_linears(weights, specs, statistics, recipe, StorageLimits(torch.float16), [name])
        assert list(alone) == [name]
        assert alone[name].weight.digest() == results[name].weight.digest()

    without_drift, without_original = (InputStatistics(64, torch.device("cpu")) for _ in range(2))
    without_drift.add(x_TK, x_TK)
    without_original.add(x_TK)
    for nothing_to_correct in (without_drift, without_original):
        results = quantize_linears(weights, specs, nothing_to_correct, recipe, StorageLimits(torch.float16))
        assert results["a"].correction_shrinkage is None


@pytest.mark.parametrize("method", ["awq", "awq+gptq"])
def test_rtn_error_with_awq_is_the_error_of_rounding_the_unscaled_weight(method):
    x_TK, weight, spec = correlated_inputs(256, 64), random(16, 64), QuantSpec(group_size=32)
    scale_K = torch.exp2(torch.randn(64, generator=torch.Generator().manual_seed(2)))
    # Its rows make the channels of the next linear, so AWQ divides them too.
    divisor_N = torch.exp2(torch.arange(16) % 4)
    plain, scaled = InputStatistics(64, x_TK.device), InputStatistics(64, x_TK.device, scale_K=scale_K)
    plain.add(x_TK)
    scaled.add(x_TK / scale_K)

    def quantized(weight_NK, statistics):
        return quantize_linears(
            {"a": weight_NK}, {"a": spec}, statistics, Recipe(method=method), StorageLimits(torch.float32)
        )["a"]

    original = quantized(weight, plain).rtn_error
    assert quantized(weight * scale_K, scaled).rtn_error == pytest.approx(original, rel=1e-3)
    folded = weight * scale_K
    error_KN = (round_to_nearest(folded, spec, torch.float32).dequantize() - folded).T
    of_folded = output_errors(error_KN, scaled.hessian_KK).sum() / output_errors(folded.T, scaled.hessian_KK).sum()
    assert abs(of_folded.item() / original - 1) > 0.1, "scales that change nothing would show nothing"

    rows_N = output_errors((round_to_nearest(weight, spec, torch.float32).dequantize() - weight).T, plain.hessian_KK)
    expected = (rows_N / divisor_N**2).sum() / (output_errors(weight.T, plain.hessian_KK) / divisor_N**2).sum()
    divided = quantized(weight * scale_K / divisor_N[:, None], scaled)
    assert divided.rtn_error == pytest.approx(expected.item(), rel=1e-3)


def test_shrinkage_is_the_ratio_of_the_sums_within_bounds():
    assert shrinkage_of([ShrinkageTerms(1.0, 4.0), ShrinkageTerms(2.0, 2.0)]) == 0.5
    assert shrinkage_of([ShrinkageTerms(-1.0, 4.0)]) == 0
    assert shrinkage_of([ShrinkageTerms(5.0, 4.0)]) == 1
    assert shrinkage_of([ShrinkageTerms(0.0, 0.0)]) == 0
    assert shrinkage_of([ShrinkageTerms(None, 4.0)]) == 1


def test_hessian_that_cannot_be_factored_is_a_fallback_to_rounding():
    statistics = InputStatistics(64, torch.device("cpu"))
    statistics.add(correlated_inputs(256, 64))
    statistics._hessian_KK[0, 1] = 1e9  # indefinite at any damping
    results = quantize_linears(
        {"a": random(8, 64)}, {"a": QuantSpec(group_size=32)}, statistics, Recipe(), StorageLimits(torch.float16)
    )
    assert "could not be factored" in results["a"].fallbacks[0]


def test_values_are_scale_times_integer_levels():
    grid = QuantParams(torch.tensor([[2.0], [3.0]]), torch.tensor([[8.0], [8.0]]))
    q = torch.tensor([[1.0], [-1.0], [2.0]])
    assert values_on_grid(q, grid, QuantSpec(group_size=2)).flatten().tolist() == [2.0, -2.0, 6.0]


# --- small and large weights ------------------------------------------------------------------------------------------


def statistics_of(x: Tensor) -> InputStatistics:
    statistics = InputStatistics(x.shape[1], x.device)
    statistics.add(x)
    return statistics


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("power", [-20, -45, 40])
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_weight_times_a_power_of_two_gets_the_same_codes(method, power, dtype, symmetric):
    spec = QuantSpec(bits=4, group_size=16, symmetric=symmetric)
    weight, statistics = random(24, 64), statistics_of(correlated_inputs(200, 64))
    recipe = Recipe(method=method, spec=spec, descent_sweeps=2, refit_scales=True)

    def results(weight: Tensor) -> quantize_linear.LinearResult:
        if method == "rtn":
            return round_without_data(weight, spec, StorageLimits(dtype))
        return quantize_linears({"w": weight}, {"w": spec}, statistics, recipe, StorageLimits(dtype))["w"]

    plain, scaled = results(weight), results(weight * 2.0**power)
    assert torch.equal(plain.weight.codes_NK, scaled.weight.codes_NK)
    assert torch.equal(plain.weight.zero_NG, scaled.weight.zero_NG)
    assert torch.equal(plain.weight.scale_NG * 2.0**power, scaled.weight.scale_NG)
    assert scaled.error == pytest.approx(plain.error, rel=1e-5) and not scaled.fallbacks


def test_scales_stay_within_their_dtype():
    assert scale_limits(torch.float16) == (2.0**-24, 65504.0)
    assert scale_limits(torch.bfloat16)[0] == scale_limits(torch.float32)[0] == 2.0**-126
    spec = QuantSpec(bits=4, group_size=16)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for factor in (1e-38, 1e-30, 1e-7, 1e5, 1e30, 3e38 / 4):
            rounded = round_to_nearest(random(4, 64).clamp(-4, 4) * factor, spec, dtype)
            assert torch.isfinite(rounded.scale_NG).all() and (rounded.scale_NG > 0).all()
            assert torch.isfinite(rounded.dequantize()).all() and torch.isfinite(1 / rounded.scale_NG.float()).all()


def test_subnormal_float16_scales_are_used():
    """Weights of 1e-4 have float16 scales below 2^-14, which are subnormal, and still 16 levels."""
    spec, weight = QuantSpec(bits=4, group_size=16), random(16, 64) * 1e-4
    rounded = round_to_nearest(weight, spec, torch.float16)
    assert (rounded.scale_NG < 2.0**-14).all() and len(rounded.codes_NK.unique()) == 16
    error = (rounded.dequantize() - weight).square().mean() / weight.square().mean()
    in_float32 = round_to_nearest(weight, spec, torch.float32).dequantize() - weight
    assert error < 1.05 * in_float32.square().mean() / weight.square().mean()


def test_groups_beyond_the_range_of_their_scales_are_counted():
    spec, weight = QuantSpec(bits=4, group_size=16), random(4, 64).sign()
    weight[0] *= 1e-6
    weight[1, :16] *= 1e6
    weight[2, 16:32] = 0
    weight[3, :16] *= 1e-40
    assert count_unfit_groups(weight.T, spec, torch.float16) == (4, 1)
    assert count_unfit_groups(weight.T, spec, torch.bfloat16) == (0, 0)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_weights_outside_the_range_of_float16_scales_are_a_fallback(method):
    spec, weight = QuantSpec(bits=4, group_size=16), random(8, 64) * 1e-9
    recipe = Recipe(method=method, spec=spec)
    if method == "rtn":
        results = round_without_data(weight, spec, StorageLimits(torch.float16))
    else:
        statistics = statistics_of(correlated_inputs(200, 64))
        results = quantize_linears({"w": weight}, {"w": spec}, statistics, recipe, StorageLimits(torch.float16))["w"]
    (fallback,) = results.fallbacks
    assert fallback.startswith("32 of 32 groups hold weights too small for float16 scales: ")
    assert "--dtype bfloat16" in fallback


# --- coordinate descent ----------------------------------------------------------------------------------------------


def objective(target: Tensor, q: Tensor, grid: QuantParams, hessian: Tensor, spec: QuantSpec) -> Tensor:
    difference = target - values_on_grid(q, grid, spec)
    return (difference * (hessian @ difference)).sum(0)


def descent_case(spec: QuantSpec, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, QuantParams, Tensor]:
    x = correlated_inputs(300, 100).to(dtype)
    hessian = x.T @ x / len(x) + 0.1 * torch.eye(100, dtype=dtype)
    target = random(100, 12, dtype=dtype)
    grid = find_grid(target.float(), None, spec, torch.float32)
    grid = QuantParams(grid.scale_GN.to(dtype), grid.zero_GN.to(dtype))
    return target, round_to_grid(target, grid, spec), grid, hessian


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.bits == 4], ids=QuantSpec.describe)
def test_coordinate_descent_blocked_equals_column_by_column(spec):
    target, q, grid, hessian = descent_case(spec)
    slow = q.clone()
    size = 100 if spec.group_size == -1 else spec.group_size
    for column in range(100):
        scale, zero = grid.scale_GN[column // size], grid.zero_GN[column // size]
        residual = hessian[column] @ (target - values_on_grid(slow, grid, spec))
        best = torch.round(slow[column] + residual / hessian[column, column] / scale)
        slow[column] = torch.minimum(torch.maximum(best, -zero), spec.max_code - zero)
    for block_columns in (1, 7, 128):
        assert torch.equal(descend(target, q, grid, hessian, spec, block_columns), slow)
    assert (objective(target, slow, grid, hessian, spec) <= objective(target, q, grid, hessian, spec)).all()
    assert objective(target, slow, grid, hessian, spec).sum() < 0.8 * objective(target, q, grid, hessian, spec).sum()


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.bits == 4], ids=QuantSpec.describe)
def test_refitted_scales_are_the_least_squares_ones(spec, monkeypatch):
    monkeypatch.setattr(coordinate_descent, "MAX_SCALE_CHANGE", 100.0)
    target, q, grid, hessian = descent_case(spec)
    # Codes of slightly smaller scales, so that the best scales are near and within the allowed change.
    shrunk = QuantParams(0.95 * grid.scale_GN, grid.zero_GN)
    refit = refit_scales(target, q, shrunk, hessian, spec, torch.float64)
    assert (objective(target, q, refit, hessian, spec) <= objective(target, q, shrunk, hessian, spec)).all()
    root = torch.linalg.cholesky(hessian).T
    size = 100 if spec.group_size == -1 else spec.group_size
    groups = torch.arange(100) // size
    for row in range(12):
        design = torch.stack([root @ (q[:, row] * (groups == g)) for g in range(len(grid.scale_GN))], dim=1)
        best = torch.linalg.lstsq(design, root @ target[:, row]).solution
        assert torch.allclose(refit.scale_GN[:, row].double(), best, rtol=0.02)
