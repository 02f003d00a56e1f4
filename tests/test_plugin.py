"""A quantized checkpoint in transformers: from_pretrained, pipeline, device_map and adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import llmquant
from llmquant.formats.registry import FORMATS
from llmquant.pipeline.quantize import quantize
from llmquant.runtime import plugin
from llmquant.runtime.linear import QuantizedLinear
from llmquant.spec import Options, Override, QuantSpec, Recipe

TOKENS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def small(tiny_model, tmp_path_factory):
    """`small(format, architecture, overrides)` -> the folder of a quantized tiny model. Tests must not change it."""
    folders: dict[object, Path] = {}

    def make(format: str = "gptq", architecture: str = "llama", overrides: tuple[Override, ...] = ()) -> Path:
        key = (format, architecture, overrides)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("small") / "out"
            recipe = Recipe(method="rtn", spec=QuantSpec(group_size=32), overrides=overrides)
            quantize(tiny_model(architecture), folders[key], recipe, Options(format=format, verify=False))
        return folders[key]

    return make


def open_with_transformers(folder: Path, **options: object):
    return AutoModelForCausalLM.from_pretrained(
        folder, config=llmquant.transformers_config(folder, backend="torch"), **options
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format", "architecture"),
    [
        *((format, "llama") for format in FORMATS if format != "gptq_v2"),
        ("gptq", "opt"),
        ("gptq", "gpt2"),
        ("awq", "gpt_neox"),
        ("gptq", "qwen2"),
    ],
)
def test_from_pretrained_and_load_give_the_same_model(format, architecture, small):
    folder = small(format, architecture)
    theirs, ours = open_with_transformers(folder), llmquant.load(folder, device="cpu", backend="torch")
    quantized = [name for name, module in theirs.named_modules() if isinstance(module, QuantizedLinear)]
    assert quantized == [name for name, module in ours.named_modules() if isinstance(module, QuantizedLinear)]
    with torch.no_grad():
        assert torch.equal(theirs(TOKENS).logits, ours(TOKENS).logits)
    assert theirs.is_quantized and not theirs.training


def test_mixed_precision_and_a_quantized_head_are_loaded(small):
    folder = small(
        "compressed-tensors", "llama", (Override(pattern="*.mlp.*", bits=8), Override(pattern="lm_head", bits=8))
    )
    model = open_with_transformers(folder)
    assert model.lm_head.spec.bits == 8 and model.model.layers[0].self_attn.q_proj.spec.bits == 4
    with torch.no_grad():
        expected = llmquant.load(folder, device="cpu", backend="torch")(TOKENS).logits
        assert torch.equal(model(TOKENS).logits, expected)


def test_a_pipeline_generates(small):
    folder = small()
    text = pipeline("text-generation", model=open_with_transformers(folder), tokenizer=str(folder))
    generated = text("for x in", max_new_tokens=6, do_sample=False)[0]["generated_text"]
    model, tokenizer = llmquant.load(folder, device="cpu"), AutoTokenizer.from_pretrained(folder)
    expected = model.generate(**tokenizer("for x in", return_tensors="pt"), max_new_tokens=6, do_sample=False)
    assert generated == tokenizer.decode(expected[0], skip_special_tokens=True)


def test_device_maps_place_every_linear(small):
    for device_map in ("auto", "cpu", {"": "cpu"}):
        model = open_with_transformers(small(), device_map=device_map, dtype=torch.float32)
        assert {module.device.type for module in model.modules() if isinstance(module, QuantizedLinear)} <= {
            "cpu",
            "cuda",
        }
        with torch.no_grad():
            assert torch.isfinite(model(TOKENS.to(model.device)).logits).all()


def test_dtype_applies_to_the_computation_and_not_to_the_scales(small):
    model = open_with_transformers(small(), dtype=torch.bfloat16)
    linear = model.model.layers[0].mlp.up_proj
    stored = load_file(small() / "model.safetensors")["model.layers.0.mlp.up_proj.scales"]
    exact = llmquant.load(small(), device="cpu", dtype="bfloat16", backend="torch").model.layers[0].mlp.up_proj
    assert linear.dtype == torch.bfloat16 and stored.dtype == torch.float16
    assert torch.equal(linear.dequantize(), exact.dequantize())


class Adapter(nn.Module):
    """A low-rank update beside a frozen linear, like an adapter of PEFT."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 4, bias=False)
        self.up = nn.Linear(4, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_adapters_on_frozen_codes_learn(small):
    torch.manual_seed(0)
    model = open_with_transformers(small(), dtype=torch.float32)
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear) and name.endswith(("q_proj", "down_proj")):
            model.set_submodule(name, Adapter(module))
    trained = [p for n, p in model.named_parameters() if n.endswith(("down.weight", "up.weight"))]
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is each for each in trained))
    model.train()
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_config_on_disk_keeps_the_method_that_engines_read(small):
    open_with_transformers(small())
    assert json.loads((small() / "config.json").read_text())["quantization_config"]["quant_method"] == "gptq"


def test_the_error_for_a_damaged_linear_names_it(small, tmp_path):
    for file in small().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.scales"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(llmquant.UserError, match=r"layers\.0\.mlp\.up_proj\.scales: .* NaN or inf"):
        open_with_transformers(tmp_path)


def test_a_checkpoint_that_is_not_quantized_is_refused(tiny_model):
    with pytest.raises(llmquant.UserError, match="not quantized"):
        llmquant.transformers_config(tiny_model("llama"))


def test_offloading_to_disk_works_for_other_modules_and_is_refused_for_quantized_linears(small, tmp_path):
    rest = dict.fromkeys(("model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    device_map = {"model.layers.0": "disk"} | rest
    model = open_with_transformers(small(), device_map=device_map, offload_folder=tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, open_with_transformers(small())(TOKENS).logits)
    with pytest.raises(llmquant.UserError, match="leaves it on disk"):
        open_with_transformers(small(), device_map=device_map, offload_folder=tmp_path / "b", offload_buffers=True)


def test_from_pretrained_shares_launches_before_it_enables_saving(monkeypatch):
    calls: list[str] = []
    monkeypatch.setattr(plugin, "share_launches", lambda model: calls.append("share"))
    monkeypatch.setattr(plugin, "enable_saving", lambda model, config: calls.append("save"))
    quantizer = plugin.LLMQuantizer(plugin.LLMQuantConfig())
    model: Any = torch.nn.Sequential(torch.nn.Linear(2, 2))
    quantizer._process_model_after_weight_loading(model)
    assert calls == ["share", "save"]
    model[0]._hf_hook = None  # as with a device map of several devices
    quantizer._process_model_after_weight_loading(model)
    assert calls == ["share", "save", "save"]
