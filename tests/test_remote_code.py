"""Python code that comes with a checkpoint never runs unless it is trusted, and all commands work if it is."""

from __future__ import annotations

import fnmatch
import json
import sys
from pathlib import Path

import pytest
import torch
import typer.main
from commands import command
from safetensors.torch import save_file
from tiny_models import VOCAB_SIZE, save_tiny_model, tiny_tokenizer

import llmquant
from llmquant.cli import app
from llmquant.errors import UserError
from llmquant.hub import load_tokenizer, resolve_model
from llmquant.models.skeleton import read_config
from llmquant.remote_code import failure_of_remote_code, remote_code_files

TRUST = "--trust-remote-code"
RAN = "with open({marker!r}, 'a') as file:\n    file.write({part!r})\n"
CONFIGURATION = """
from transformers import PretrainedConfig
class OwnConfig(PretrainedConfig):
    model_type = "own"
    def __init__(self, vocab_size=512, hidden_size=64, num_hidden_layers=1, max_position_embeddings=256, **more):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers, self.max_position_embeddings = num_hidden_layers, max_position_embeddings
        super().__init__(**more)
"""
MODEL = """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from .configuration_own import OwnConfig
class Block(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(size), nn.Linear(size, 2 * size), nn.Linear(2 * size, size)
    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))
class OwnBase(PreTrainedModel):
    config_class, base_model_prefix = OwnConfig, "model"
    def _init_weights(self, module):
        pass
class OwnModel(OwnBase):
    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Block(config.hidden_size) for _ in range(config.num_hidden_layers)])
        self.post_init()
    def get_input_embeddings(self):
        return self.embed
    def forward(self, input_ids=None, **kwargs):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x
class OwnForCausalLM(OwnBase):
    def __init__(self, config):
        super().__init__(config)
        self.model, self.lm_head = OwnModel(config), nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
    def get_output_embeddings(self):
        return self.lm_head
    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        return CausalLMOutputWithPast(logits=self.lm_head(self.model(input_ids)))
    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {"input_ids": input_ids}
"""
TOKENIZATION = """
from transformers import PreTrainedTokenizerFast
from .helper_own import HELP
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture(autouse=True)
def own_modules(tmp_path, monkeypatch):
    """Make transformers copy code into a folder of the test, and import it again in every test."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("transformers asked whether to run the code"))
    forget_modules()
    yield
    forget_modules()


def forget_modules() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]


def edit_json(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | changes))


def own_tokenizer(folder: Path, marker: Path) -> None:
    """Replace the tokenizer of a checkpoint by one that needs its own Python code."""
    (folder / "tokenization_own.py").write_text(RAN.format(marker=str(marker), part="tokenizer ") + TOKENIZATION)
    (folder / "helper_own.py").write_text("HELP = 1\n")
    auto_map = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
    edit_json(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=auto_map)


@pytest.fixture
def coded_tokenizer(tmp_path) -> Path:
    """A Llama checkpoint whose tokenizer is Python code that records in `ran` when it runs."""
    folder = save_tiny_model(tmp_path / "llama", "llama")
    own_tokenizer(folder, tmp_path / "ran")
    return folder


