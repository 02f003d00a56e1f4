"""A small checkpoint that is written part by part."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from llmquant.checkpoints.writer import PartialCheckpoint

REQUEST = {"options": {"bits": 4, "method": "gptq"}, "version": "1"}
EXTRA = {"config.json": b'{"model_type": "tiny"}', "templates/chat.jinja": b"{{ messages }}"}
MANIFEST = {"method": "gptq"}


def make_parts() -> dict[str, dict[str, Tensor]]:
    """Return three parts of mixed dtypes and odd sizes, which show a misaligned layout."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"block-{i}": {
            f"layers.{i}.half": torch.randn(3, generator=generator).half(),
            f"layers.{i}.words": torch.randint(-(2**31), 2**31, (5, i + 1), dtype=torch.int32, generator=generator),
            f"layers.{i}.flags": torch.tensor([True, False, True]),
            f"layers.{i}.shape": torch.tensor([i, 2**40]),
            f"layers.{i}.scalar": torch.tensor(1.5 + i),
            f"layers.{i}.empty": torch.zeros(0, 4),
        }
        for i in range(3)
    }


PARTS = make_parts()
ALL_TENSORS = {name: tensor for part in PARTS.values() for name, tensor in part.items()}


def write_checkpoint(
    out: Path, *, max_shard_bytes: int = 100, overwrite: bool = False, **options: bool
) -> PartialCheckpoint:
    """Write a checkpoint like `quantize`: add the missing parts, then finish."""
    with PartialCheckpoint.open(out, REQUEST, overwrite=overwrite, **options) as partial:
        if not partial.is_finishing:
            for name, tensors in PARTS.items():
                if not partial.has_part(name):
                    partial.add_part(name, tensors)
        partial.finish(list(PARTS), EXTRA, manifest=MANIFEST, max_shard_bytes=max_shard_bytes)
    return partial


def contents(folder: Path) -> dict[str, bytes]:
    """Return the contents of all files by path."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
