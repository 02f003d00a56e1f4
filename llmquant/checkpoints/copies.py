"""Check that copied tensors of a finished checkpoint equal their originals, byte for byte."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from llmquant.checkpoints.reader import CheckpointReader
from llmquant.checkpoints.writer import StreamedTensor
from llmquant.errors import UserError


def tensor_digest(tensor: Tensor) -> str:
    """Return the SHA-256 of the bytes of a tensor, in hexadecimal."""
    return _digest([tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data])


def check_copies(out: Path, expected: Mapping[str, StreamedTensor | str]) -> None:
    """Read tensors of a finished checkpoint and compare them. Raises UserError if one is missing or differs.

    expected: tensor name -> the tensor, or the SHA-256 of its bytes. Tensors are read in chunks.
    """
    reader = CheckpointReader(out)
    for name, tensor in expected.items():
        if name not in reader.tensors or not _is_same(reader, name, tensor):
            raise UserError(
                f"{out}: tensor '{name}' read back from the disk differs from the copied one; "
                "do not use this folder, check the disk, and begin anew with --restart"
            )


def _is_same(reader: CheckpointReader, name: str, tensor: StreamedTensor | str) -> bool:
    if isinstance(tensor, str):
        return _digest(reader.chunks(name)) == tensor
    info = reader.info(name)
    if (info.dtype, info.shape) != (tensor.dtype, tensor.shape):
        return False
    return _digest(reader.chunks(name)) == _digest(tensor.chunks())


def _digest(chunks: Iterable[bytes | memoryview]) -> str:
    sha = hashlib.sha256()
    for chunk in chunks:
        sha.update(chunk)
    return sha.hexdigest()