@pytest.fixture
def coded_model(tmp_path) -> Path:
    """A checkpoint whose configuration, model, tokenizer and processor are code that records in `ran` when it runs."""
    folder, marker = tmp_path / "own", tmp_path / "ran"
    folder.mkdir()
    tiny_tokenizer().save_pretrained(folder)
    own_tokenizer(folder, marker)
    for part, code in {"configuration": CONFIGURATION, "modeling": MODEL, "processing": ""}.items():
        (folder / f"{part}_own.py").write_text(RAN.format(marker=str(marker), part=f"{part} ") + code)
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    # No class of transformers has this name, as for ChatGLM.
    edit_json(folder / "config.json", model_type="own", architectures=["OwnModel"], auto_map=auto_map)
    edit_json(folder / "preprocessor_config.json", auto_map={"AutoProcessor": "processing_own.OwnProcessor"})
    shapes = {
        "model.embed": (VOCAB_SIZE, 64),
        "model.layers.0.up": (128, 64),
        "model.layers.0.down": (64, 128),
        "lm_head": (VOCAB_SIZE, 64),
    }
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{name}.weight": torch.randn(shape, generator=generator) / 8 for name, shape in shapes.items()}
    tensors |= {"model.layers.0.up.bias": torch.zeros(128), "model.layers.0.down.bias": torch.zeros(64)}
    tensors |= {"model.layers.0.norm.weight": torch.ones(64), "model.layers.0.norm.bias": torch.zeros(64)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


RTN = ["--method", "rtn", "--group-size", "32", "-q"]
TEXT = ["--dataset", "python-docs", "--windows", "1", "--seq-len", "32", "-q"]
TURN = ["--prompt-tokens", "4", "--new-tokens", "2", "--repeats", "1", "-q"]


def commands_on(original: Path, out: Path) -> dict[str, list[object]]:
    """The commands that open a model, in an order in which each finds the files that it needs."""
    return {
        "quantize": ["quantize", original, out, *RTN],
        "generate": ["generate", out, "--prompt", "x", "--max-new-tokens", "2"],
        "eval": ["eval", out, "--against", original, *TEXT],
        "bench": ["bench", out, "--against", original, *TURN],
        "inspect": ["inspect", out, "--backends", "--device", "cpu"],
        "convert": ["convert", out, out.with_name("dense"), "--format", "dense", "-q"],
    }


@pytest.mark.slow
def test_every_command_runs_a_model_with_its_own_code(coded_model, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    for name, arguments in commands_on(coded_model, out).items():
        assert command(monkeypatch, *arguments, TRUST) == 0, f"{name}: {capsys.readouterr().err}"
    names = {f"{part}_own.py" for part in ("configuration", "modeling", "tokenization", "processing", "helper")}
    assert names <= {file.name for file in out.iterdir()}, "the result carries the code too"
    assert names <= {file.name for file in (tmp_path / "dense").iterdir()}
    assert {"configuration", "modeling", "tokenizer"} == set((tmp_path / "ran").read_text().split())
    # Without trust, the result is refused like the original.
    for name, arguments in commands_on(coded_model, out).items():
        (tmp_path / "ran").unlink(missing_ok=True)
        capsys.readouterr()
        # An existing OUT is refused before any model is opened, so these commands replace it.
        again = ("--overwrite",) if name in ("quantize", "convert") else ()
        assert command(monkeypatch, *arguments, *again) == 2, name
        assert f"read it, then add {TRUST}" in capsys.readouterr().err, name
        assert not (tmp_path / "ran").exists(), name


def test_every_command_that_opens_a_model_has_the_option():
    for name, entry in typer.main.get_command(app).commands.items():
        options = {option for parameter in entry.params for option in parameter.opts}
        # These two commands read files that llmquant has written, and no model.
        assert (TRUST in options) == (name not in ("verify", "report")), name


@pytest.mark.slow
def test_a_tokenizer_with_its_own_code_is_refused_or_run(coded_tokenizer, tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError) as error:
        load_tokenizer(coded_tokenizer)
    why = "its tokenizer needs code that comes with it (tokenization_own.py); read it, then add"
    assert str(error.value) == f"{coded_tokenizer}: {why} {TRUST}"
    assert command(monkeypatch, "generate", coded_tokenizer, "--prompt", "x") == 2
    assert not (tmp_path / "ran").exists()
    assert type(load_tokenizer(coded_tokenizer, trust_remote_code=True)).__name__ == "OwnTokenizer"
    assert (tmp_path / "ran").exists()
    # Quantization with such a tokenizer tokenizes calibration text and verifies on text.
    calibration = ["--samples", "4", "--seq-len", "32", "--effort", "fast", "--group-size", "32", "-q"]
    out = tmp_path / "out"
    arguments = ["quantize", coded_tokenizer, out, *calibration, "--calibration", "python-docs", "--json"]
    capsys.readouterr()
    assert command(monkeypatch, *arguments, TRUST) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verification"]["verdict"] != "not measured"
    assert (out / "tokenization_own.py").is_file() and (out / "helper_own.py").is_file()


def test_code_in_another_repository_is_named_and_needs_a_network(coded_tokenizer):
    edit_json(coded_tokenizer / "tokenizer_config.json", auto_map=["some/where--tokens.Own", None])
    with pytest.raises(UserError, match=r"needs code that comes with it \(tokens.py of some/where\)"):
        load_tokenizer(coded_tokenizer)
    with pytest.raises(UserError, match="its tokenizer cannot be loaded") as error:
        load_tokenizer(coded_tokenizer, trust_remote_code=True)
    assert "\n" not in str(error.value)


def test_a_tokenizer_class_of_transformers_is_loaded_although_code_is_named(coded_tokenizer, tmp_path):
    edit_json(coded_tokenizer / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    assert load_tokenizer(coded_tokenizer)("x = 1")["input_ids"] == tiny_tokenizer()("x = 1")["input_ids"]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("auto_map", "part"),
    [
        ({"AutoConfig": "configuration_own.OwnConfig"}, r"its configuration needs .* \(configuration_own.py\)"),
        ({"AutoConfig": "a/b--c.D"}, r"its configuration needs .* \(c.py of a/b\)"),
        ({"AutoModelForCausalLM": "modeling_own.Own"}, "transformers cannot read it"),
        ({"AutoConfig": 5}, "transformers cannot read it"),
        ("AutoConfig", "transformers cannot read it"),
    ],
)
def test_a_configuration_with_its_own_code_is_refused(auto_map, part, coded_model, tmp_path):
    edit_json(coded_model / "config.json", auto_map=auto_map)
    with pytest.raises(UserError, match=part):
        read_config(coded_model)
    assert not (tmp_path / "ran").exists()


def test_a_model_with_its_own_code_and_a_configuration_of_transformers_is_refused(tiny_model, coded_model):
    (coded_model / "config.json").write_text((tiny_model("llama") / "config.json").read_text())
    auto_map = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    edit_json(coded_model / "config.json", model_type="vit", auto_map=auto_map)
    with pytest.raises(UserError, match=r"its model needs code that comes with it \(modeling_own.py\)"):
        read_config(coded_model)


@pytest.mark.parametrize("auto_map", [None, 5, "x", [], {}, {"AutoTokenizer": 5}, {"AutoTokenizer": [None, None]}])
def test_an_invalid_auto_map_names_no_files(auto_map, tmp_path):
    edit_json(tmp_path / "tokenizer_config.json", auto_map=auto_map)
    assert remote_code_files(tmp_path / "tokenizer_config.json", "AutoTokenizer") == (
        ["x.py"] if auto_map == "x" else []
    )
    assert remote_code_files(tmp_path / "missing.json", "AutoTokenizer") == []


def test_a_failure_of_the_code_is_one_line_that_names_the_file(coded_model, monkeypatch, capsys):
    file = coded_model / "modeling_own.py"
    file.write_text(file.read_text().replace("return CausalLM", "kwargs['cache'].seen_tokens\n        return CausalLM"))
    assert command(monkeypatch, "eval", coded_model, *TEXT, TRUST) == 2
    error = capsys.readouterr().err
    assert "modeling_own.py, line " in error and "the checkpoint's own code failed (KeyError: 'cache')" in error
    file.write_text("import no_such_package\n" + file.read_text())
    assert command(monkeypatch, "generate", coded_model, "--prompt", "x", TRUST) == 2
    assert "no_such_package" in capsys.readouterr().err
    file.write_text(file.read_text().replace("import no_such_package", "raise SystemExit(0)"))
    assert command(monkeypatch, "generate", coded_model, "--prompt", "x", TRUST) == 2
    assert "modeling_own.py, line 1: the checkpoint's own code failed (SystemExit" in capsys.readouterr().err


def test_a_failure_of_llmquant_is_not_attributed_to_the_code():
    try:
        llmquant.load(5, device=[])
    except Exception as error:
        assert failure_of_remote_code(error) is None


@pytest.mark.parametrize("trusted", [False, True])
def test_code_is_downloaded_from_the_hub_only_if_trusted(trusted, tmp_path, monkeypatch):
    import huggingface_hub

    fetched = []

    def snapshot_download(repo_id, *, allow_patterns, ignore_patterns):
        for name in ("config.json", "modeling_own.py", "folder/own.py"):
            allowed = any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)
            if allowed and not any(fnmatch.fnmatch(name, pattern) for pattern in ignore_patterns):
                fetched.append(name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    resolve_model("some/where", trusted)
    assert fetched == ["config.json", "modeling_own.py"][: 1 + trusted]
