"""Loading of quantized folders in two ways, and comparisons of their files: for the tests of saving."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmquant
from llmquant.checkpoints.reader import CheckpointReader

TOKENS = torch.arange(3, 40)[None]


def load(folder: Path, backend: str = "torch", **options: str) -> Any:
    """Load with the backend that needs no compilation. `test_kernels.py` compares the backends."""
    return llmquant.load(folder, device="cpu", backend=backend, **options)


def load_with_transformers(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, config=llmquant.transformers_config(folder, backend="torch"))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def tensors_of(folder: Path) -> dict[str, Tensor]:
    reader = CheckpointReader(folder)
    return {name: reader.read(name) for name in reader.tensors}


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() if file.exists() else b"" for file in folder.iterdir()}


def assert_same_tensors(folder: Path, other: Path) -> None:
    """Assert that two checkpoints hold tensors with the same names, dtypes and values."""
    tensors, others = tensors_of(folder), tensors_of(other)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype and torch.equal(tensor, others[name]), name


def changed_copy(
    folder: Path,
    to: Path,
    change_tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    change_config: Callable[[dict[str, Any]], None] = lambda quantization: None,
) -> Path:
    """Return a copy of a checkpoint with changed tensors and `quantization_config`, as another tool would write it."""
    to.mkdir()
    content = json.loads((folder / "config.json").read_text())
    change_config(content["quantization_config"])
    (to / "config.json").write_text(json.dumps(content))
    save_file(change_tensors(load_file(folder / "model.safetensors")), to / "model.safetensors", {"format": "pt"})
    return to
