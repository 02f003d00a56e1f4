"""Tensors are read exactly as stored, and a file that cannot be read is named."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from checkpoint_parts import REQUEST, write_checkpoint
from malformed_files import SHARDS, edit_json, edit_tensor, good_checkpoint, write_json
from safetensors.torch import save_file
from torch import Tensor

from llmquant.checkpoints import reader as reader_module
from llmquant.checkpoints.header import SAFETENSORS_DTYPES
from llmquant.checkpoints.quantized import (
    find_quantized_modules,
    parsed_quantization,
    read_quantized,
    validate_quantized,
)
from llmquant.checkpoints.reader import CheckpointReader, file_sha256
from llmquant.checkpoints.writer import PartialCheckpoint
from llmquant.errors import UserError
from llmquant.formats.registry import FORMATS
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight


def test_every_dtype_is_read_as_the_safetensors_library_reads_it(tmp_path):
    tensors = {
        name: torch.zeros(2, 3).to(dtype) if dtype == torch.bool else _filled(dtype)
        for name, dtype in SAFETENSORS_DTYPES.items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    reader = CheckpointReader(tmp_path)
    for name in tensors:
        tensor = reader.read(name)
        assert tensor.dtype == tensors[name].dtype and tensor.shape == tensors[name].shape
        assert torch.equal(tensor.view(torch.uint8), tensors[name].view(torch.uint8))
        assert b"".join(bytes(chunk) for chunk in reader.chunks(name)) == bytes(
            tensor.view(torch.uint8).flatten().tolist()
        )
    assert reader.total_bytes == sum(tensor.nbytes for tensor in tensors.values())


def _filled(dtype: torch.dtype) -> Tensor:
    return torch.arange(6 * dtype.itemsize, dtype=torch.uint8).view(dtype).reshape(2, 3)


@pytest.mark.slow
def test_reading_does_not_map_the_file_into_memory(tmp_path):
    """Read a 64 MiB file tensor by tensor in a new process, and check its peak memory."""
    save_file({f"t{i}": torch.zeros(2**20, dtype=torch.float32) for i in range(16)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    script = (
        "import resource, sys\n"
        "from llmquant.checkpoints.reader import CheckpointReader\n"
        "reader = CheckpointReader(sys.argv[1])\n"
        "reader.read('t0')\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for name in reader.tensors: reader.read(name)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    result = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 12 * 1024  # KiB


def test_the_links_of_a_hub_cache_are_followed(tmp_path):
    repository = tmp_path / "models--someone--tiny"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file({"a": torch.ones(2)}, blobs / "123")
    (blobs / "456").write_text("{}")
    (snapshot / "model.safetensors").symlink_to("../../blobs/123")
    (snapshot / "config.json").symlink_to("../../blobs/456")
    assert CheckpointReader(snapshot).read("a").tolist() == [1, 1]


def test_file_hashes_identify_the_inputs(tmp_path):
    write_checkpoint(tmp_path / "out")
    reader = CheckpointReader(tmp_path / "out")
    assert reader.file_hashes() == {
        name: file_sha256(tmp_path / "out" / name)
        for name in ("config.json", *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)))
    }


# --- quantized checkpoints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "symmetric"),
    # AWQ's configuration cannot say symmetric.
    [(name, symmetric) for name in FORMATS for symmetric in (True, False) if (name, symmetric) != ("awq", True)],
)
def test_quantized_modules_are_found_and_read(tmp_path, name, symmetric):
    format, spec = FORMATS[name], QuantSpec(bits=4, group_size=16, symmetric=symmetric)
    weights = {f"layers.{i}.up": _random_weight(spec, 32, 48 + 16 * i) for i in range(2)}
    with PartialCheckpoint.open(tmp_path / "out", REQUEST) as partial:
        for module, weight in weights.items():
            partial.add_part(module, {f"{module}.{suffix}": t for suffix, t in format.pack(weight).items()})
        partial.add_part("rest", {"lm_head.weight": torch.ones(4, 4), "layers.0.up.bias": torch.ones(32)})
        config = format.config(spec, {**dict.fromkeys(weights, spec), "lm_head": None})
        content = json.dumps({"quantization_config": config}).encode()
        partial.finish([*weights, "rest"], {"config.json": content})
    reader = CheckpointReader(tmp_path / "out")
    parsed = parsed_quantization(reader)
    assert parsed is not None and parsed.format is format
    modules = find_quantized_modules(reader, parsed)
    assert modules.keys() == weights.keys()
    for module, weight in weights.items():
        read = read_quantized(reader, modules[module])
        assert read.spec == spec and torch.equal(read.codes_NK, weight.codes_NK)
        assert torch.equal(read.scale_NG, weight.scale_NG) and torch.equal(read.zero_NG, weight.zero_NG)
    assert validate_quantized(reader) == modules


def _random_weight(spec: QuantSpec, out_features: int, in_features: int) -> QuantizedWeight:
    groups = (out_features, spec.num_groups(in_features))
    zero_NG = torch.randint(1, 16, groups, dtype=torch.uint8)
    return QuantizedWeight(
        codes_NK=torch.randint(0, 16, (out_features, in_features), dtype=torch.uint8),
        scale_NG=torch.rand(groups).half() + 0.01,
        zero_NG=torch.full_like(zero_NG, 8) if spec.symmetric else zero_NG,
        spec=spec,
    )


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "message"),
    [("nothing", "nothing: no such folder"), ("file", "file: a file; give the folder"), ("folder", "no config.json")],
)
def test_paths_without_a_checkpoint_are_refused(tmp_path, path, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=message):
        CheckpointReader(tmp_path / path)


def test_a_plain_checkpoint_is_not_quantized(tmp_path):
    folder = good_checkpoint(tmp_path / "model")
    edit_json(folder / "config.json", lambda config: config.pop("quantization_config"))
    with pytest.raises(UserError, match="no quantization_config"):
        validate_quantized(CheckpointReader(folder))


def test_quantize_config_of_old_tools_is_found(tmp_path):
    folder = good_checkpoint(tmp_path / "model")
    edit_json(folder / "config.json", lambda config: config.pop("quantization_config"))
    write_json(folder / "quantize_config.json", {"bits": 4, "group_size": 16, "desc_act": False, "sym": False})
    assert len(validate_quantized(CheckpointReader(folder))) == 2


@pytest.mark.parametrize("name", ["awq", "compressed-tensors"])
def test_other_formats_are_checked_too(tmp_path, name):
    folder = good_checkpoint(tmp_path / "model", name)
    assert len(validate_quantized(CheckpointReader(folder))) == 2
    packed = FORMATS[name].suffixes[0]
    edit_tensor(folder, f"layers.0.up.{packed}", lambda good: good[:, :1])
    with pytest.raises(UserError, match=r"layers\.0\.up\.\w+: "):
        validate_quantized(CheckpointReader(folder))


@pytest.mark.parametrize("change", ["removed", "truncated", "replaced", "rewritten"])
def test_files_that_change_during_use_are_detected(tmp_path, change):
    folder = good_checkpoint(tmp_path / "model")
    reader = CheckpointReader(folder)
    file, content = folder / SHARDS[0], (folder / SHARDS[0]).read_bytes()
    if change == "removed":
        file.unlink()
    elif change == "truncated":
        os.truncate(file, 900)
    elif change == "replaced":
        (folder / "new").write_bytes(content)
        (folder / "new").replace(file)
    else:
        file.write_bytes(content)
        os.utime(file, ns=(0, 0))
    name = max((info for info in reader.tensors.values() if info.file == file), key=lambda info: info.start).name
    with pytest.raises(UserError, match=f"{SHARDS[0]}: (vanished|ends inside|changed)"):
        reader.read(name)
    with pytest.raises(UserError, match=f"{SHARDS[0]}: (vanished|ends inside|changed)"):
        list(reader.chunks(name))


def test_an_unknown_tensor_is_named(tmp_path):
    with pytest.raises(UserError, match="no tensor ghost"):
        CheckpointReader(good_checkpoint(tmp_path / "model")).read("ghost")


def test_a_huge_json_file_is_refused_unread(tmp_path, monkeypatch):
    folder = good_checkpoint(tmp_path / "model")
    monkeypatch.setattr(reader_module, "MAX_JSON_BYTES", 10)
    with pytest.raises(UserError, match=re.escape("config.json: ")):
        CheckpointReader(folder)
