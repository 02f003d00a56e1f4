"""AWQ: the search equals its slow form; folded parameters are written; scales that do not help are not used."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from folders import assert_same_bytes
from safetensors.torch import load_file
from tiny_models import ARCHITECTURES
from transformers import AutoModelForCausalLM

from llmquant.algorithms.awq import (
    ConsumerLinears,
    ScaleSearchResult,
    candidate_scales,
    scale_of_channels,
    scaled_error,
    search_scale,
)
from llmquant.algorithms.error_correction import fit_correction
from llmquant.algorithms.gptq import column_order, factor_inverse
from llmquant.algorithms.grid import round_to_nearest
from llmquant.algorithms.statistics import InputStatistics
from llmquant.models import scale_folding
from llmquant.pipeline.quantize import quantize
from llmquant.runtime.load import load
from llmquant.solver import awq_scaling
from llmquant.solver.awq_scaling import exact_scale
from llmquant.spec import Options, QuantSpec, Recipe


def few(text):
    """Return the options of a quick run."""
    return Options(calibration=text, num_samples=4, seq_len=40, verify=False)


SPEC = QuantSpec(bits=3, group_size=16, symmetric=False)
OUTLIERS = torch.tensor([3, 17, 40])


def inputs(num_tokens: int = 200, width: int = 48, seed: int = 0) -> torch.Tensor:
    """x_TK with a few channels far larger than the rest."""
    generator = torch.Generator().manual_seed(seed)
    x_TK = torch.randn(num_tokens, width, generator=generator)
    x_TK[:, OUTLIERS] *= 20
    return x_TK


def consumer(
    x_TK: torch.Tensor, num_out: int = 24, spec: QuantSpec = SPEC, row_K: torch.Tensor | None = None
) -> ConsumerLinears:
    moments = InputStatistics(x_TK.shape[1], x_TK.device)
    moments.add(x_TK)
    weight_NK = torch.randn(num_out, x_TK.shape[1], generator=torch.Generator().manual_seed(num_out))
    rows = torch.arange(x_TK.shape[1]) if row_K is None else row_K
    return ConsumerLinears(weight_NK, spec, moments.hessian_KK, moments.mean_abs_K, rows)


def slow_search(x_TK: torch.Tensor, one: ConsumerLinears) -> tuple[torch.Tensor, float]:
    """Section 3.2 of the paper, candidate by candidate, on the tokens themselves."""
    mean_K = x_TK.abs().mean(0)
    grouped = one.weight_NK.view(one.weight_NK.shape[0], -1, one.spec.group_size).abs()
    weight_K = (grouped / grouped.amax(-1, keepdim=True)).flatten(1).mean(0)
    best, best_K = None, None
    scales = [torch.ones_like(mean_K)]
    for step in range(20):
        ratio = step / 20
        scales += [mean_K**ratio, mean_K**ratio / weight_K ** (1 - ratio)]
    for scale_K in scales:
        scale_K = scale_K / (scale_K.max() * scale_K.min()).sqrt()
        rounded = round_to_nearest(one.weight_NK * scale_K, one.spec, torch.float32).dequantize(torch.float32)
        out_TN, expected_TN = (x_TK / scale_K) @ rounded.T, x_TK @ one.weight_NK.T
        error = (out_TN - expected_TN).double().square().sum(1).mean().item()
        if best is None or error < best:
            best, best_K = error, scale_K
    return best_K, best


# Symmetric grids put the largest weight between two codes, where the last bit decides.
@pytest.mark.parametrize("spec", [SPEC, QuantSpec(bits=4, group_size=24, symmetric=False)])
def test_search_equals_its_slow_form_on_the_tokens(spec):
    x_TK = inputs()
    one = consumer(x_TK, spec=spec)
    search = search_scale([one], 48, torch.float32)
    scale_K, error = slow_search(x_TK, one)
    assert torch.allclose(search.scale_R, scale_K, rtol=1e-5)
    assert search.loss == pytest.approx(error, rel=1e-3)
    assert search.loss < 0.7 * search.unscaled_loss


def test_error_from_moments_is_the_error_of_the_outputs():
    x_TK, scale_K = inputs(), torch.rand(48) + 0.5
    one = consumer(x_TK)
    rounded = round_to_nearest(one.weight_NK * scale_K, SPEC, torch.float16).dequantize(torch.float32)
    expected = ((x_TK / scale_K) @ rounded.T - x_TK @ one.weight_NK.T).square().sum(1).mean().item()
    got = scaled_error(one.weight_NK.T.contiguous(), scale_K, one.hessian_KK, SPEC, torch.float16)
    assert got == pytest.approx(expected, rel=1e-3)


def test_columns_of_large_inputs_get_the_large_scales():
    scale_K = search_scale([consumer(inputs())], 48, torch.float32).scale_R
    others = torch.ones(48, dtype=torch.bool)
    others[OUTLIERS] = False
    assert scale_K[OUTLIERS].min() > scale_K[others].max()


def test_weights_already_on_the_grid_are_not_scaled():
    one = consumer(inputs())
    exact_NK = round_to_nearest(one.weight_NK, SPEC, torch.float32).dequantize(torch.float32)
    search = search_scale(
        [ConsumerLinears(exact_NK, SPEC, one.hessian_KK, one.mean_abs_K, one.row_K)], 48, torch.float32
    )
    assert torch.equal(search.scale_R, torch.ones(48))
    assert search.loss == search.unscaled_loss < 1e-6


def test_rows_that_make_several_channels_scale_them_alike_and_unknown_channels_stay():
    row_K = torch.arange(48) % 16
    row_K[5] = -1
    one = consumer(inputs(), row_K=row_K)
    scales = list(candidate_scales([one], 20))
    assert len(scales) == 40
    assert all(torch.equal(scale_R[16:], torch.ones(4)) for scale_R in scales)
    expected = torch.stack([one.mean_abs_K[row_K == row].mean() for row in range(16)])
    ratio_R = scales[20][:16] / expected**0.5
    assert torch.allclose(ratio_R, ratio_R[0].expand(16))
    assert scale_of_channels(scales[20], row_K)[5] == 1


def test_two_consumers_of_one_input_are_one_matrix():
    x_TK = inputs()
    q, k = consumer(x_TK, 24), consumer(x_TK, 8)
    both = ConsumerLinears(torch.cat([q.weight_NK, k.weight_NK]), SPEC, q.hessian_KK, q.mean_abs_K, q.row_K)
    apart, together = search_scale([q, k], 48, torch.float32), search_scale([both], 48, torch.float32)
    assert torch.allclose(apart.scale_R, together.scale_R)
    assert apart.loss == pytest.approx(together.loss, rel=1e-5)


def test_search_on_every_other_row_finds_nearly_what_all_rows_would():
    one = consumer(inputs(), num_out=2048)
    search = search_scale([one], 48, torch.float32)
    whole = scaled_error(one.weight_NK.T.contiguous(), search.scale_R, one.hessian_KK, SPEC, torch.float32)
    assert search.loss == pytest.approx(whole, rel=0.1)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms_are_divided_exactly(offset):
    generator = torch.Generator().manual_seed(0)
    stored_R = (torch.randn(500, generator=generator) * 0.3 + 1 - offset).bfloat16().float()
    stored_R[7] = -offset
    scale_R = torch.exp(torch.randn(500, generator=generator))
    exact_R = exact_scale(stored_R + offset, scale_R, offset, torch.bfloat16)
    divided_R = (stored_R + offset) / exact_R - offset
    assert torch.allclose(divided_R.bfloat16().float(), divided_R, rtol=1e-5, atol=1e-7)
    assert exact_R[7] == 1
    near = exact_R != 1
    assert near.float().mean() > 0.95
    assert torch.allclose(exact_R[near].log(), scale_R[near].log(), atol=0.05)


def test_corrections_with_scales_are_the_corrections_without():
    x_TK, residual_TR = inputs(), torch.randn(200, 24)
    original_TK = x_TK + 0.1 * torch.randn(200, 48)
    scale_K = torch.exp(torch.randn(48, generator=torch.Generator().manual_seed(1)))
    weight_KN = torch.randn(48, 24)
    corrected = []
    for divisor_K in (None, scale_K):
        t_K = torch.ones(48) if divisor_K is None else divisor_K
        scaled_KN = weight_KN * t_K[:, None]
        moments = InputStatistics(48, x_TK.device, writer_NK=scaled_KN.T, scale_K=divisor_K)
        moments.add(x_TK / t_K, original_TK, residual_TR)
        hessian_KK = moments.hessian_KK
        factor = factor_inverse(hessian_KK, column_order(hessian_KK), (0.05,), torch.float64, divisor_K)
        correction_KN, _ = fit_correction(factor, moments.moments_KN(scaled_KN))
        corrected.append((scaled_KN + correction_KN) / t_K[:, None])
    assert torch.allclose(corrected[0].float(), corrected[1].float(), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(corrected[0].float(), weight_KN, atol=1e-2)


# --- the whole path --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A short calibration text: reading a preset takes longer than the rest of a test."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(topics["assignment"])
    return str(path)


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.randint(3, 500, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(tokens).logits.float()


def outlier_model(tiny_model, tmp_path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A tiny model whose norms enlarge a few channels, like the norms of real models."""
    folder = tmp_path / "outliers"
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama", num_hidden_layers=3))
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[OUTLIERS] *= 30
            attention, mlp = layer.self_attn, layer.mlp
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
                linear.weight[:, OUTLIERS] /= 30
    model.to(dtype).save_pretrained(folder)
    for file in tiny_model("llama").glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_keeps_its_function_when_scales_are_folded(
    architecture, tiny_model, text, tmp_path, monkeypatch
):
    def far_from_one(consumers, num_rows, *_):
        used_R = torch.zeros(num_rows, dtype=torch.bool)
        for one in consumers:
            used_R[one.row_K[one.row_K >= 0]] = True
        scale_R = torch.exp2(2 * torch.rand(num_rows, generator=torch.Generator().manual_seed(num_rows)) - 1)
        return ScaleSearchResult(torch.where(used_R, scale_R, 1.0), 0.0, 1.0)

    monkeypatch.setattr(awq_scaling, "search_scale", far_from_one)
    monkeypatch.setattr(awq_scaling.AwqScaler, "_output_error", lambda *_: next(errors))
    errors = iter(range(100))
    original = tiny_model(architecture)
    report = quantize(
        original,
        tmp_path / "out",
        Recipe(method="awq+gptq", spec=QuantSpec(bits=8, group_size=32)),
        few(text),
    )
    assert not report.fallbacks
    assert not any("scales not used" in note.what for note in report.notes)
    before, after = (load_file(path / "model.safetensors") for path in (original, tmp_path / "out"))
    norms_differ = any(not torch.equal(before[name], after[name]) for name in before.keys() & after.keys())
    assert norms_differ == (architecture != "olmo2"), "which has no norm in front of a linear"
    expected = logits_of(AutoModelForCausalLM.from_pretrained(original).eval())
    got = logits_of(load(tmp_path / "out", device="cpu", backend="torch"))
    # Rounding to 8 bit alone makes 2 %.
    assert (got - expected).norm() < 0.06 * expected.norm()


