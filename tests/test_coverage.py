"""The quantized share of the decoder blocks' weights, and the report of the unquantized parameters."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from commands import command
from transformers.models.llama import modeling_llama

import llmquant
from llmquant.humanize import format_percentage
from llmquant.pipeline.quantize import quantize
from llmquant.planning.coverage import coverage_of
from llmquant.planning.plan import make_plan
from llmquant.spec import Options, QuantSpec, Recipe

QUICK = Options(calibration="python-docs", num_samples=2, seq_len=16, verify=False)
ROUND = Recipe(method="rtn", spec=QuantSpec(group_size=32))


def test_experts_that_stay_in_16_bit_are_a_fallback(small_model, tmp_path, monkeypatch, capsys):
    granitemoe = small_model("granitemoe", num_local_experts=4, num_experts_per_tok=2)
    shared = ["quantize", str(granitemoe), str(tmp_path / "out"), "--method", "rtn", "--group-size", "32"]
    assert command(monkeypatch, *shared, "--dry-run") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "coverage 19.9 % of the decoder blocks' weights are quantized" in text
    assert "2 x block_sparse_moe.experts.gate_up_proj (53.1 %), 2 x block_sparse_moe.experts.down_proj (26.6 %)" in text
    assert "fallback block weights: only 19.9 % are quantized; 79.7 % stay in 16 bit unintentionally" in text
    assert command(monkeypatch, *shared, "--dry-run", "--json") == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["coverage_fallback"].startswith("only 19.9 % are quantized; 79.7 % stay in 16 bit unintentionally")
    assert command(monkeypatch, *shared, "--no-verify", "--quiet", "--strict") == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "coverage 19.9 %" in text and "fallbacks block weights: only 19.9 % are quantized" in text
    report = json.loads((tmp_path / "out" / "quantize_report.json").read_text())
    assert report["coverage"] == pytest.approx(0.1992, abs=1e-4)
    assert sum(entry["share"] for entry in report["unquantized_parameters"]) + report["coverage"] == pytest.approx(1)
    assert {entry["kind"] for entry in report["unquantized_parameters"] if not entry["is_intended"]} == {
        "block_sparse_moe.experts.gate_up_proj",
        "block_sparse_moe.experts.down_proj",
    }


def test_linears_that_the_user_skips_are_listed_without_a_fallback(tiny_model):
    plan = make_plan(tiny_model("llama"), replace(ROUND, skip=("*.down_proj",)), QUICK)
    coverage = coverage_of(plan)
    (entry,) = coverage.unquantized
    assert (entry.kind, entry.count, entry.weights, entry.reason) == (
        "mlp.down_proj",
        2,
        2 * 64 * 96,
        "--skip '*.down_proj'",
    )
    assert coverage.share == pytest.approx(1 - entry.share) and coverage.fallback() is None


def test_dense_model_is_fully_covered(tiny_model):
    for architecture in ("llama", "gpt2", "falcon"):
        coverage = coverage_of(make_plan(tiny_model(architecture), ROUND, QUICK))
        assert (coverage.share, coverage.unquantized) == (1.0, ())


def test_small_parameters_and_convolutions_are_listed_without_a_fallback(small_model):
    coverage = coverage_of(make_plan(small_model("mamba", state_size=16, time_step_rank=32), ROUND, QUICK))
    assert {entry.kind for entry in coverage.unquantized} == {"mixer.A_log", "mixer.conv1d.weight"}
    assert coverage.share < 0.99 and coverage.fallback() is None


def test_routers_stay_in_16_bit_without_a_fallback(small_model, tmp_path):
    model = small_model("llama4_text", head_dim=16, num_local_experts=4, intermediate_size_mlp=64)
    report = quantize(model, tmp_path / "out", ROUND, QUICK)
    routers = {name for name in report.unquantized_linears if "router" in name}
    assert len(routers) == 2 and not any("router" in fallback.where for fallback in report.fallbacks)
    assert [fallback.where for fallback in report.fallbacks] == ["block weights"]


@pytest.mark.slow
@pytest.mark.parametrize("change", ["hook", "second name"])
def test_linears_that_a_loader_would_replace_wrongly_stay_in_16_bit(change, tiny_model, tmp_path, monkeypatch):
    original_init = modeling_llama.LlamaMLP.__init__

    def changed(self, *arguments):
        original_init(self, *arguments)
        if change == "hook":
            self.up_proj.register_forward_hook(lambda module, inputs, output: 0.5 * output)
        else:
            self.again = self.up_proj

    monkeypatch.setattr(modeling_llama.LlamaMLP, "__init__", changed)
    model, out = tiny_model("llama"), tmp_path / "out"
    report = quantize(model, out, ROUND, replace(QUICK, verify=True))
    assert {name.rpartition(".")[2] for name in report.unquantized_linears} == {"up_proj", "lm_head"}
    assert [fallback.where for fallback in report.fallbacks] == ["block weights"]
    ids = torch.arange(3, 40)[None]
    ours, original = (llmquant.load(folder, device="cpu")(ids).logits for folder in (out, model))
    assert 0 < (ours - original).norm() / original.norm() < 0.3


def test_percentage_never_rounds_to_0_or_100():
    assert [format_percentage(share) for share in (0.0, 1e-9, 0.0004, 0.059, 0.9794, 0.99999, 1.0)] == [
        "0 %",
        "0.01 %",
        "0.04 %",
        "5.9 %",
        "97.9 %",
        "99.99 %",
        "100 %",
    ]
