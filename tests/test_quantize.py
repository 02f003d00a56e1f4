"""The whole path on tiny random models: quantize, write, load, run; for every architecture by the same code."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from dequantized_models import dequantized
from folders import assert_same_bytes
from safetensors.torch import load_file
from tiny_models import ARCHITECTURES
from transformers import AutoModelForCausalLM

from llmquant.checkpoints.quantized import parsed_quantization
from llmquant.checkpoints.reader import CheckpointReader
from llmquant.data.calibration import calibration_tokens
from llmquant.errors import UserError
from llmquant.formats.registry import FORMATS
from llmquant.hub import load_tokenizer
from llmquant.pipeline.quantize import quantize
from llmquant.runtime.linear import QuantizedLinear
from llmquant.runtime.load import load
from llmquant.spec import Options, QuantSpec, Recipe

GROUP_32 = QuantSpec(group_size=32)
FEW = Options(calibration="python-docs", num_samples=4, seq_len=32, verify=False)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_quantizes_and_runs_as_its_dequantized_self(architecture, tiny_model, tmp_path):
    original = tiny_model(architecture)
    out = tmp_path / "out"
    report = quantize(original, out, Recipe(spec=GROUP_32), FEW)
    assert not report.fallbacks, report.fallbacks
    model = load(out, device="cpu", backend="torch")
    packed = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    assert len(packed) == len(report.linears) > 0
    assert all(linear.error <= linear.rtn_error for linear in report.linears)
    tokens = torch.randint(3, 500, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = model(tokens).logits, dequantized(original, out)(tokens).logits
    assert torch.allclose(ours.float(), theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


@pytest.mark.slow
def test_gptq_leaves_less_error_than_rtn(tiny_model, tmp_path):
    original = tiny_model("llama")
    tokens = calibration_tokens(load_tokenizer(original), "python-docs", 8, 64, seed=1).tokens_SL
    with torch.no_grad():
        reference = AutoModelForCausalLM.from_pretrained(original).eval()(tokens).logits.float()
    errors = {}
    for method in ("rtn", "gptq"):
        recipe = Recipe(method=method, spec=QuantSpec(bits=3, group_size=32))
        quantize(original, tmp_path / method, recipe, Options(calibration="python-docs", num_samples=32, seq_len=64))
        with torch.no_grad():
            logits = load(tmp_path / method, device="cpu", backend="torch")(tokens).logits.float()
        errors[method] = (logits - reference).square().mean().item()
    assert errors["gptq"] < 0.7 * errors["rtn"]


def test_untouched_tensors_are_those_of_the_checkpoint(tiny_model, tmp_path):
    original = tiny_model("qwen2")
    quantize(original, tmp_path / "out", Recipe(method="rtn", spec=GROUP_32))
    before, after = load_file(original / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    kept = before.keys() & after.keys()
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight"} <= kept
    assert "lm_head.weight" not in after, "tied: stored once, as in the original"
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert {name.rpartition(".")[2] for name in before.keys() - kept} == {"weight"}


@pytest.mark.slow
def test_a_run_that_died_is_continued_to_the_same_bytes(tiny_model, tmp_path):
    original = tiny_model("llama", num_hidden_layers=3)
    recipe = Recipe(spec=GROUP_32)
    whole = quantize(original, tmp_path / "whole", recipe, FEW)

    class Died(Exception):
        pass

    def die_in_block_two(progress):
        if progress.done == 2:
            raise Died

    with pytest.raises(Died):
        quantize(original, tmp_path / "out", recipe, FEW, on_progress=die_in_block_two)
    assert not (tmp_path / "out").exists()
    continued = quantize(original, tmp_path / "out", recipe, FEW)
    assert_same_bytes(tmp_path / "whole", tmp_path / "out")
    assert continued.linears == whole.linears
    assert {linear.kind for linear in whole.linears if linear.correction_shrinkage} >= {"mlp.down_proj", "mlp.up_proj"}


@pytest.mark.slow
def test_config_says_what_was_done(tiny_model, tmp_path):
    quantize(tiny_model("llama"), tmp_path / "out", Recipe(method="rtn", spec=GROUP_32, skip=("*.down_proj",)))
    reader = CheckpointReader(tmp_path / "out")
    parsed = parsed_quantization(reader)
    assert parsed.format.name == "gptq"
    assert parsed.spec_of("model.layers.0.mlp.up_proj") == GROUP_32
    assert parsed.spec_of("model.layers.0.mlp.down_proj") is None
    assert "model.layers.0.mlp.down_proj.weight" in reader.tensors


def test_checkpoint_that_does_not_come_back_is_not_called_done(tiny_model, tmp_path, monkeypatch):
    pack = FORMATS["gptq"].pack

    def forgetful(weight):
        tensors = pack(weight)
        tensors["qweight"][0, 0] ^= 1
        return tensors

    monkeypatch.setitem(FORMATS, "gptq", replace(FORMATS["gptq"], pack=forgetful))
    with pytest.raises(UserError, match="q_proj' read back from the disk differs from the written one"):
        quantize(tiny_model("llama"), tmp_path / "out", Recipe(method="rtn", spec=GROUP_32))
