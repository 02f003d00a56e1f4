"""Rows that make up for each other's errors: the arithmetic, what it is measured from, and where it is used."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from faults import contents
from tiny_models import ARCHITECTURES, random_model
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from llmquant import Options, QuantSpec, Recipe, quantize
from llmquant.algorithms import feedback as feedback_module
from llmquant.algorithms.affine import find_grid, round_to_grid, values_on_grid
from llmquant.algorithms.feedback import (
    DAMPING,
    Feedback,
    OutputMoments,
    RowFactor,
    cost,
    factor_rows,
    round_rows,
    row_slices,
)
from llmquant.algorithms.statistics import InputStatistics
from llmquant.errors import UserError
from llmquant.models.blocks import linears_of
from llmquant.pipeline.feedback import network_feedback, packed, unpacked
from llmquant.pipeline.plan import make_plan
from llmquant.pipeline.solve import Stored, solve_stage
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


def test_factor_is_that_of_the_damped_matrix_in_the_order_of_its_diagonal():
    outputs_NN = second_moments(correlated(200, 24))
    factor = factor_rows(outputs_NN)
    order = factor.order_N
    assert torch.equal(order, outputs_NN.diagonal().argsort(descending=True))
    assert torch.equal(factor.lower_NN, factor.lower_NN.tril())
    damped_NN = outputs_NN / outputs_NN.diagonal().mean() + DAMPING * torch.eye(24)
    assert torch.allclose(factor.lower_NN.T @ factor.lower_NN, damped_NN[order][:, order], atol=1e-4)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_matrix_of_nothing_or_beyond_numbers_has_no_factor(bad):
    assert factor_rows(torch.full((4, 4), bad)) is None


def test_each_row_makes_up_for_the_errors_before_it_as_a_fit_of_the_rows_behind_it_would(monkeypatch):
    """The slow form: with the rows behind it free, the best shift of row n minimises the cost of all that is known."""
    monkeypatch.setattr(feedback_module, "LEAST_ROWS", 1)
    monkeypatch.setattr(feedback_module, "MOST_PARTS", 12)
    target_KN, outputs_NN = random(32, 12, seed=3), second_moments(correlated(50, 12))
    factor = factor_rows(outputs_NN)
    steps_KN, grid, wanted_KN = round_rows(target_KN, Feedback((factor,), 0.5), SPEC, search)

    damped_NN = (outputs_NN / outputs_NN.diagonal().mean() + DAMPING * torch.eye(12)).double()
    error_KN = (target_KN - values_on_grid(steps_KN, grid, SPEC)).double()
    order = factor.order_N.tolist()
    for place, row in enumerate(order):
        known = order[: place + 1]
        left_NN = damped_NN.inverse()[known][:, known].inverse()
        shift_K = error_KN[:, known[:-1]] @ left_NN[:-1, -1] / left_NN[-1, -1]
        assert torch.allclose(wanted_KN[:, row].double(), target_KN[:, row].double() + shift_K, atol=1e-4)
        assert torch.equal(steps_KN[:, row], search(wanted_KN[:, row : row + 1])[0][:, 0])


@pytest.mark.parametrize("out_features", [5, 16, 48, 200])
def test_feedback_lowers_the_cost_that_it_was_made_for(out_features):
    target_KN, outputs_NN = random(64, out_features, seed=3), second_moments(correlated(400, out_features))
    plain_KN = values_on_grid(*search(target_KN), SPEC) - target_KN
    steps_KN, grid, _ = round_rows(target_KN, Feedback((factor_rows(outputs_NN),), 0.5), SPEC, search)
    fed_KN = values_on_grid(steps_KN, grid, SPEC) - target_KN

    def spent(error_KN):
        return ((error_KN @ outputs_NN) * error_KN).sum()

    if out_features > 16:
        assert spent(fed_KN) < 0.6 * spent(plain_KN)
    else:  # one part: rows by themselves
        assert torch.equal(fed_KN, plain_KN)


def test_rows_beyond_the_most_are_taken_in_slices_as_if_alone(monkeypatch):
    monkeypatch.setattr(feedback_module, "MOST_ROWS", 40)
    assert row_slices(100) == [slice(0, 33), slice(33, 66), slice(66, 100)]
    assert row_slices(40) == [slice(0, 40)]
    target_KN, gradient_TN = random(32, 100, seed=3), correlated(300, 100)
    factors = tuple(factor_rows(second_moments(gradient_TN[:, rows])) for rows in row_slices(100))
    steps_KN, grid, wanted_KN = round_rows(target_KN, Feedback(factors, 0.5), SPEC, search)
    for rows, factor in zip(row_slices(100), factors, strict=True):
        alone = round_rows(target_KN[:, rows], Feedback((factor,), 0.5), SPEC, search)
        assert torch.equal(steps_KN[:, rows], alone[0])
        assert torch.equal(grid.scale_GN[:, rows], alone[1].scale_GN)
        assert torch.equal(wanted_KN[:, rows], alone[2])


def test_cost_is_that_of_independent_errors_with_the_feedback(monkeypatch):
    """Against errors drawn at random and fed back row by row, many times."""
    outputs_NN, other_NN = second_moments(correlated(50, 40)), second_moments(correlated(50, 40, seed=8))
    factor = factor_rows(outputs_NN)
    drawn_KN, error_KN = random(20_000, 40, seed=5), torch.zeros(20_000, 40)
    lower_NN = factor.lower_NN
    for part in factor.parts():
        own_NN, before_NN = lower_NN[part.start : part.stop, part], lower_NN[part.start : part.stop, : part.start]
        shift_KN = error_KN[:, factor.order_N[: part.start]] @ torch.linalg.solve(own_NN, before_NN).T
        rows = factor.order_N[part.start : part.stop]
        error_KN[:, rows] = drawn_KN[:, rows] - shift_KN
    found = ((error_KN @ other_NN) * error_KN).sum() / len(error_KN)
    assert cost(factor, other_NN) == pytest.approx(found.item(), rel=0.05)
    # Without anything to feed back it is the trace.
    assert cost(factor_rows(torch.eye(40)), other_NN) == pytest.approx(other_NN.diagonal().sum().item(), rel=1e-4)


def test_feedback_that_would_leave_more_error_than_plain_rounding_is_not_used_and_told():
    """A G that says one direction is all that counts, and hardly anything else."""
    statistics = InputStatistics(64, torch.device("cpu"))
    statistics.add(random(256, 64, seed=4))
    weights, specs = {"a": random(96, 64, seed=3)}, {"a": replace(SPEC, group_size=64)}
    lower_NN = torch.eye(96)
    lower_NN[80:, :80] = 3.0
    far = {"a": Feedback((RowFactor(lower_NN, torch.arange(96)),), 0.5)}
    near = {"a": Feedback((RowFactor(torch.eye(96), torch.arange(96)),), 0.5)}
    used, undone, without = (
        solve_stage(weights, specs, statistics, Recipe(), Stored(torch.float16), None, feedback)["a"]
        for feedback in (near, far, None)
    )
    assert used.feedback_left == 0.5 and used.incidents == ()
    assert undone.weight.digest() == without.weight.digest()
    assert undone.feedback_left is None
    assert undone.incidents == (
        "with feedback between its rows its error was larger than plain rounding's: rounded without",
    )


# --- what it is measured from ----------------------------------------------------------------------------------------


def moments_of(one_TN: torch.Tensor, other_TN: torch.Tensor) -> OutputMoments:
    moments = OutputMoments(one_TN.shape[1])
    for half, gradient_TN in enumerate((one_TN, other_TN)):
        for some_TN in gradient_TN.split(64):
            moments.add(some_TN, half)
    return moments


def test_feedback_is_what_two_halves_bear_out():
    alike = moments_of(correlated(300, 48), correlated(300, 48, seed=50)).feedback(0.7)
    assert alike is not None
    assert 0.05 < alike.left < 0.5
    both_NN = second_moments(torch.cat([correlated(300, 48), correlated(300, 48, seed=50)]))
    assert torch.allclose(alike.factors[0].lower_NN, factor_rows(both_NN).lower_NN, atol=1e-4)
    # Directions that only one half has: the feedback that lowers the cost of one raises that of the other.
    torn = random(300, 4, seed=1) @ random(4, 48, seed=2), random(300, 4, seed=3) @ random(4, 48, seed=4)
    assert moments_of(*torn).feedback(0.7) is None
    # Noise: nothing to gain.
    assert moments_of(random(300, 48, seed=1), random(300, 48, seed=2)).feedback(1.0) is None
    assert moments_of(correlated(300, 48), torch.zeros(300, 48)).feedback(1.0) is None


def test_sums_go_through_files_and_add_up():
    one_TN, other_TN = correlated(100, 48), correlated(100, 48, seed=50)
    whole, part = moments_of(one_TN, other_TN), moments_of(one_TN[:50], other_TN[:50])
    part.add_tensors(moments_of(one_TN[50:], other_TN[50:]).tensors())
    assert part.tensors().keys() == whole.tensors().keys()
    for name, tensor in whole.tensors().items():
        assert torch.allclose(part.tensors()[name], tensor, rtol=1e-4, atol=1e-3)


def test_feedback_goes_through_a_part():
    feedback = {
        "a.b": Feedback(tuple(factor_rows(second_moments(correlated(50, n))) for n in (20, 24)), 0.25),
        "a": Feedback((factor_rows(second_moments(correlated(50, 9))),), 0.5),
    }
    back = unpacked(*packed(feedback))
    assert back.keys() == feedback.keys()
    for name, between in feedback.items():
        assert back[name].left == between.left
        for mine, its in zip(back[name].factors, between.factors, strict=True):
            assert isinstance(mine, RowFactor)
            assert torch.equal(mine.lower_NN, its.lower_NN)
            assert torch.equal(mine.order_N, its.order_N)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "falcon"])
def test_gradients_are_those_of_the_whole_model_at_once(architecture, tiny_model, tmp_path, monkeypatch):
    plan = make_plan(tiny_model(architecture), Recipe(output_feedback="network"), Options(seq_len=24))
    tokens_SL = torch.randint(2, 500, (4, 24), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("llmquant.pipeline.backward.CHUNK_TOKENS", 72)
    monkeypatch.setattr("llmquant.pipeline.feedback.MEASURED_TOKENS", 24)
    measured: list[dict[str, OutputMoments]] = []
    monkeypatch.setattr("llmquant.pipeline.feedback._feedback", lambda moments, *others: measured.append(moments) or {})
    shares = []
    assert list(network_feedback(plan, tokens_SL, tmp_path / "sums", None, shares.append)) == [{}, {}]
    assert not (tmp_path / "sums").exists()
    assert shares == sorted(shares)
    assert 0 <= shares[0] < shares[-1] < 1

    model = random_model(ARCHITECTURES[architecture]()).requires_grad_(False)
    outputs = {}
    names = [name for name in linears_of(model) if any(name.startswith(block) for block in plan.block_names)]
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: outputs.update({name: out})
        )
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
    expected = {name: OutputMoments(linears_of(model)[name].weight.shape[0]) for name in names}
    if architecture == "gpt2":
        expected = {name: OutputMoments(linears_of(model)[name].weight.shape[1]) for name in names}
    for number, tokens_L in enumerate(tokens_SL):
        log_p_LV = model(input_ids=tokens_L[None], use_cache=False).logits[0].log_softmax(-1)
        drawn_L1 = torch.multinomial(log_p_LV.detach().exp(), 1, generator=torch.Generator().manual_seed(number))
        loss = -log_p_LV.gather(-1, drawn_L1).sum()
        for name, gradient in zip(names, torch.autograd.grad(loss, [outputs[n] for n in names]), strict=True):
            expected[name].add(gradient.flatten(0, -2), number % 2)
    assert len(measured) == len(plan.block_names)
    for block, moments in zip(plan.block_names, measured, strict=True):
        assert {f"{block}.{name}" for name in moments} == {name for name in names if name.startswith(f"{block}.")}
        for name, moment in moments.items():
            for key, tensor in moment.tensors().items():
                wanted = expected[f"{block}.{name}"].tensors()[key]
                assert wanted.any()
                assert torch.allclose(tensor, wanted, rtol=1e-3, atol=1e-5 * wanted.abs().max().item())


# --- in a run --------------------------------------------------------------------------------------------------------


@pytest.fixture
def options(tmp_path: Path) -> Options:
    text = tmp_path / "text.txt"
    text.write_text("for x in range(10): print(x)\nif x == 3: return\n" * 300)
    return Options(calibration=str(text), num_samples=16, seq_len=64, format="gptq_v2", verify=False)


def left(report) -> dict[str, float]:
    return {linear.kind: linear.feedback_left for linear in report.linears if linear.feedback_left is not None}


def test_efforts_and_methods_say_whether_rows_are_fed_back():
    assert [Recipe(**EFFORTS[effort]).output_feedback for effort in EFFORTS] == ["none", "block", "network"]
    assert not Recipe(method="awq+gptq").feeds_back
    assert not Recipe(method="awq").feeds_back
    assert not Recipe(method="rtn", output_feedback="network").runs_backward
    with pytest.raises(UserError, match="output_feedback 'some': not one of none, block, network; use block"):
        Recipe(output_feedback="some")


def test_queries_and_keys_make_up_for_each_other_by_default(tiny_model, options, tmp_path):
    model = tiny_model("llama", head_dim=32, num_attention_heads=4, num_key_value_heads=2)
    recipe = Recipe(spec=replace(SPEC, group_size=32))
    report = quantize(model, tmp_path / "out", recipe, options)
    assert {"self_attn.q_proj", "self_attn.k_proj"} >= left(report).keys() >= {"self_attn.q_proj"}
    assert all(0 < value < 0.7 for value in left(report).values())
    stored = json.loads((tmp_path / "out" / "quantize_report.json").read_text())
    assert {entry["kind"] for entry in stored["linears"] if entry["feedback_left"] is not None} == left(report).keys()
    without = quantize(model, tmp_path / "without", replace(recipe, output_feedback="none"), options)
    assert left(without) == {}
    changed = {
        one.kind
        for one, other in zip(report.linears, without.linears, strict=True)
        if one.digest != other.digest and one.name.startswith("model.layers.0.")
    }
    assert changed >= {"self_attn.q_proj"}
    assert "self_attn.v_proj" not in changed, "it is solved before what differs is in its input"


@pytest.mark.parametrize("architecture", [*ARCHITECTURES])
def test_any_architecture_can_be_asked(architecture, tiny_model, options, tmp_path):
    """Whatever a block is made of, its gradients reach the linears that the text reaches."""
    recipe = Recipe(spec=replace(SPEC, group_size=32))
    report = quantize(tiny_model(architecture), tmp_path / "out", recipe, replace(options, num_samples=9, seq_len=32))
    assert not [remark for remark in report.remarks if "gradient" in remark.what or "too few" in remark.what]


def test_what_keeps_rows_by_themselves_is_told(tiny_model, options, tmp_path, monkeypatch):
    recipe = Recipe(spec=replace(SPEC, group_size=32))
    few = quantize(tiny_model("llama"), tmp_path / "few", recipe, replace(options, num_samples=8))

    def told(report):
        # The text of these tests repeats itself, which is remarked on too.
        return [
            r.what for r in report.remarks if r.where == "calibration" and "that repeat an earlier one" not in r.what
        ]

    assert told(few) == ["8 samples are too few to let rows make up for each other's errors: that takes 9"]
    assert left(few) == {}
    best = Recipe(spec=recipe.spec, **EFFORTS["best"])
    one = quantize(tiny_model("llama"), tmp_path / "one", best, replace(options, num_samples=1))
    assert [what[:28] for what in told(one)] == ["1 samples are too few to let"]
    assert left(one) == {}

    monkeypatch.setattr(LlamaDecoderLayer, "forward", torch.no_grad()(LlamaDecoderLayer.forward))
    flat = quantize(tiny_model("llama"), tmp_path / "flat", recipe, options)
    assert [remark.what.partition("(")[0] for remark in flat.remarks if "feedback" in remark.what] == (
        2 * ["no feedback between rows: the block has no gradient "]
    )
    assert left(flat) == {}
    with pytest.raises(UserError, match=r"cannot be run backward \(.*\); use --effort default"):
        quantize(tiny_model("llama"), tmp_path / "best", best, options)


@pytest.mark.parametrize("effort", ["default", "best"])
def test_gradients_that_overflow_are_told(effort, tiny_model, options, tmp_path, monkeypatch):
    add = OutputMoments.add

    def overflowing(self, gradient_TN, half):
        add(self, gradient_TN * torch.inf if gradient_TN.shape[1] == 96 else gradient_TN, half)

    monkeypatch.setattr(OutputMoments, "add", overflowing)
    model = tiny_model("llama", intermediate_size=96)
    recipe = Recipe(spec=replace(SPEC, group_size=32), **EFFORTS[effort])
    report = quantize(model, tmp_path / "out", recipe, options)
    told = {remark.where for remark in report.remarks if "gradients at its outputs overflow" in remark.what}
    assert told == {f"model.layers.{block}.mlp.{name}_proj" for block in (0, 1) for name in ("gate", "up")}
    assert not {kind for kind in left(report) if kind in ("mlp.gate_proj", "mlp.up_proj")}


def test_best_feeds_back_by_the_whole_network_and_leaves_nothing_behind(tiny_model, options, tmp_path):
    recipe = Recipe(spec=replace(SPEC, group_size=32), **EFFORTS["best"])
    report = quantize(tiny_model("llama"), tmp_path / "out", recipe, options)
    assert len(left(report)) >= 2
    assert all(0 < value < 1 for value in left(report).values())
    assert "gradients" in report.seconds
    again = quantize(tiny_model("llama"), tmp_path / "again", recipe, options)
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    assert left(again) == left(report)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["again", "out", "text.txt"]
