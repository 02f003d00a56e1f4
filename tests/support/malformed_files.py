"""A valid quantized checkpoint, and functions that damage it."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from llmquant.formats.registry import FORMATS
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
SPEC = QuantSpec(bits=4, group_size=16, symmetric=False)


def good_checkpoint(folder: Path, name: str = "gptq") -> Path:
    """Write two quantized linears in two shards with an index. No zero-point is the middle code."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(SHARDS):
        weight = QuantizedWeight(
            codes_NK=torch.randint(0, 16, (32, 32), dtype=torch.uint8, generator=generator),
            scale_NG=torch.rand(32, 2, generator=generator).half() + 0.1,
            zero_NG=torch.randint(1, 8, (32, 2), dtype=torch.uint8, generator=generator),
            spec=SPEC,
        )
        tensors = {f"layers.{i}.up.{suffix}": tensor for suffix, tensor in FORMATS[name].pack(weight).items()}
        tensors[f"layers.{i}.norm.weight"] = torch.ones(32)
        save_file(tensors, folder / shard)
        weight_map |= dict.fromkeys(tensors, shard)
    write_json(folder / INDEX, {"metadata": {}, "weight_map": weight_map})
    config = FORMATS[name].config(SPEC, {"layers.0.up": SPEC, "layers.1.up": SPEC})
    write_json(folder / "config.json", {"model_type": "tiny", "quantization_config": config})
    return folder


def write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content))


def edit_json(file: Path, edit: Callable[[Any], object]) -> None:
    """Change the content of a JSON file; a missing file counts as an empty object."""
    content = json.loads(file.read_text()) if file.exists() else {}
    edit(content)
    write_json(file, content)


def edit_header(file: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change the header of a safetensors file, but not the bytes of its tensors."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def raw_safetensors(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def edit_tensor(folder: Path, name: str, edit: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Replace a tensor in its shard and the index, or remove it if `edit` returns None."""
    shard = json.loads((folder / INDEX).read_text())["weight_map"].get(name, SHARDS[0])
    tensors = load_file(folder / shard)
    result = edit(tensors.pop(name, torch.zeros(1)))
    if result is not None:
        tensors[name] = result.contiguous()
    save_file(tensors, folder / shard)

    def change(index: dict) -> None:
        index["weight_map"].pop(name, None)
        if result is not None:
            index["weight_map"][name] = shard

    edit_json(folder / INDEX, change)


def entry(**changes: object) -> Callable[[Path], None]:
    """Return a function that changes the header entry of `layers.0.norm.weight`."""
    return lambda folder: edit_header(folder / SHARDS[0], lambda header: header["layers.0.norm.weight"].update(changes))


def header_bytes(content: bytes, data: bytes = b"", length: int | None = None) -> Callable[[Path], None]:
    return lambda folder: (folder / SHARDS[0]).write_bytes(raw_safetensors(content, data, length)) and None  # type: ignore


def in_index(file_name: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(
        folder / INDEX, lambda index: index["weight_map"].update({"layers.0.norm.weight": file_name})
    )


def shrink(folder: Path, by: int) -> None:
    os.truncate(folder / SHARDS[1], (folder / SHARDS[1]).stat().st_size - by)


def link_shard(target: str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        (folder / SHARDS[0]).rename(folder.parent / "outside.safetensors")
        (folder / SHARDS[0]).symlink_to(target)

    return build


def swap_shards(folder: Path) -> None:
    (folder / SHARDS[0]).rename(folder / "x")
    (folder / SHARDS[1]).rename(folder / SHARDS[0])
    (folder / "x").rename(folder / SHARDS[1])


def only_pickles(folder: Path) -> None:
    for name in (*SHARDS, INDEX):
        (folder / name).unlink()
    # Unpickling this file ends the process.
    (folder / "pytorch_model.bin").write_bytes(b"cbuiltins\nexit\n(I1\ntR.")


def overlap(folder: Path) -> None:
    def edit(header: dict) -> None:
        second = sorted(
            (value for key, value in header.items() if key != "__metadata__"), key=lambda e: e["data_offsets"]
        )[1]
        second["data_offsets"] = [offset - 4 for offset in second["data_offsets"]]

    edit_header(folder / SHARDS[0], edit)


def rename_tensor(name: str) -> Callable[[Path], None]:
    return lambda folder: edit_header(
        folder / SHARDS[0], lambda header: header.update({name: header.pop("layers.0.norm.weight")})
    )


def deep_json(folder: Path) -> None:
    (folder / SHARDS[0]).write_bytes(raw_safetensors(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"))


def quantization(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(
        folder / "config.json", lambda config: config["quantization_config"].update(changes)
    )


def tensor(suffix: str, edit: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    return lambda folder: edit_tensor(folder, f"layers.0.up.{suffix}", edit)


def filled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda good: good.index_fill(1, torch.tensor([3]), value)


def at_five(value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda good: good.index_fill(0, torch.tensor([5]), value)


def row_of(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda good: good.index_fill(0, torch.tensor([3]), value)


def shape_of(*sizes: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda good: torch.tensor(sizes)


def weights(**changes: object) -> Callable[[Path], None]:
    def edit(config: dict) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["weights"].update(changes)

    return lambda folder: edit_json(folder / "config.json", edit)
