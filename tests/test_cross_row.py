"""Cross-row error compensation: the arithmetic, the output Hessians it is measured from, and its use in a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from folders import artifact_bytes
from tiny_models import ARCHITECTURES, random_model
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from llmquant import Options, QuantSpec, Recipe, quantize
from llmquant.algorithms import cross_row
from llmquant.algorithms.cross_row import (
    DAMPING,
    CrossRowFactors,
    OutputHessian,
    RowFactor,
    compensated_cost,
    factor_output_hessian,
    round_row_blocks,
    row_slices,
)
from llmquant.algorithms.grid import find_grid, round_to_grid, values_on_grid
from llmquant.algorithms.statistics import InputStatistics
from llmquant.errors import UserError
from llmquant.models.blocks import linears_of
from llmquant.planning.plan import make_plan
from llmquant.solver.output_hessian import network_cross_row_factors, pack_factors, unpack_factors
from llmquant.solver.quantize_linear import StorageLimits, quantize_linears
from llmquant.spec import EFFORTS

SPEC = QuantSpec(bits=4, group_size=16, symmetric=False)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens: int, width: int, rank: int = 4, seed: int = 0) -> torch.Tensor:
    """Gradients that lie mostly in a few directions, [T, N]."""
    few = random(tokens, rank, seed=seed) @ random(rank, width, seed=99)
    return few + 0.1 * random(tokens, width, seed=seed + 1)


def second_moments(gradient_TN: torch.Tensor) -> torch.Tensor:
    return gradient_TN.T @ gradient_TN


def search(target_KN: torch.Tensor):
    grid = find_grid(target_KN, None, SPEC, torch.float16, 0)
    return round_to_grid(target_KN, grid, SPEC), grid


# --- the arithmetic --------------------------------------------------------------------------------------------------


def test_factor_is_the_cholesky_factor_of_the_damped_matrix_in_the_order_of_its_diagonal():
    hessian_NN = second_moments(correlated(200, 24))
    factor = factor_output_hessian(hessian_NN)
    order = factor.order_N
    assert torch.equal(order, hessian_NN.diagonal().argsort(descending=True))
    assert torch.equal(factor.lower_NN, factor.lower_NN.tril())
    damped_NN = hessian_NN / hessian_NN.diagonal().mean() + DAMPING * torch.eye(24)
    assert torch.allclose(factor.lower_NN.T @ factor.lower_NN, damped_NN[order][:, order], atol=1e-4)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_matrix_that_is_zero_or_not_finite_has_no_factor(bad):
    assert factor_output_hessian(torch.full((4, 4), bad)) is None


def test_matrices_that_are_factored_together_have_the_factors_and_costs_of_each_alone():
    hessians = [second_moments(correlated(200, 24, seed=seed)) for seed in (1, 5, 9)]
    others = torch.stack([second_moments(correlated(200, 24, seed=seed)) for seed in (2, 6, 7)])
    together = cross_row.factor_output_hessians(torch.stack(hessians))
    costs = cross_row.compensated_costs(together, others)
    for factor, hessian_NN, other_NN, cost in zip(together, hessians, others, costs, strict=True):
        alone = factor_output_hessian(hessian_NN)
        assert torch.equal(factor.order_N, alone.order_N)
        assert torch.allclose(factor.lower_NN, alone.lower_NN, atol=1e-6)
        assert cost.item() == pytest.approx(compensated_cost(alone, other_NN), rel=1e-5)
    assert cross_row.factor_output_hessians(torch.stack([*hessians, torch.zeros(24, 24)])) is None


def test_slices_of_a_gpu_are_factored_together(monkeypatch):
    monkeypatch.setattr(cross_row, "MAX_SLICE_ROWS", 20)
    hessian = hessian_of(correlated(300, 59), correlated(300, 59, seed=50))
    expected = hessian.validated_factors(1.0)
    monkeypatch.setattr(cross_row.OutputHessian, "_batches", lambda self: [slice(0, 1), slice(1, 3)])
    assert [len(sums) for sums in hessian._splits] == [3, 3]
    found = hessian.validated_factors(1.0)
    assert found.cost_ratio == pytest.approx(expected.cost_ratio, rel=1e-5)
    for factor, other in zip(found.factors, expected.factors, strict=True):
        assert torch.allclose(factor.lower_NN, other.lower_NN, atol=1e-5)


def test_each_row_compensates_for_earlier_errors_like_a_fit_with_free_later_rows(monkeypatch):
    """The slow form: the best shift of row n minimises the cost of the rows up to n while the later rows are free."""
    monkeypatch.setattr(cross_row, "MIN_BLOCK_ROWS", 1)
    monkeypatch.setattr(cross_row, "MAX_ROW_BLOCKS", 12)
    target_KN, hessian_NN = random(32, 12, seed=3), second_moments(correlated(50, 12))
    factor = factor_output_hessian(hessian_NN)
    q_KN, grid, rounding_target_KN = round_row_blocks(target_KN, CrossRowFactors((factor,), 0.5), SPEC, search)

    damped_NN = (hessian_NN / hessian_NN.diagonal().mean() + DAMPING * torch.eye(12)).double()
    error_KN = (target_KN - values_on_grid(q_KN, grid, SPEC)).double()
    order = factor.order_N.tolist()
    for place, row in enumerate(order):
        known = order[: place + 1]
        schur_NN = damped_NN.inverse()[known][:, known].inverse()
        shift_K = error_KN[:, known[:-1]] @ schur_NN[:-1, -1] / schur_NN[-1, -1]
        assert torch.allclose(rounding_target_KN[:, row].double(), target_KN[:, row].double() + shift_K, atol=1e-4)
        assert torch.equal(q_KN[:, row], search(rounding_target_KN[:, row : row + 1])[0][:, 0])


@pytest.mark.parametrize("out_features", [5, 16, 48, 200])
def test_compensation_lowers_the_cost_it_was_factored_from(out_features):
    target_KN, hessian_NN = random(64, out_features, seed=3), second_moments(correlated(400, out_features))
    plain_KN = values_on_grid(*search(target_KN), SPEC) - target_KN
    q_KN, grid, _ = round_row_blocks(
        target_KN, CrossRowFactors((factor_output_hessian(hessian_NN),), 0.5), SPEC, search
    )
    compensated_KN = values_on_grid(q_KN, grid, SPEC) - target_KN

    def cost(error_KN):
        return ((error_KN @ hessian_NN) * error_KN).sum()

    if out_features > 16:
        assert cost(compensated_KN) < 0.6 * cost(plain_KN)
    else:  # one row block: no row is compensated
        assert torch.equal(compensated_KN, plain_KN)


def test_slices_of_rows_are_compensated_independently(monkeypatch):
    monkeypatch.setattr(cross_row, "MAX_SLICE_ROWS", 40)
    assert row_slices(100) == [slice(0, 33), slice(33, 66), slice(66, 100)]
    assert row_slices(40) == [slice(0, 40)]
    target_KN, gradient_TN = random(32, 100, seed=3), correlated(300, 100)
    factors = tuple(factor_output_hessian(second_moments(gradient_TN[:, rows])) for rows in row_slices(100))
    q_KN, grid, rounding_target_KN = round_row_blocks(target_KN, CrossRowFactors(factors, 0.5), SPEC, search)
    for rows, factor in zip(row_slices(100), factors, strict=True):
        alone = round_row_blocks(target_KN[:, rows], CrossRowFactors((factor,), 0.5), SPEC, search)
        assert torch.equal(q_KN[:, rows], alone[0])
        assert torch.equal(grid.scale_GN[:, rows], alone[1].scale_GN)
        assert torch.equal(rounding_target_KN[:, rows], alone[2])


def test_compensated_cost_is_the_mean_cost_of_independent_errors():
    """Random errors are compensated row block by row block, many times."""
    hessian_NN, other_NN = second_moments(correlated(50, 40)), second_moments(correlated(50, 40, seed=8))
    factor = factor_output_hessian(hessian_NN)
    drawn_KN, error_KN = random(20_000, 40, seed=5), torch.zeros(20_000, 40)
    lower_NN = factor.lower_NN
    for block in factor.row_blocks():
        own_NN, before_NN = lower_NN[block.start : block.stop, block], lower_NN[block.start : block.stop, : block.start]
        shift_KN = error_KN[:, factor.order_N[: block.start]] @ torch.linalg.solve(own_NN, before_NN).T
        rows = factor.order_N[block.start : block.stop]
        error_KN[:, rows] = drawn_KN[:, rows] - shift_KN
    mean_cost = ((error_KN @ other_NN) * error_KN).sum() / len(error_KN)
    assert compensated_cost(factor, other_NN) == pytest.approx(mean_cost.item(), rel=0.05)
    # If no row affects another, it is the trace.
    assert compensated_cost(factor_output_hessian(torch.eye(40)), other_NN) == pytest.approx(
        other_NN.diagonal().sum().item(), rel=1e-4
    )


def test_compensation_that_leaves_more_error_than_plain_rtn_is_undone_and_a_fallback():
    """A G in which hardly anything counts but one direction."""
    statistics = InputStatistics(64, torch.device("cpu"))
    statistics.add(random(256, 64, seed=4))
    weights, specs = {"a": random(96, 64, seed=3)}, {"a": replace(SPEC, group_size=64)}
    lower_NN = torch.eye(96)
    lower_NN[80:, :80] = 3.0
    far = {"a": CrossRowFactors((RowFactor(lower_NN, torch.arange(96)),), 0.5)}
    near = {"a": CrossRowFactors((RowFactor(torch.eye(96), torch.arange(96)),), 0.5)}
    used, undone, without = (
        quantize_linears(weights, specs, statistics, Recipe(), StorageLimits(torch.float16), None, factors)["a"]
        for factors in (near, far, None)
    )
    assert used.cross_row_cost_ratio == 0.5 and used.fallbacks == ()
    assert undone.weight.digest() == without.weight.digest()
    assert undone.cross_row_cost_ratio is None
    assert undone.fallbacks == ("cross-row compensation left a larger error than plain RTN: rounded without it",)


# --- output Hessians -------------------------------------------------------------------------------------------------


def hessian_of(one_TN: torch.Tensor, other_TN: torch.Tensor) -> OutputHessian:
    hessian = OutputHessian(one_TN.shape[1])
    for split, gradient_TN in enumerate((one_TN, other_TN)):
        for some_TN in gradient_TN.split(64):
            hessian.add(some_TN, split)
    return hessian


def test_factors_are_used_if_both_splits_confirm_them():
    alike = hessian_of(correlated(300, 48), correlated(300, 48, seed=50)).validated_factors(0.7)
    assert alike is not None
    assert 0.05 < alike.cost_ratio < 0.5
    both_NN = second_moments(torch.cat([correlated(300, 48), correlated(300, 48, seed=50)]))
    assert torch.allclose(alike.factors[0].lower_NN, factor_output_hessian(both_NN).lower_NN, atol=1e-4)
    # The splits have different directions: the factor that lowers the cost of one raises the cost of the other.
    torn = random(300, 4, seed=1) @ random(4, 48, seed=2), random(300, 4, seed=3) @ random(4, 48, seed=4)
    assert hessian_of(*torn).validated_factors(0.7) is None
    # Noise has no directions to compensate in.
    assert hessian_of(random(300, 48, seed=1), random(300, 48, seed=2)).validated_factors(1.0) is None
    assert hessian_of(correlated(300, 48), torch.zeros(300, 48)).validated_factors(1.0) is None


def test_sums_of_tensors_add_up():
    one_TN, other_TN = correlated(100, 48), correlated(100, 48, seed=50)
    whole, partial = hessian_of(one_TN, other_TN), hessian_of(one_TN[:50], other_TN[:50])
    partial.add_tensors(hessian_of(one_TN[50:], other_TN[50:]).tensors())
    assert partial.tensors().keys() == whole.tensors().keys()
    for name, tensor in whole.tensors().items():
        assert torch.allclose(partial.tensors()[name], tensor, rtol=1e-4, atol=1e-3)


def test_factors_go_through_a_part():
    block_factors = {
        "a.b": CrossRowFactors(tuple(factor_output_hessian(second_moments(correlated(50, n))) for n in (20, 24)), 0.25),
        "a": CrossRowFactors((factor_output_hessian(second_moments(correlated(50, 9))),), 0.5),
    }
    unpacked = unpack_factors(*pack_factors(block_factors))
    assert unpacked.keys() == block_factors.keys()
    for name, packed in block_factors.items():
        assert unpacked[name].cost_ratio == packed.cost_ratio
        for after, before in zip(unpacked[name].factors, packed.factors, strict=True):
            assert isinstance(after, RowFactor)
            assert torch.equal(after.lower_NN, before.lower_NN)
            assert torch.equal(after.order_N, before.order_N)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "falcon"])
def test_output_hessians_equal_a_plain_backward_pass_through_the_model(architecture, tiny_model, tmp_path, monkeypatch):
    plan = make_plan(tiny_model(architecture), Recipe(output_hessian="network"), Options(seq_len=24))
    tokens_SL = torch.randint(2, 500, (4, 24), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("llmquant.solver.gradients.CHUNK_TOKENS", 72)
    monkeypatch.setattr("llmquant.solver.gradients.MEASURED_TOKENS", 24)
    measured: list[dict[str, OutputHessian]] = []
    monkeypatch.setattr(
        "llmquant.solver.output_hessian._validated_factors",
        lambda hessians, *others: measured.append(hessians) or {},
    )
    fractions = []
    assert list(network_cross_row_factors(plan, tokens_SL, tmp_path / "sums", None, fractions.append)) == [{}, {}]
    assert not (tmp_path / "sums").exists()
    assert fractions == sorted(fractions)
    assert 0 <= fractions[0] < fractions[-1] < 1

    model = random_model(ARCHITECTURES[architecture]()).requires_grad_(False)
    outputs = {}
    names = [name for name in linears_of(model) if any(name.startswith(block) for block in plan.block_names)]
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: outputs.update({name: out})
        )
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
    expected = {name: OutputHessian(linears_of(model)[name].weight.shape[0]) for name in names}
    if architecture == "gpt2":
        expected = {name: OutputHessian(linears_of(model)[name].weight.shape[1]) for name in names}
    for number, tokens_L in enumerate(tokens_SL):
        log_p_LV = model(input_ids=tokens_L[None], use_cache=False).logits[0].log_softmax(-1)
        drawn_L1 = torch.multinomial(log_p_LV.detach().exp(), 1, generator=torch.Generator().manual_seed(number))
        loss = -log_p_LV.gather(-1, drawn_L1).sum()
        for name, gradient in zip(names, torch.autograd.grad(loss, [outputs[n] for n in names]), strict=True):
            expected[name].add(gradient.flatten(0, -2), number % 2)
    assert len(measured) == len(plan.block_names)
    for block, hessians in zip(plan.block_names, measured, strict=True):
        assert {f"{block}.{name}" for name in hessians} == {name for name in names if name.startswith(f"{block}.")}
        for name, hessian in hessians.items():
            for key, tensor in hessian.tensors().items():
                plain = expected[f"{block}.{name}"].tensors()[key]
                assert plain.any()
                assert torch.allclose(tensor, plain, rtol=1e-3, atol=1e-5 * plain.abs().max().item())


# --- in a run --------------------------------------------------------------------------------------------------------


@pytest.fixture
def options(tmp_path: Path) -> Options:
    text = tmp_path / "text.txt"
    text.write_text("for x in range(10): print(x)\nif x == 3: return\n" * 300)
    return Options(calibration=str(text), num_samples=16, seq_len=64, format="gptq_v2", verify=False)


def cost_ratios(report) -> dict[str, float]:
    return {
        linear.kind: linear.cross_row_cost_ratio for linear in report.linears if linear.cross_row_cost_ratio is not None
    }


def test_effort_and_method_decide_whether_rows_are_compensated():
    assert [Recipe(**EFFORTS[effort]).output_hessian for effort in EFFORTS] == ["none", "block", "network"]
    assert not Recipe(method="awq+gptq").compensates_across_rows
    assert not Recipe(method="awq").compensates_across_rows
    assert not Recipe(method="rtn", output_hessian="network").runs_backward
    with pytest.raises(UserError, match="output_hessian 'some': not one of none, block, network; use block"):
        Recipe(output_hessian="some")


@pytest.mark.slow
def test_queries_and_keys_are_compensated_by_default(tiny_model, options, tmp_path):
    model = tiny_model("llama", head_dim=32, num_attention_heads=4, num_key_value_heads=2)
    recipe = Recipe(spec=replace(SPEC, group_size=32))
    report = quantize(model, tmp_path / "out", recipe, options)
    assert {"self_attn.q_proj", "self_attn.k_proj"} >= cost_ratios(report).keys() >= {"self_attn.q_proj"}
    assert all(0 < value < 0.7 for value in cost_ratios(report).values())
    stored = json.loads((tmp_path / "out" / "quantize_report.json").read_text())
    assert {entry["kind"] for entry in stored["linears"] if entry["cross_row_cost_ratio"] is not None} == cost_ratios(
        report
    ).keys()
    without = quantize(model, tmp_path / "without", replace(recipe, output_hessian="none"), options)
    assert cost_ratios(without) == {}
    changed = {
        one.kind
        for one, other in zip(report.linears, without.linears, strict=True)
        if one.digest != other.digest and one.name.startswith("model.layers.0.")
    }
    assert changed >= {"self_attn.q_proj"}
    assert "self_attn.v_proj" not in changed, "its input does not depend on queries and keys of its block"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [*ARCHITECTURES])
def test_every_architecture_can_be_measured(architecture, tiny_model, options, tmp_path):
    """The gradients reach every linear that the text reaches, in every kind of block."""
    recipe = Recipe(spec=replace(SPEC, group_size=32))
    report = quantize(tiny_model(architecture), tmp_path / "out", recipe, replace(options, num_samples=9, seq_len=32))
    assert not [note for note in report.notes if "gradient" in note.what or "too few" in note.what]


@pytest.mark.slow
def test_reasons_not_to_compensate_are_noted(tiny_model, options, tmp_path, monkeypatch):
    recipe = Recipe(spec=replace(SPEC, group_size=32))
    few = quantize(tiny_model("llama"), tmp_path / "few", recipe, replace(options, num_samples=8))

    def notes(report):
        # The text of these tests repeats itself, which has a note of its own.
        return [r.what for r in report.notes if r.where == "calibration" and "repeat an earlier row" not in r.what]

    assert notes(few) == ["8 samples are too few for cross-row error compensation, which needs 9"]
    assert cost_ratios(few) == {}
    best = Recipe(spec=recipe.spec, **EFFORTS["best"])
    one = quantize(tiny_model("llama"), tmp_path / "one", best, replace(options, num_samples=1))
    assert [what[:25] for what in notes(one)] == ["1 samples are too few for"]
    assert cost_ratios(one) == {}

    monkeypatch.setattr(LlamaDecoderLayer, "forward", torch.no_grad()(LlamaDecoderLayer.forward))
    flat = quantize(tiny_model("llama"), tmp_path / "flat", recipe, options)
    assert [note.what.partition("(")[0] for note in flat.notes if "cross-row" in note.what] == (
        2 * ["no cross-row compensation: the block has no gradient "]
    )
    assert cost_ratios(flat) == {}
    with pytest.raises(UserError, match=r"backpropagation through the model fails \(.*\); use --effort default"):
        quantize(tiny_model("llama"), tmp_path / "best", best, options)


@pytest.mark.slow
@pytest.mark.parametrize("effort", ["default", "best"])
def test_gradients_that_overflow_are_noted(effort, tiny_model, options, tmp_path, monkeypatch):
    add = OutputHessian.add

    def overflowing(self, gradient_TN, split):
        add(self, gradient_TN * torch.inf if gradient_TN.shape[1] == 96 else gradient_TN, split)

    monkeypatch.setattr(OutputHessian, "add", overflowing)
    model = tiny_model("llama", intermediate_size=96)
    recipe = Recipe(spec=replace(SPEC, group_size=32), **EFFORTS[effort])
    report = quantize(model, tmp_path / "out", recipe, options)
    noted = {note.where for note in report.notes if "gradients at its outputs overflow" in note.what}
    assert noted == {f"model.layers.{block}.mlp.{name}_proj" for block in (0, 1) for name in ("gate", "up")}
    assert not {kind for kind in cost_ratios(report) if kind in ("mlp.gate_proj", "mlp.up_proj")}


@pytest.mark.slow
def test_best_compensates_by_the_whole_model_and_leaves_no_files_behind(tiny_model, options, tmp_path):
    recipe = Recipe(spec=replace(SPEC, group_size=32), **EFFORTS["best"])
    report = quantize(tiny_model("llama"), tmp_path / "out", recipe, options)
    assert len(cost_ratios(report)) >= 2
    assert all(0 < value < 1 for value in cost_ratios(report).values())
    assert "gradients" in report.seconds
    again = quantize(tiny_model("llama"), tmp_path / "again", recipe, options)
    assert artifact_bytes(tmp_path / "again") == artifact_bytes(tmp_path / "out")
    assert cost_ratios(again) == cost_ratios(report)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["again", "out", "text.txt"]
