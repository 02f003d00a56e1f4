"""The same inputs, options and machine give the same bytes; and OUT says what they were.

That a resumed run does too is held by `test_faults.py`, with activations on the disk by `test_memory.py`, with several
ranks by `test_ranks.py`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from faults import contents
from safetensors.torch import load_file, save_file

from llmquant import __version__
from llmquant.hub import load_tokenizer
from llmquant.models import walk
from llmquant.pipeline import quantize as pipeline
from llmquant.pipeline.calibration import calibration_tokens
from llmquant.spec import Options, QuantSpec, Recipe

RECIPE = Recipe(spec=QuantSpec(group_size=32))
MANIFEST = "llmquant.json"


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Options:
    monkeypatch.setattr(pipeline, "write_page", lambda report, file: None)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"It was a dark and stormy night, the {number}th in a row." for number in range(60)))
    return Options(calibration=str(text), num_samples=10, seq_len=32, verify=False)


def test_twice_gives_the_same_bytes_also_where_fewer_sequences_run_between_two_trims(
    options, tiny_model, tmp_path, monkeypatch
):
    pipeline.quantize(tiny_model("llama"), tmp_path / "one", RECIPE, options)
    monkeypatch.setattr(walk, "SEQUENCES_BETWEEN_TRIMS", 1)
    pipeline.quantize(tiny_model("llama"), tmp_path / "two", RECIPE, options)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_shards_in_another_order_on_the_disk_give_the_same_weights(options, tiny_model, tmp_path):
    model, other = tiny_model("llama"), tmp_path / "other"
    shutil.copytree(model, other)
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors, reverse=True)
    weight_map = {}
    for number, part in enumerate((names[1::3], names[::3], names[2::3]), start=1):
        file = f"model-{number:05}-of-00003.safetensors"
        save_file({name: tensors[name] for name in part}, other / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (other / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (other / "model.safetensors").unlink()
    outs = []
    for number, path in enumerate((model, other)):
        pipeline.quantize(path, tmp_path / f"out-{number}", RECIPE, options)
        outs.append(contents(tmp_path / f"out-{number}"))
    manifests = [json.loads(out.pop(MANIFEST)) for out in outs]
    assert outs[0] == outs[1]
    assert manifests[0]["files"] == manifests[1]["files"]
    assert manifests[0]["request"].pop("model") != manifests[1]["request"].pop("model"), "its files are others"
    assert manifests[0] == manifests[1]


def test_manifest_says_what_was_asked_and_holds_every_hash(options, tiny_model, tmp_path):
    model, out = tiny_model("llama"), tmp_path / "out"
    pipeline.quantize(model, out, RECIPE, options)
    manifest = json.loads((out / MANIFEST).read_text())
    request = manifest["request"]
    assert request["recipe"]["method"] == "gptq"
    assert request["recipe"]["spec"] == {"bits": 4, "group_size": 32, "symmetric": True}
    assert (request["format"], request["dtype"], request["device"]) == ("gptq", "float32", "cpu")
    versions = {name: request[name] for name in ("llmquant", "torch", "transformers")}
    assert versions == {
        "llmquant": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    sha256 = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in model.iterdir()}
    assert request["model"] == {name: sha256[name] for name in ("config.json", "model.safetensors")}
    tokens = calibration_tokens(load_tokenizer(model), options.calibration, 10, 32).tokens_SL
    assert request["calibration"]["sha256"] == hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    assert (request["calibration"]["num_samples"], request["calibration"]["seed"]) == (10, 0)
    written = contents(out)
    del written[MANIFEST]
    assert {name: record["sha256"] for name, record in manifest["files"].items()} == {
        name: hashlib.sha256(content).hexdigest() for name, content in written.items()
    }
