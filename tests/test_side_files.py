"""Which files beside the weights are copied into OUT and downloaded from the hub."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import command
from huggingface_hub.utils import filter_repo_objects

import llmquant
from llmquant.checkpoints.reader import CheckpointReader
from llmquant.checkpoints.side_files import CODE_FILES, code_files, find_side_files
from llmquant.errors import UserError
from llmquant.hub import ALLOWED_PATTERNS, IGNORED_PATTERNS
from llmquant.pipeline.output import files_beside


def names(text: str) -> list[str]:
    return text.split()


COPIED = names("""
config.json generation_config.json tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json
vocab.json merges.txt vocab.txt spiece.model sentencepiece.bpe.model tokenizer.model tokenizer.model.v3 spm_char.model
bpe.codes vocab.bpe source.spm target.spm prophetnet.tokenizer dict.txt entity_vocab.json qwen.tiktoken tiktoken.model
tekken.json sentencepiece.vocab rwkv_vocab_v20230424.txt preprocessor_config.json processor_config.json
video_preprocessor_config.json audio_tokenizer_config.json chat_template.json chat_template.jinja
additional_chat_templates/rag.jinja README.md readme.md README_zh.md README LICENSE LICENCE LICENSE.md License.txt
MODEL_LICENSE LICENSE-CODE NOTICE Notice.txt NOTICE.md USE_POLICY.md COPYING notes.txt
""")
"""Names that transformers' tokenizers and processors give their files, and documents."""
NOT_COPIED = names("""
trainer_state.json training_args.bin optimizer.pt scheduler.pt rng_state_0.pth all_results.json adapter_config.json
adapter_model.bin adapter_model.safetensors adapter_model.safetensors.index.json pytorch_model.bin
pytorch_model.bin.index.json pytorch_model.bin.index.fp16.json model.safetensors.index.fp16.json
tf_model.h5.index.json consolidated.safetensors.index.json params.json ._config.json ._LICENSE .gitattributes
model.gguf picture.png setup.py onnx/config.json onnx/tokenizer.json onnx/LICENSE original/params.json
additional_chat_templates/deep/x.jinja
""")
"""Files that do not belong to the model."""
STORAGE = names("""
model.safetensors.index.json llmquant.json quantize_report.json quantize_config.json quant_config.json
quantization_config.json hf_quant_config.json
""")
"""Files that describe the stored weights."""


def fill(folder: Path, files: list[str]) -> None:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