@pytest.mark.slow
def test_awq_leaves_less_error_than_rtn_and_writes_the_folded_norms(tiny_model, text, tmp_path):
    original = outlier_model(tiny_model, tmp_path)
    expected = logits_of(AutoModelForCausalLM.from_pretrained(original).eval())
    errors = {}
    for method in ("rtn", "awq"):
        recipe = Recipe(method=method, spec=QuantSpec(group_size=32), range_search="minmax")
        quantize(original, tmp_path / method, recipe, few(text))
        errors[method] = (logits_of(load(tmp_path / method, device="cpu", backend="torch")) - expected).norm().item()
    assert errors["awq"] < 0.7 * errors["rtn"]


@pytest.mark.slow
def test_scales_that_make_the_block_worse_are_not_used(tiny_model, text, tmp_path, monkeypatch):
    monkeypatch.setattr(
        awq_scaling,
        "search_scale",
        lambda consumers, num_rows, *_: ScaleSearchResult(torch.logspace(-3, 3, num_rows), loss=0.0, unscaled_loss=1.0),
    )
    original = tiny_model("llama")
    recipe = Recipe(method="awq", spec=QuantSpec(group_size=32))
    report = quantize(original, tmp_path / "out", recipe, few(text))
    assert [note.where for note in report.notes if "scales not used" in note.what] == [
        "model.layers.0",
        "model.layers.1",
    ]
    before, after = (load_file(path / "model.safetensors") for path in (original, tmp_path / "out"))
    assert all(torch.equal(before[name], after[name]) for name in before.keys() & after.keys())


