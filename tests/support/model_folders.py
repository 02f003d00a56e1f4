"""Changes to the checkpoint folder of a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from malformed_files import INDEX, SHARDS
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "model.safetensors"


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a checkpoint with a single file."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)


def split_into_shards(
    folder: Path, *, extra: dict[str, Tensor] | None = None, index: dict[str, str | None] | None = None
) -> None:
    """Split the single file of a checkpoint into two shards.

    extra: tensors that the second shard holds too. index: changes of the weight map; None removes an entry.
    """
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    shards = {name: tensors[name] for name in names[:10]}, {name: tensors[name] for name in names[10:]}
    weight_map = {name: file for file, shard in zip(SHARDS, shards, strict=True) for name in shard}
    for name, file in (index or {}).items():
        weight_map.pop(name, None)
        if file is not None:
            weight_map[name] = file
    save_file(shards[0], folder / SHARDS[0])
    save_file(shards[1] | (extra or {}), folder / SHARDS[1])
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / WEIGHTS).unlink()