@pytest.fixture
def model(tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a tiny model in the current folder."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))


def name_code(folder: Path, config: str, auto_map: object) -> None:
    content = json.loads((folder / config).read_text()) if (folder / config).exists() else {}
    (folder / config).write_text(json.dumps(content | {"auto_map": auto_map}))


# --- names -----------------------------------------------------------------------------------------------------------


def test_only_files_of_the_model_are_copied(tmp_path):
    fill(tmp_path, [*COPIED, *NOT_COPIED, *STORAGE])
    found = find_side_files(tmp_path, lambda path: None)
    assert sorted(found.copied) == sorted(COPIED)
    assert found.outside_links == {}
    assert set(found.not_copied) == {
        *("adapter_config.json", "adapter_model.bin", "adapter_model.safetensors"),
        *("adapter_model.safetensors.index.json", "picture.png", "setup.py"),
        *("onnx/", "original/", "additional_chat_templates/deep/"),
    }


def test_the_hub_download_has_the_same_files_and_the_weights():
    weights = ["model.safetensors", "model-00001-of-00002.safetensors"]
    in_sub_folders = [f"sub/{name}" for name in (*COPIED, *weights, "module.py") if not name.endswith(".jinja")]
    in_repository = [*COPIED, *NOT_COPIED, *STORAGE, *weights, *in_sub_folders]
    untrusted = [*IGNORED_PATTERNS, *CODE_FILES]
    downloaded = set(filter_repo_objects(in_repository, allow_patterns=ALLOWED_PATTERNS, ignore_patterns=untrusted))
    templates = {name for name in NOT_COPIED if name.endswith(".jinja")}
    # The configuration of an adapter is downloaded too, because it names the base model.
    assert sorted(downloaded - templates) == sorted([*COPIED, *STORAGE, *weights, "adapter_config.json"])
    with_code = set(
        filter_repo_objects(in_repository, allow_patterns=ALLOWED_PATTERNS, ignore_patterns=IGNORED_PATTERNS)
    )
    assert with_code - downloaded == {name for name in NOT_COPIED if name.endswith(".py")} != set()


@pytest.mark.parametrize("config", ["config.json", "tokenizer_config.json", "processor_config.json"])
def test_code_that_a_configuration_names_is_copied_with_its_imports(config, tmp_path):
    auto_map = {"AutoModelForCausalLM": "modeling_x.X", "AutoTokenizer": ["tokenization_x.T", None]}
    name_code(tmp_path, config, auto_map | {"AutoConfig": "org/name--configuration_y.C"})
    modules = [
        "modeling_x",
        "tokenization_x",
        "configuration_y",
        "helper",
        "deep",
        "one",
        "two",
        "setup",
        "zero_to_fp32",
    ]
    fill(tmp_path, [f"{name}.py" for name in modules])
    (tmp_path / "modeling_x.py").write_text(
        "import torch\nfrom .helper import a\nfrom . import (\n  one,\n  two as b\n)\n"
    )
    (tmp_path / "helper.py").write_text("def f():\n    from .deep import x\nfrom .modeling_x import X\n")
    code = {"modeling_x.py", "tokenization_x.py", "helper.py", "deep.py", "one.py", "two.py"}
    assert code_files(tmp_path) == code
    found = find_side_files(tmp_path, lambda path: None)
    assert code == {name for name in found.copied if name.endswith(".py")}
    assert set(found.not_copied) == {"configuration_y.py", "setup.py", "zero_to_fp32.py"}


def test_a_list_in_the_auto_map_of_a_tokenizer_names_code_too(tmp_path):
    fill(tmp_path, ["tokenization_x.py"])
    name_code(tmp_path, "tokenizer_config.json", ["tokenization_x.X", None])
    assert code_files(tmp_path) == {"tokenization_x.py"}


@pytest.mark.parametrize(
    "auto_map", [None, 3, [], "x.Y", {"A": 3}, {"A": [3, None]}, {"A": "../evil.X"}, {"A": "/etc/x.X"}]
)
def test_an_auto_map_without_files_of_the_folder_copies_no_code(auto_map, tmp_path):
    (tmp_path / "evil.py").write_text("")
    (tmp_path / "model").mkdir()
    name_code(tmp_path / "model", "config.json", auto_map)
    (tmp_path / "model" / "tokenizer_config.json").write_text("{")
    assert code_files(tmp_path / "model") == set()


# --- links -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_document_that_links_out_of_the_folder_is_not_copied_and_is_a_fallback(model, monkeypatch, capsys):
    (model.parent / "secret").write_text("secret")
    (model / "notes.txt").symlink_to("../secret")
    (model / "LICENSE").symlink_to("nowhere")
    (model / "real.txt").write_text("inside")
    (model / "alias.txt").symlink_to("real.txt")
    (model / "picture.png").write_text("x")
    dry = ("quantize", model, "out", "--method", "rtn", "--group-size", "32", "--no-verify", "--dry-run")
    assert command(monkeypatch, *dry) == 0
    output = " ".join(capsys.readouterr().out.split())
    # One label precedes several lines.
    assert "fallback LICENSE: not copied: a link to" in output and " notes.txt: not copied: a link to" in output
    assert "notes beside the weights: not copied: picture.png" in output
    (model / "picture.png").unlink()
    options = llmquant.Options(verify=False)
    report = llmquant.quantize(
        model, "out", llmquant.Recipe(method="rtn", spec=llmquant.QuantSpec(group_size=32)), options
    )
    assert [(each.where, each.what) for each in report.fallbacks] == [
        ("LICENSE", f"not copied: a link to {model / 'nowhere'}, which does not exist"),
        ("notes.txt", f"not copied: a link to {model.parent / 'secret'}, outside the checkpoint"),
    ]
    out = model.parent / "out"
    assert not {"notes.txt", "LICENSE"} & {file.name for file in out.iterdir()}
    assert (out / "alias.txt").read_text() == "inside" and not (out / "alias.txt").is_symlink()
    (out / "notes.txt").symlink_to(model.parent / "secret")
    assert command(monkeypatch, "convert", out, "dense", "--format", "dense", "--quiet", "--json") == 0
    assert json.loads(capsys.readouterr().out)["fallbacks"] == [
        f"notes.txt: not copied: a link to {model.parent / 'secret'}, outside the checkpoint"
    ]
    assert not (model.parent / "dense" / "notes.txt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt", "additional_chat_templates", "modeling_x.py"])
