"""Tensors that a finished checkpoint took over from its original: are they the same, byte for byte?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from llmquant.checkpoints.reader import CheckpointReader
from llmquant.checkpoints.writer import TensorStream
from llmquant.errors import UserError


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of the bytes of a tensor, in hexadecimal."""
    return _digest([tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data])


def check_copies(out: Path, expected: Mapping[str, TensorStream | str]) -> None:
    """Reopen a checkpoint as any reader would and compare tensors with what they should be; UserError if one differs.

    expected: name -> where its bytes come from, or their SHA-256. Both are read piece by piece.
    """
    reader = CheckpointReader(out)
    for name, tensor in expected.items():
        if name not in reader.tensors or not _is_same(reader, name, tensor):
            raise UserError(
                f"{out}: tensor '{name}' does not come back from the disk as it was copied; "
                "do not use this folder, check the disk, and begin anew with --restart"
            )


def _is_same(reader: CheckpointReader, name: str, tensor: TensorStream | str) -> bool:
    if isinstance(tensor, str):
        return _digest(reader.chunks(name)) == tensor
    info = reader.info(name)
    if (info.dtype, info.shape) != (tensor.dtype, tensor.shape):
        return False
    return _digest(reader.chunks(name)) == _digest(tensor.chunks())


def _digest(pieces: Iterable[bytes | memoryview]) -> str:
    sha = hashlib.sha256()
    for piece in pieces:
        sha.update(piece)
    return sha.hexdigest()
