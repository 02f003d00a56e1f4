"""Malicious and inconsistent models: their code never runs, no pickle is opened, and they are refused in one line."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmquant
from llmquant.checkpoints.summary import inspect
from llmquant.conversion import convert
from llmquant.errors import UserError
from llmquant.hub import load_tokenizer
from llmquant.models.skeleton import read_config
from llmquant.pipeline.quantize import dry_run, quantize
from llmquant.spec import Options, QuantSpec, Recipe

QUICK = Options(verify=False)
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory) -> Path:
    """A quantized checkpoint; tests must not write into it."""
    out = tmp_path_factory.mktemp("whole") / "out"
    quantize(tiny_model("llama"), out, Recipe(method="rtn", spec=QuantSpec(group_size=32)), QUICK)
    return out


@pytest.fixture
def model(whole, tmp_path) -> Path:
    """A copy of the quantized checkpoint for a test to damage."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


# --- code ------------------------------------------------------------------------------------------------------------


def plant(folder: Path, marker: Path) -> None:
    """Put code that touches `marker` into every place from which transformers can run code."""
    (folder / "evil.py").write_text(
        f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class Config(LlamaConfig):\n    pass\nclass Model(LlamaForCausalLM):\n    pass\n"
        "class Tokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit_config(folder, auto_map=auto_map | {"AutoTokenizer": [None, "evil.Tokenizer"]})
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": [None, "evil.Tokenizer"]}, "tokenizer_class": "Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "custom_generate").mkdir(exist_ok=True)
    (folder / "custom_generate" / "generate.py").write_text((folder / "evil.py").read_text())


ENTRY_POINTS: dict[str, Callable[[Path, Path], object]] = {
    "load": lambda model, out: llmquant.load(model, device="cpu", backend="torch"),
    "convert": lambda model, out: convert(model, out, "awq"),
    "dense": lambda model, out: convert(model, out, "dense"),
    "inspect": lambda model, out: inspect(model),
    "tokenizer": lambda model, out: load_tokenizer(model),
    "transformers_config": lambda model, out: llmquant.transformers_config(model),
}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "nonesuch"])
@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_code_of_a_checkpoint_is_never_run(entry_point, model_type, model, tmp_path):
    plant(model, tmp_path / "ran")
    edit_config(model, model_type=model_type)
    try:
        ENTRY_POINTS[entry_point](model, tmp_path / "out")
    except UserError as error:
        assert "\n" not in str(error)
    assert not (tmp_path / "ran").exists()


def test_code_of_an_original_is_never_run(tiny_model, tmp_path):
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))
    plant(folder, tmp_path / "ran")
    for model_type in ("llama", "nonesuch"):
        edit_config(folder, model_type=model_type)
        try:
            dry_run(folder, tmp_path / "out", Recipe(method="rtn", spec=QuantSpec(group_size=32)))
        except UserError as error:
            assert "\n" not in str(error)
    assert not (tmp_path / "ran").exists()


def test_planted_code_runs_with_trust_remote_code(model, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", list(sys.path))
    plant(model, tmp_path / "ran")
    read_config(model, trust_remote_code=True)
    assert (tmp_path / "ran").exists()


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pth", "x.ckpt"])
def test_pickles_beside_the_weights_are_not_opened(name, model, tmp_path):
    torch.save(Bomb(tmp_path / "ran"), model / name)
    for entry_point, call in ENTRY_POINTS.items():
        call(model, tmp_path / entry_point)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "convert" / name).exists(), "it must not be copied either"


# --- models that contradict their config -----------------------------------------------------------------------------


def renamed(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if ".1.mlp.up_proj." in name]:
        tensors[name.replace("up_proj", "sideways_proj")] = tensors.pop(name)


Q_BIAS = "model.layers.0.self_attn.q_proj.bias"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a billion blocks": (lambda f: edit_config(f, num_hidden_layers=10**9), "num_hidden_layers 1000000000, but"),
    "no blocks": (lambda f: edit_config(f, num_hidden_layers=0), "is no linear of the model"),
    "fewer blocks": (lambda f: edit_config(f, num_hidden_layers=1), "is no linear of the model"),
    "more blocks": (lambda f: edit_config(f, num_hidden_layers=3), "no tensor holds parameter"),
    "negative blocks": (lambda f: edit_config(f, num_hidden_layers=-1), "config.json|no linear of the model"),
    "another hidden size": (lambda f: edit_config(f, hidden_size=128), "but config.json gives the shape"),
    "an absurd hidden size": (lambda f: edit_config(f, hidden_size=2**40), "config.json"),
    "hidden size a string": (lambda f: edit_config(f, hidden_size="64"), "config.json"),
    "another feed-forward size": (lambda f: edit_config(f, intermediate_size=64), "but config.json gives the shape"),
    "no heads": (lambda f: edit_config(f, num_attention_heads=0), "config.json"),
    "heads that do not divide": (lambda f: edit_config(f, num_attention_heads=7), "config.json"),
    "an absurd vocabulary": (lambda f: edit_config(f, vocab_size=2**60), "config.json"),
    "a vocabulary of -1": (lambda f: edit_config(f, vocab_size=-1), "config.json"),
    "an unknown activation": (lambda f: edit_config(f, hidden_act="os.system"), "config.json"),
    "an unknown dtype": (lambda f: edit_config(f, dtype="float3", torch_dtype="float3"), "config.json"),
    "another kind of model": (lambda f: edit_config(f, model_type="vit"), "is not a causal language model"),
    "a model of no type": (lambda f: edit_config(f, model_type=None), "config.json"),
    "rotary settings of strings": (lambda f: edit_config(f, rope_parameters={"rope_type": "x"}), "config.json"),
    "a packed linear that the model lacks": (lambda f: edit_tensors(f, renamed), "sideways_proj' is no linear"),
    "the embedding of another shape": (
        lambda f: edit_tensors(f, lambda t: t.update({"model.embed_tokens.weight": torch.zeros(3, 64)})),
        "'model.embed_tokens.weight' has shape",
    ),
    "a norm is missing": (
        lambda f: edit_tensors(f, lambda t: t.pop("model.norm.weight")),
        "no tensor holds parameter 'model.norm.weight'",
    ),
    "a bias of another shape": (
        lambda f: (
            edit_config(f, attention_bias=True),
            edit_tensors(f, lambda t: t.update({Q_BIAS: torch.zeros(1)})),
        ),
        "q_proj.bias' has shape",
    ),
    "a bias is missing": (lambda f: edit_config(f, attention_bias=True), "bias"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_model_that_contradicts_its_config_is_refused_in_one_line(case, model):
    damage, message = DAMAGES[case]
    damage(model)
    with pytest.raises(UserError, match=message) as error:
        llmquant.load(model, device="cpu", backend="torch")
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


@pytest.mark.parametrize("case", ["a billion blocks", "an absurd hidden size", "no heads", "another kind of model"])
def test_every_function_that_builds_the_model_refuses_it(case, model, tmp_path):
    DAMAGES[case][0](model)
    for entry_point in ("convert", "dense"):
        with pytest.raises(UserError):
            ENTRY_POINTS[entry_point](model, tmp_path / entry_point)
        assert not (tmp_path / entry_point).exists()