def test_a_loaded_file_that_links_out_of_the_folder_is_refused(name, model, monkeypatch, capsys):
    name_code(model, "tokenizer_config.json", {"AutoModel": "modeling_x.X"})
    (model.parent / "elsewhere").mkdir()
    (model.parent / "elsewhere" / "a.jinja").write_text("x")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to("../elsewhere" if "templates" in name else "../elsewhere/a.jinja")
    for dry in (("--dry-run",), ()):
        assert command(monkeypatch, "quantize", model, "out", "--method", "rtn", "--quiet", *dry) == 2
        error = capsys.readouterr().err
        assert f"model/{name}" in error and "outside the checkpoint; copy the file into the folder" in error
    assert sorted(file.name for file in model.parent.iterdir()) == ["elsewhere", "model"]


def test_special_files_and_names_that_are_not_utf_8_are_not_copied(model):
    os.mkfifo(model / "pipe.json")
    (model / "folder.txt").mkdir()
    (model / os.fsdecode(b"a\xff.txt")).write_text("x")
    reader = CheckpointReader(model)
    assert find_side_files(model, reader.check_link).not_copied == ("a\\udcff.txt", "folder.txt/", "pipe.json")
    assert not {"pipe.json", "folder.txt"} & files_beside(reader).keys()


def test_an_unreadable_file_is_a_one_line_error(model, monkeypatch):
    reader = CheckpointReader(model)
    real = Path.read_bytes

    def denied(path: Path) -> bytes:
        if path.name == "tokenizer.json":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(
        UserError, match=r"tokenizer\.json: cannot be read \(Permission denied\); check its permissions"
    ):
        files_beside(reader)


@pytest.mark.slow
def test_a_run_lists_files_that_it_does_not_copy_and_verifies_those_that_it_copies(model, monkeypatch, capsys):
    fill(model, ["additional_chat_templates/rag.jinja", "README.md", "adapter_config.json", "picture.png", "runs/log"])
    arguments = ("--method", "rtn", "--group-size", "32", "--no-verify", "--quiet", "--json")
    assert command(monkeypatch, "quantize", model, "out", *arguments) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert notes == [{"where": "beside the weights", "what": "not copied: adapter_config.json, picture.png, runs/"}]
    assert command(monkeypatch, "verify", "out") == 0
    assert (model.parent / "out" / "additional_chat_templates" / "rag.jinja").read_text() == "{}"
    assert command(monkeypatch, "convert", "out", "awq", "--format", "awq", "--quiet") == 0
    assert (model.parent / "awq" / "additional_chat_templates" / "rag.jinja").exists()
    assert command(monkeypatch, "quantize", model, "out", *arguments, "--overwrite") == 0


@pytest.mark.slow
def test_a_lone_surrogate_in_the_configuration_is_kept(model):
    """JSON may hold a lone surrogate as an escape, but UTF-8 cannot."""
    config = json.loads((model / "config.json").read_text()) | {"note": "a\ud800b"}
    (model / "config.json").write_text(json.dumps(config))
    recipe = llmquant.Recipe(method="rtn", spec=llmquant.QuantSpec(group_size=32))
    llmquant.quantize(model, "out", recipe, llmquant.Options())
    assert json.loads(Path("out", "config.json").read_bytes())["note"] == "a\ud800b"
