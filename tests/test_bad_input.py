"""Bad input of `llmquant quantize`: one line on stderr, exit code 2, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import command
from paths import ROOT
from safetensors.torch import load_file, save_file

import llmquant
from llmquant.checkpoints.manifest import read_manifest
from llmquant.progress import Phase
from llmquant.report.schema import read_report

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FEW = ("--calibration", "python-docs", "--samples", "4", "--seq-len", "32", "--group-size", "32")


def edit_json(file: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def only_pickle(model: Path) -> None:
    torch.save(load_file(model / WEIGHTS), model / "pytorch_model.bin")
    (model / WEIGHTS).unlink()


def into_shards(model: Path) -> None:
    """Split the checkpoint into two files with an index."""
    tensors = load_file(model / WEIGHTS)
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, model / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (model / WEIGHTS).unlink()


def missing_shard(model: Path) -> None:
    into_shards(model)
    (model / "model-00002-of-00002.safetensors").unlink()


def index_outside(model: Path) -> None:
    into_shards(model)
    name = "model.norm.weight"
    edit_json(model / INDEX, lambda index: index["weight_map"].update({name: "../other.safetensors"}))


def truncated(model: Path) -> None:
    content = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(content[: len(content) // 2])


def with_value(name: str, value: float) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        tensors = load_file(model / WEIGHTS)
        tensors[name].view(-1)[7] = value
        save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})

    return change


def already_quantized(model: Path) -> None:
    quantization = {"quant_method": "awq", "bits": 4, "group_size": 128}
    edit_json(model / "config.json", lambda config: config.update(quantization_config=quantization))
    tensors = load_file(model / WEIGHTS)
    tensors["model.layers.0.mlp.up_proj.qweight"] = torch.zeros(64, 12, dtype=torch.int32)
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})


def without_tensor(model: Path) -> None:
    tensors = load_file(model / WEIGHTS)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})


def as_type(model_type: str, architecture: str) -> Callable[[Path], None]:
    change = {"model_type": model_type, "architectures": [architecture]}
    return lambda model: edit_json(model / "config.json", lambda config: config.update(change))


def nothing(model: Path) -> None:
    pass


UP_1 = "model.layers.1.mlp.up_proj.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...], str]] = {
    "no such path": (shutil.rmtree, (), "model: no such folder"),
    "not a causal LM": (as_type("vit", "ViTForImageClassification"), (), "is not a causal language model"),
    "an encoder of text": (as_type("bert", "BertForMaskedLM"), (), "is not a causal language model"),
    "a model of no known type": (as_type("nonesuch", "NonesuchForCausalLM"), (), "nonesuch"),
    "only a pickle": (only_pickle, (), "only pytorch_model.bin, whose pickle could run code"),
    "truncated shard": (truncated, (), "it is truncated, download it again"),
    "missing shard": (missing_shard, (), "model-00002-of-00002.safetensors: missing"),
    "index names a file outside": (index_outside, (), "lies in '../other.safetensors'"),
    "missing tensor": (without_tensor, (), "no tensor holds parameter 'model.layers.1.mlp.up_proj.weight'"),
    "NaN in a linear": (with_value(UP_1, float("nan")), (), f"tensor '{UP_1}' holds NaN or inf"),
    "inf in a linear": (with_value(UP_1, float("-inf")), (), f"tensor '{UP_1}' holds NaN or inf"),
    "NaN in a linear, without data": (with_value(UP_1, float("nan")), ("--method", "rtn"), f"tensor '{UP_1}' holds"),
    "NaN in the embeddings": (
        with_value("model.embed_tokens.weight", float("nan")),
        (),
        "tensor 'model.embed_tokens.weight' holds NaN or inf",
    ),
    "NaN in a norm": (
        with_value("model.layers.1.input_layernorm.weight", float("nan")),
        (),
        "tensor 'model.layers.1.input_layernorm.weight' holds NaN or inf",
    ),
    "already quantized": (already_quantized, (), "already quantized (quant_method 'awq')"),
    "unknown data set": (nothing, ("--calibration", "nonesuch"), "nonesuch: not a known data set and no such file"),
    "missing text": (nothing, ("--calibration", "no/such.txt"), "no/such.txt: no such file"),
    "text too short": (nothing, ("--samples", "1000000"), "and 1000000 are requested; give a longer text"),
    "no samples": (nothing, ("--samples", "0"), "samples 0: at least 1 is needed"),
    "seq-len above the model's": (nothing, ("--seq-len", "257"), "seq_len 257: the model takes 256 tokens at most"),
    "no seq-len": (nothing, ("--seq-len", "0"), "seq_len 0: at least 1 token is needed; use --seq-len 256"),
    "negative seq-len": (nothing, ("--seq-len", "-1"), "seq_len -1: at least 1 token is needed; use --seq-len 256"),
    "seed of too many bits": (nothing, ("--seed", str(2**64)), "seed 18446744073709551616: has more than 64 bits"),
    "hub out of reach": (nothing, ("--calibration", "ptb"), "ptb: cannot be read from the Hugging Face hub"),
    "text is null": (nothing, ("--calibration", "/dev/null"), "/dev/null: is a pipe or a device"),
    "fallback too short": (
        nothing,
        ("--calibration", "auto", "--samples", "1000000"),
        "python-docs (in place of c4, which cannot be read): ",
    ),
    "group size that fits nothing": (nothing, ("--group-size", "7"), "is not a multiple of group_size 7"),
    "group size 0": (nothing, ("--group-size", "0"), "group_size 0: must be positive, or -1"),
    "unknown method": (nothing, ("--method", "magic"), "method 'magic': not one of rtn, gptq, awq, awq+gptq"),
    "unknown effort": (nothing, ("--effort", "heroic"), "effort 'heroic': not one of fast, default, best"),
    "unknown bits": (nothing, ("--bits", "5"), "bits 5: not one of 2, 3, 4, 8"),
    "unknown format": (nothing, ("--format", "zip"), "format 'zip': not one of gptq"),
    "unknown dtype": (nothing, ("--dtype", "int3"), "dtype 'int3': not one of auto"),
    "unknown device": (nothing, ("--device", "abacus"), "device 'abacus'"),
    "bits that the format cannot hold": (nothing, ("--format", "awq", "--bits", "3"), "AWQ format holds 4 bits only"),
    "skip pattern that matches nothing": (nothing, ("--skip", "*.nonesuch"), "skip pattern '*.nonesuch': matches no"),
    "everything skipped": (nothing, ("--skip", "*"), "no linear is left to quantize"),
    "no tokenizer": (lambda model: (model / "tokenizer.json").unlink(), (), "its tokenizer cannot be loaded"),
    "config.json not JSON": (lambda model: (model / "config.json").write_text("{"), (), "config.json: not valid JSON"),
}
ONLY_WITH_WEIGHTS = {case for case in DAMAGES if "NaN" in case or "inf " in case}


@pytest.fixture
def folder(tiny_model, tmp_path) -> Path:
    """A folder that holds only an intact checkpoint, in the folder `model`."""
    shutil.copytree(tiny_model("llama"), tmp_path / "model")
    return tmp_path


def refused(code: int, streams: tuple[str, str], message: str) -> None:
    out, error = streams
    progress = ("block ", "calibration text: ")
    lines = [
        line
        for line in error.splitlines()
        if line not in {phase.value for phase in Phase} and not line.startswith(progress)
    ]
    assert code == 2, error
    assert out == ""
    assert len(lines) == 1, error
    assert lines[0].startswith("llmquant: ")
    assert message in lines[0]
    assert "Traceback" not in error


@pytest.mark.slow
@pytest.mark.parametrize("case", DAMAGES)
def test_bad_input_is_one_line_and_leaves_nothing(case, folder, monkeypatch, capsys):
    damage, options, message = DAMAGES[case]
    damage(folder / "model")
    before = sorted(file.name for file in folder.iterdir())
    monkeypatch.chdir(folder)
    code = command(monkeypatch, "quantize", folder / "model", folder / "out", *FEW, *options)
    refused(code, capsys.readouterr(), message)
    assert sorted(file.name for file in folder.iterdir()) == before


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(DAMAGES.keys() - ONLY_WITH_WEIGHTS))
def test_dry_run_refuses_the_same_input_with_the_same_message(case, folder, monkeypatch, capsys):
    damage, options, message = DAMAGES[case]
    damage(folder / "model")
    monkeypatch.chdir(folder)
    errors = []
    for dry in ((), ("--dry-run",)):
        code = command(monkeypatch, "quantize", folder / "model", folder / "out", *FEW, *options, *dry, "--quiet")
        assert code == 2
        errors.append(capsys.readouterr().err)
    assert errors[0] == errors[1]
    assert message in errors[1]


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("another tool's checkpoint", "out: exists; choose another OUT (it holds config.json)"),
        ("a finished checkpoint", "out: exists; choose another OUT, or add --overwrite to replace it"),
        ("a file", "out: exists and is not a folder; choose another OUT"),
    ],
)
def test_out_that_exists_is_refused_and_left_alone(what, message, dry, folder, monkeypatch, capsys):
    out = folder / "out"
    if what == "a file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / ("config.json" if "tool" in what else "llmquant.json")).write_text("{}")
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    code = command(monkeypatch, "quantize", folder / "model", out, *FEW, *dry)
    refused(code, capsys.readouterr(), message)
    assert before == {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert sorted(file.name for file in folder.iterdir()) == ["model", "out"]


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_a_disk_that_is_too_small_is_refused(dry, folder, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    code = command(monkeypatch, "quantize", folder / "model", folder / "sub" / "out", *FEW, *dry)
    refused(code, capsys.readouterr(), "GB free; free some space")
    assert sorted(file.name for file in folder.iterdir()) == ["model"]


@pytest.mark.slow
def test_finished_blocks_are_kept_for_the_next_run_if_the_disk_fills(folder, monkeypatch, capsys):
    from llmquant.checkpoints import writer

    write, calls = writer.write_atomically, []

    def full_after_two(file, *arguments):
        if file.name.startswith("block-00001"):
            calls.append(file)
            raise writer.UserError(f"{file}: No space left on device")
        return write(file, *arguments)

    monkeypatch.setattr(writer, "write_atomically", full_after_two)
    code = command(monkeypatch, "quantize", folder / "model", folder / "out", *FEW)
    refused(code, capsys.readouterr(), "No space left on device")
    assert calls
    assert not (folder / "out").exists()
    assert (folder / "out.partial" / "parts" / "block-00000.safetensors").exists()
    monkeypatch.setattr(writer, "write_atomically", write)
    assert command(monkeypatch, "quantize", folder / "model", folder / "out", *FEW) == 0
    assert sorted(file.name for file in folder.iterdir()) == ["model", "out"]


@pytest.mark.slow
def test_error_about_a_damaged_weight_says_that_the_partial_output_is_removed(folder, monkeypatch, capsys):
    with_value(UP_1, float("nan"))(folder / "model")
    assert command(monkeypatch, "quantize", folder / "model", folder / "out", *FEW) == 2
    assert "(the output of this run is removed)" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("case", ["no such path", "only a pickle", "NaN in a linear", "unknown bits"])
def test_bad_input_in_a_separate_process(case, folder):
    damage, options, message = DAMAGES[case]
    damage(folder / "model")
    before = sorted(file.name for file in folder.iterdir())
    code = "from llmquant.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "quantize", str(folder / "model"), str(folder / "out"), *FEW, *options],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    refused(done.returncode, (done.stdout, done.stderr), message)
    assert sorted(file.name for file in folder.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "MODEL"], "give one of --prompt TEXT and --prompts FILE"),
        (["generate", "MODEL", "--prompt", "x", "--prompts", "y"], "give one of --prompt TEXT and --prompts FILE"),
        (["generate", "MODEL", "--prompts", "no/such.txt"], "no/such.txt: cannot be read (No such file or directory)"),
        (["generate", "MODEL", "--prompt", ""], "prompt: is empty"),
        (["generate", "MODEL", "--prompt", "word " * 300], "and the model's context is 256; shorten it"),
        (["generate", "MODEL", "--prompt", "x", "--max-new-tokens", "256"], "use --max-new-tokens 255 or less"),
        (["generate", "MODEL", "--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens 0: must be at least 1"),
        (["generate", "MODEL", "--prompt", "x", "--temperature", "-1"], "temperature -1.0: must not be negative"),
        (["generate", "MODEL", "--prompt", "x", "--top-p", "2"], "top_p 2.0: must be above 0 and at most 1"),
        (["generate", "MODEL", "--prompt", "x", "--top-k", "0"], "top_k 0: must be at least 1"),
        (
            ["generate", "MODEL", "--prompt", "x", "--greedy", "--top-k", "3"],
            "greedy: does not sample; omit --greedy, or omit --temperature",
        ),
        (
            ["generate", "MODEL", "--prompt", "x", "--backend", "torch"],
            "is not quantized, and backends run quantized linears only",
        ),
        (["generate", "MODEL", "--prompt", "x", "--batch-size", "0"], "batch_size 0: must be at least 1"),
        (["inspect", "no/such"], "no/such: no such folder"),
        (["inspect", "MODEL", "--backends"], "is not quantized, and backends run quantized linears only"),
        (["verify", "MODEL"], "no llmquant.json; only checkpoints that llmquant wrote can be verified"),
    ],
)
def test_bad_input_of_the_other_commands(arguments, message, tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    model = tiny_model("llama")
    code = command(monkeypatch, *(model if argument == "MODEL" else argument for argument in arguments))
    refused(code, capsys.readouterr(), message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": {"a": "b"}}, "config.json: dtype {'a': 'b'}: must be one name"),
        ({"architectures": [3]}, "config.json: architectures [3]: must be a list of class names"),
        ({"architectures": "LlamaForCausalLM"}, "config.json: architectures 'LlamaForCausalLM': must be a list"),
    ],
)
def test_values_of_another_type_in_config_json_are_one_line(fields, message, tiny_model, tmp_path, monkeypatch, capsys):
    model = Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))
    edit_json(model / "config.json", lambda config: config.update(fields))
    capsys.readouterr()
    for arguments in (("quantize", model, tmp_path / "out", "--method", "rtn"), ("generate", model, "--prompt", "x")):
        refused(command(monkeypatch, *arguments), capsys.readouterr(), message)


@pytest.mark.parametrize("arguments", ["quantize MODEL out", "inspect MODEL", "generate MODEL --prompt x"])
def test_folder_that_may_not_be_read_is_one_line(arguments, tmp_path, monkeypatch, capsys):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    # Permissions do not apply if root runs the tests.
    monkeypatch.setattr("llmquant.paths.os.access", lambda path, mode: Path(path).name != "model")
    code = command(monkeypatch, *arguments.replace("MODEL", "model").split())
    refused(code, capsys.readouterr(), "model: may not be read; check its permissions")
    for function in (llmquant.load, read_report, read_manifest):
        with pytest.raises(llmquant.UserError, match="model: may not be read"):
            function(Path("model"))


def test_folder_above_that_may_not_be_entered_is_one_line(monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "lstat", denied)
    with pytest.raises(llmquant.UserError, match="locked/model: a folder above it may not be entered"):
        llmquant.load("locked/model")
