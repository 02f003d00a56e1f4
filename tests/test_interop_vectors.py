"""Checkpoints of other tools are read as these tools themselves read them.

`vectors/` has one linear of each checkpoint that `scripts/interop/interop.py --vectors` lets a tool write: its tensors,
its `quantization_config`, and `dense`, the weight [N, K] as the tool's own code dequantizes it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from paths import ROOT
from safetensors.torch import load_file, save_file

from llmquant.checkpoints.quantized import QuantizedModule, find_quantized_modules, parsed_quantization, read_quantized
from llmquant.checkpoints.reader import CheckpointReader
from llmquant.formats.registry import FORMATS
from llmquant.weight import QuantizedWeight

NOTES = sorted((ROOT / "tests" / "vectors").glob("*.json"))
EVERY_VECTOR = pytest.mark.parametrize("note", NOTES, ids=[note.stem for note in NOTES])

Tensors = dict[str, torch.Tensor]


def read_vector(note: Path, folder: Path) -> tuple[QuantizedModule, QuantizedWeight, Tensors]:
    """Write the vector as a checkpoint folder, and return its linear, its weight and the tensors of the vector."""
    described, tensors = json.loads(note.read_text()), load_file(note.with_suffix(".safetensors"))
    config = {"model_type": "llama", "quantization_config": described["quantization_config"]}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor for name, tensor in tensors.items() if name != "dense"}, folder / "model.safetensors")
    reader = CheckpointReader(folder)
    parsed = parsed_quantization(reader)
    assert parsed is not None
    modules = find_quantized_modules(reader, parsed)
    assert list(modules) == [described["linear"]]
    module = modules[described["linear"]]
    return module, read_quantized(reader, module), tensors


@EVERY_VECTOR
def test_the_weight_equals_that_of_its_own_tool(note, tmp_path):
    _, weight, tensors = read_vector(note, tmp_path)
    assert torch.equal(weight.dequantize(tensors["dense"].dtype), tensors["dense"])


@EVERY_VECTOR
def test_packing_the_weight_again_returns_the_same_tensors(note, tmp_path):
    module, weight, tensors = read_vector(note, tmp_path)
    if weight.group_index_K is not None or int(weight.zero_NG.min()) < module.format.min_zero:
        pytest.skip("llmquant does not write act-order groups, or a zero-point of 0 in gptq v1")
    for suffix, packed in module.format.pack(weight).items():
        stored = tensors[f"{module.name}.{suffix}"]
        assert packed.dtype == stored.dtype and torch.equal(packed, stored), suffix


def test_the_vectors_cover_every_format_and_variant(tmp_path):
    found = set()
    for note in NOTES:
        folder = tmp_path / note.stem
        folder.mkdir()
        module, weight, _ = read_vector(note, folder)
        found |= {module.format.name, f"{weight.spec.bits} bits", f"symmetric {weight.spec.symmetric}"}
        found |= {"negative scales"} if bool((weight.scale_NG < 0).any()) else set()
        found |= {"act-order groups"} if weight.group_index_K is not None else set()
        found |= {"one group"} if weight.spec.group_size == -1 else set()
    expected = {*FORMATS, "2 bits", "3 bits", "4 bits", "8 bits", "symmetric True", "symmetric False"}
    assert found == expected | {"negative scales", "act-order groups", "one group"}
