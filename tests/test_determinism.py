"""The same inputs, options and machine give the same bytes, and the manifest in OUT records them.

Other tests cover resumed runs (`test_faults.py`), activations on the disk (`test_memory.py`), and several ranks
(`test_ranks.py`).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from folders import artifact_bytes
from safetensors.torch import load_file, save_file

from llmquant import __version__
from llmquant.data.calibration import calibration_tokens
from llmquant.hub import load_tokenizer
from llmquant.models import blockwise_forward
from llmquant.pipeline import finish
from llmquant.pipeline import quantize as pipeline
from llmquant.spec import Options, QuantSpec, Recipe

pytestmark = pytest.mark.slow

RECIPE = Recipe(spec=QuantSpec(group_size=32))
MANIFEST = "llmquant.json"


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Options:
    monkeypatch.setattr(finish, "write_page", lambda report, file: None)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"It was a dark and stormy night, the {number}th in a row." for number in range(60)))
    return Options(calibration=str(text), num_samples=10, seq_len=32, verify=False)


def test_two_runs_give_the_same_bytes_for_any_number_of_sequences_between_trims(
    options, tiny_model, tmp_path, monkeypatch
):
    pipeline.quantize(tiny_model("llama"), tmp_path / "one", RECIPE, options)
    monkeypatch.setattr(blockwise_forward, "SEQUENCES_BETWEEN_TRIMS", 1)
    pipeline.quantize(tiny_model("llama"), tmp_path / "two", RECIPE, options)
    assert artifact_bytes(tmp_path / "one") == artifact_bytes(tmp_path / "two")


def test_order_of_tensors_in_the_shards_does_not_change_the_weights(options, tiny_model, tmp_path):
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
        outs.append(artifact_bytes(tmp_path / f"out-{number}"))
    manifests = [json.loads(out.pop(MANIFEST)) for out in outs]
    assert outs[0] == outs[1]
    assert manifests[0]["files"] == manifests[1]["files"]
    assert manifests[0]["request"].pop("model") != manifests[1]["request"].pop("model"), "the files of the model differ"
    assert manifests[0] == manifests[1]


def test_manifest_records_the_request_and_every_hash(options, tiny_model, tmp_path):
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
    written = artifact_bytes(out)
    del written[MANIFEST]
    assert {name: record["sha256"] for name, record in manifest["files"].items()} == {
        name: hashlib.sha256(content).hexdigest() for name, content in written.items()
    }