@pytest.mark.slow
def test_inputs_that_cannot_be_scaled_are_listed(tiny_model, text, tmp_path):
    report = quantize(
        tiny_model("falcon"),
        tmp_path / "out",
        Recipe(method="awq", spec=QuantSpec(group_size=32)),
        few(text),
    )
    assert not report.fallbacks
    unscaled = [note.where for note in report.notes if "not scaled" in note.what]
    assert unscaled == ["transformer.h.0.mlp.dense_4h_to_h", "transformer.h.1.mlp.dense_4h_to_h"]


@pytest.mark.slow
def test_a_run_with_folds_is_continued_to_the_same_bytes(tiny_model, text, tmp_path, monkeypatch):
    original = outlier_model(tiny_model, tmp_path, torch.bfloat16)
    recipe = Recipe(method="awq+gptq", spec=QuantSpec(group_size=32))
    probed = []

    def find_folds(probe):
        probed.append(probe.parameters["input_layernorm.weight"])
        return scale_folding.find_folds(probe)

    monkeypatch.setattr(awq_scaling, "find_folds", find_folds)
    whole = quantize(original, tmp_path / "whole", recipe, few(text))
    before, after = (load_file(path / "model.safetensors") for path in (original, tmp_path / "whole"))
    assert any(not torch.equal(before[name], after[name]) for name in before.keys() & after.keys())

    class Died(Exception):
        pass

    def die_in_block_two(progress):
        if progress.done == 2:
            raise Died

    with pytest.raises(Died):
        quantize(original, tmp_path / "out", recipe, few(text), on_progress=die_in_block_two)
    continued = quantize(original, tmp_path / "out", recipe, few(text))
    assert_same_bytes(tmp_path / "whole", tmp_path / "out")
    assert continued.linears == whole.linears
    assert continued.notes == whole.notes
    # One block may show fewer folds than another (a ReLU that no token opens), so all runs must probe the same one.
    assert len(probed) == 3
    assert all(torch.equal(norm, before["model.layers.0.input_layernorm.weight"].float()) for norm in probed)
