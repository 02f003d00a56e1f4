"""Grids for a budget: allocation against brute force, sensitivities against plain gradients, and whole runs."""

import itertools
import json
import math
import random
import re

import pytest
import torch
from commands import command
from tiny_models import ARCHITECTURES, random_model, tiny_tokenizer

import llmquant.checkpoints.summary
from llmquant.algorithms.allocation import GridOption, allocate
from llmquant.algorithms.grid import find_grid, round_to_grid, values_on_grid
from llmquant.models.blocks import linears_of
from llmquant.pipeline import budget
from llmquant.pipeline.quantize import dry_run, quantize
from llmquant.planning.plan import make_plan
from llmquant.solver.sensitivity import measure_sensitivities
from llmquant.spec import Options, Override, QuantSpec, Recipe


def random_items(seed, *, num_items=6, num_options=4, unit=1):
    numbers = random.Random(seed)
    return [
        [
            GridOption(cost=unit * numbers.randint(1, 60), loss=numbers.random() * numbers.choice([1, 10]))
            for _ in range(num_options)
        ]
        for _ in range(num_items)
    ]


def best_by_trying_all(items, budget):
    return min(
        math.fsum(option.loss for option in options)
        for options in itertools.product(*items)
        if sum(option.cost for option in options) <= budget
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("unit", [1, 4096])
def test_allocation_is_the_best_of_all_combinations(seed, unit):
    items = random_items(seed, unit=unit)
    least = sum(min(option.cost for option in options) for options in items)
    most = sum(max(option.cost for option in options) for options in items)
    for limit in (least, least + 1, (2 * least + most) // 3, (least + most) // 2, most, 2 * most):
        result = allocate(items, limit)
        assert result.loss == pytest.approx(best_by_trying_all(items, limit), rel=1e-12)
        assert result.cost <= limit
        chosen = [options[index] for options, index in zip(items, result.chosen, strict=True)]
        assert result.cost == sum(option.cost for option in chosen)
        assert result.loss == pytest.approx(math.fsum(option.loss for option in chosen))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_coarse_units_keep_the_budget_and_lose_at_most_a_unit_an_item(seed):
    items = random_items(seed)
    least = sum(min(option.cost for option in options) for options in items)
    most = sum(max(option.cost for option in options) for options in items)
    unit = -(-(most - least) // 40)
    for limit in range(least, most, 7):
        result = allocate(items, limit, max_units=40)
        assert result.cost <= limit
        assert result.loss >= best_by_trying_all(items, limit) - 1e-12
        if limit - len(items) * unit >= least:
            assert result.loss <= best_by_trying_all(items, limit - len(items) * unit) + 1e-12


def test_curve_is_the_best_loss_at_every_cost():
    items = random_items(0)
    curve = allocate(items, 10**6).curve
    assert [loss for _, loss in curve] == sorted((loss for _, loss in curve), reverse=True)
    for cost, loss in curve[:: max(1, len(curve) // 8)]:
        assert loss == pytest.approx(best_by_trying_all(items, cost))
    assert curve[0][0] == sum(min(option.cost for option in options) for options in items)


def test_budget_below_the_cheapest_is_none():
    items = random_items(1)
    assert allocate(items, sum(min(option.cost for option in options) for options in items) - 1) is None


# --- sensitivities ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Return the options of a run on a short text."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("for x in range(10): print(x)\nif x == 3: return\n" * 40)
    return Options(calibration=str(text), num_samples=4, seq_len=32)


SPECS = [QuantSpec(bits=bits, group_size=32) for bits in (4, 8)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "method"),
    [*((name, "awq") for name in ("llama", "gpt2", "opt", "gemma2", "cohere2", "falcon")), ("llama", "gptq")],
)
def test_sensitivities_equal_a_plain_backward_pass_through_the_model(architecture, method, tiny_model, monkeypatch):
    """The gradients come from a plain backward pass through the model, the inputs from a plain forward pass."""
    plan = make_plan(tiny_model(architecture), Recipe(method=method), Options(seq_len=32))
    tokens_SL = torch.randint(2, 500, (3, 24), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("llmquant.solver.gradients.CHUNK_TOKENS", 72)
    measured = measure_sensitivities(plan, tokens_SL, lambda names: SPECS)

    model = random_model(ARCHITECTURES[architecture]()).requires_grad_(False)
    names = [name for each in measured for name in each.names]
    inputs, outputs = {}, {}
    for name in names:
        linear = model.get_submodule(name)
        linear.register_forward_pre_hook(lambda module, args, name=name: inputs.update({name: args[0].flatten(0, -2)}))
        linear.register_forward_hook(lambda module, args, out, name=name: outputs.update({name: out}))
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, args, out: out.requires_grad_())
    log_p_SLV = model(input_ids=tokens_SL, use_cache=False).logits.log_softmax(-1)
    drawn_T1 = torch.multinomial(log_p_SLV.detach().exp().flatten(0, 1), 1, generator=torch.Generator().manual_seed(0))
    loss = -log_p_SLV.flatten(0, 1).gather(-1, drawn_T1).sum()
    gradients = dict(zip(names, torch.autograd.grad(loss, [outputs[name] for name in names]), strict=True))
    inside = {name for name in linears_of(model) if any(name.startswith(block) for block in plan.block_names)}
    assert set(names) == inside
    for each in measured:
        for spec in SPECS:
            expected = 0.0
            for name in each.names:
                square_K = inputs[name].square().mean(0)
                importance_K = torch.where(square_K > 0, square_K + 0.2 * square_K.mean(), 0.0)
                uncompensated_K = torch.ones_like(square_K)
                if method == "gptq":
                    remaining_K = remaining_after_later_columns(inputs[name], 0.2 * square_K.mean())
                    importance_K, uncompensated_K = remaining_K, remaining_K / importance_K
                weight = model.get_submodule(name).weight
                weight_KN = (weight if type(model.get_submodule(name)).__name__ == "Conv1D" else weight.T).contiguous()
                grid = find_grid(weight_KN, importance_K, spec, plan.scale_dtype, plan.format.min_zero, 8)
                error_KN = values_on_grid(round_to_grid(weight_KN, grid, spec), grid, spec) - weight_KN
                # For each token: the squared gradients of the outputs times the squared inputs.
                for x_K, gradient_N in zip(inputs[name], gradients[name].flatten(0, -2), strict=True):
                    cost_KN = (uncompensated_K * x_K.square())[:, None] * gradient_N.square() * error_KN.square()
                    expected += 0.5 * cost_KN.sum().item() / len(inputs[name])
            assert each.losses[spec] == pytest.approx(expected, rel=1e-3)


def remaining_after_later_columns(x_TK: torch.Tensor, damping: torch.Tensor) -> torch.Tensor:
    """Return the damped square of each column that a fit by the later columns, in order of size, does not explain."""
    hessian_KK = (x_TK.T @ x_TK / len(x_TK) + damping * torch.eye(x_TK.shape[1])).double()
    order = hessian_KK.diagonal().argsort(descending=True).tolist()
    remaining_K = torch.empty(len(order))
    for place, column in enumerate(order):
        later = order[place:]
        remaining_K[column] = 1 / hessian_KK[later][:, later].inverse()[0, 0]
    return remaining_K


@pytest.mark.slow
def test_linears_that_share_an_input_are_measured_together(tiny_model):
    plan = make_plan(tiny_model("llama"), Recipe(), Options(seq_len=32))
    measured = measure_sensitivities(plan, torch.arange(2, 66).view(2, 32), lambda names: SPECS)
    kinds = [[name.removeprefix("model.layers.0.") for name in each.names] for each in measured[:4]]
    attention, mlp = "self_attn.", "mlp."
    assert kinds == [
        [f"{attention}q_proj", f"{attention}k_proj", f"{attention}v_proj"],
        [f"{attention}o_proj"],
        [f"{mlp}gate_proj", f"{mlp}up_proj"],
        [f"{mlp}down_proj"],
    ]
    assert len(measured) == 8


@pytest.mark.slow
def test_damaged_weights_are_named(tmp_path, few, monkeypatch, capsys):
    model = random_model(ARCHITECTURES["llama"]())
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    model.save_pretrained(tmp_path / "damaged")
    tiny_tokenizer().save_pretrained(tmp_path / "damaged")
    options = ["--target-bpw", "6", "--calibration", few.calibration, "--samples", "4", "--seq-len", "32", "--quiet"]
    capsys.readouterr()
    assert command(monkeypatch, "quantize", tmp_path / "damaged", tmp_path / "out", *options) == 2
    assert "tensor 'model.layers.1.mlp.up_proj.weight' holds NaN or inf" in capsys.readouterr().err
    assert not (tmp_path / "out.partial").exists()


def test_measuring_leaves_the_skeleton_empty(tiny_model):
    plan = make_plan(tiny_model("qwen2"), Recipe(), Options(seq_len=32))
    measure_sensitivities(plan, torch.arange(2, 66).view(2, 32), lambda names: SPECS)
    assert all(parameter.is_meta for parameter in plan.skeleton.model.parameters())
    assert not any("forward" in vars(module) for module in plan.skeleton.model.modules())


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_a_run_keeps_its_budget_and_its_checkpoint_loads(format, few, tiny_model, tmp_path):
    recipe = Recipe(target_bpw=6.5, spec=QuantSpec(symmetric=format == "gptq"))
    report = quantize(tiny_model("llama"), tmp_path / "out", recipe, Options(**vars(few) | {"format": format}))
    assert 6.0 < report.bits_per_weight <= 6.5
    assert report.allocation["chosen"]["bits_per_weight"] == pytest.approx(report.bits_per_weight)
    grids = {linear.name: linear.grid for linear in report.linears}
    assert len(set(grids.values())) > 1
    for each in report.allocation["inputs"]:
        assert len({grids[name] for name in each["linears"]}) == 1
    curve = report.allocation["curve"]
    assert [point["loss"] for point in curve] == sorted((point["loss"] for point in curve), reverse=True)
    json.dumps(report.to_dict()["allocation"])
    model = llmquant.load(tmp_path / "out", device="cpu")
    assert model(torch.arange(2, 20)[None]).logits.isfinite().all()


@pytest.mark.slow
def test_budget_in_bytes_counts_the_tensors_on_disk(few, tiny_model, tmp_path):
    for target_bytes in (305_000, 330_000):
        recipe = Recipe(target_bytes=target_bytes)
        report = quantize(tiny_model("llama"), tmp_path / str(target_bytes), recipe, few)
        tensors = llmquant.checkpoints.summary.inspect(report.out).total_bytes
        assert target_bytes * 0.97 < tensors <= target_bytes


@pytest.mark.slow
def test_a_continued_run_does_not_choose_again(few, tiny_model, tmp_path, monkeypatch):
    recipe = Recipe(target_bpw=6)
    quantize(tiny_model("llama"), tmp_path / "whole", recipe, few)

    class Killed(Exception):
        pass

    def kill(progress):
        if progress.done == 1:
            raise Killed

    with pytest.raises(Killed):
        quantize(tiny_model("llama"), tmp_path / "continued", recipe, few, kill)
    monkeypatch.setattr("llmquant.pipeline.quantize.choose_allocation", lambda *_: pytest.fail("chosen again"))
    quantize(tiny_model("llama"), tmp_path / "continued", recipe, few)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "continued" / file).read_bytes()


@pytest.mark.slow
def test_grids_chosen_for_vllm_can_be_loaded_by_vllm(few, tiny_model, tmp_path):
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
    model = tiny_model("llama", dtype=torch.bfloat16, **sizes)
    options = Options(**vars(few) | {"engines": ("vllm",)})
    for target in (4.6, 5.5):
        report = quantize(model, tmp_path / str(target), Recipe(target_bpw=target), options)
        assert report.bits_per_weight <= target
        assert len({linear.grid for linear in report.linears}) > 1


@pytest.mark.slow
def test_overrides_take_precedence_over_the_budget(few, tiny_model, tmp_path):
    override = Override(pattern="*.down_proj", bits=8, group_size=32)
    report = quantize(tiny_model("llama"), tmp_path / "out", Recipe(target_bpw=6, overrides=(override,)), few)
    grids = {linear.name: linear.grid for linear in report.linears}
    assert {grid for name, grid in grids.items() if name.endswith("down_proj")} == {"8-bit g32 sym"}
    assert report.bits_per_weight <= 6
    assert not any(name.endswith("down_proj") for each in report.allocation["inputs"] for name in each["linears"])


def test_bits_below_4_are_candidates_only_if_4_bits_do_not_fit(few, tiny_model, tmp_path):
    def bits(target):
        plan = dry_run(tiny_model("llama"), tmp_path / "out", Recipe(target_bpw=target), few)
        assert plan.bits_per_weight <= target
        return {spec.bits for grids in budget._candidates(plan).values() for spec in grids}

    assert bits(6) == {4, 8}
    assert bits(4.3) == {3, 4, 8}
    assert bits(3.2) == {2, 3, 4, 8}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target-bpw", "1"], "target_bpw 1: the smallest grids that gptq and the engines support need"),
        (["--target-bpw", "3", "--engine", "vllm"], "use --target-bpw 4."),
        (["--target-size", "100kB"], "target_size 0.1MB: the smallest grids .* use --target-size 0.1"),
        (["--target-size", "5 apples"], "target_size '5 apples': not a size; write a number"),
        (["--target-bpw", "5", "--target-size", "1GB"], "leave out the other"),
        (["--target-bpw", "5", "--method", "rtn"], "method 'rtn': grids are chosen"),
    ],
)
def test_budgets_that_cannot_be_kept_are_refused(arguments, message, few, tiny_model, tmp_path, monkeypatch, capsys):
    model = tiny_model("llama", dtype=torch.bfloat16)
    assert (
        command(
            monkeypatch,
            "quantize",
            model,
            tmp_path / "out",
            "--calibration",
            few.calibration,
            "--seq-len",
            32,
            *arguments,
        )
        == 2
    )
    assert re.search(message, capsys.readouterr().err)
