"""The header of a safetensors file: validated when read, deterministic when written.

A file consists of an 8-byte little-endian length, that many bytes of JSON (`name -> {dtype, shape, data_offsets}` and
an optional `__metadata__`), and the bytes of the tensors without gaps. The header is checked before memory for
a tensor is allocated. An invalid header raises a UserError.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from llmquant.errors import UserError

SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}

# The safetensors library has the same limit on the JSON. No real tensor exceeds the other limits; without them, hostile
# sizes would overflow in torch.
MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 16
MAX_NAME_LENGTH = 1000
MAX_DIMENSION = 2**40


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Dtype, shape and position of a tensor on disk."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    """The safetensors file that holds the tensor."""
    start: int
    """Position of the tensor's first byte in the file."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor on disk and in memory."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: Path, handle: BinaryIO, file_bytes: int) -> dict[str, TensorInfo]:
    """Return the tensors of an open safetensors file by name, in the order of their bytes. Raises UserError if the
    header is not valid."""
    prefix = handle.read(8)
    if len(prefix) < 8:
        raise UserError(f"{file}: {file_bytes} bytes, too short for a safetensors file; download it again")
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER_BYTES or 8 + length > file_bytes:
        raise UserError(
            f"{file}: header of {length} bytes in a file of {file_bytes}; it is truncated or not a safetensors file, "
            "download it again"
        )
    entries = parse_json(handle.read(length), f"{file}: header")
    entries.pop("__metadata__", None)
    tensors = [_tensor_info(file, 8 + length, name, entry) for name, entry in entries.items()]
    tensors.sort(key=lambda info: (info.start, info.nbytes))
    position = 8 + length
    for info in tensors:
        if info.start != position:
            relation = "overlaps" if info.start < position else "leaves a gap after"
            raise UserError(
                f"{file}: {info.name} {relation} the tensor before it; the file is damaged, download it again"
            )
        position += info.nbytes
    if position != file_bytes:
        state = "truncated" if position > file_bytes else "followed by foreign bytes"
        raise UserError(
            f"{file}: {file_bytes} bytes, but its header describes {position}; it is {state}, download it again"
        )
    return {info.name: info for info in tensors}


def _tensor_info(file: Path, data_start: int, name: str, entry: Any) -> TensorInfo:
    where = f"{file}: {name!r:.200}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{where}: header entry must be {{dtype, shape, data_offsets}}; the file is damaged")
    if len(name) > MAX_NAME_LENGTH or not name.isprintable():
        raise UserError(f"{where}: is not a name of a tensor; the file is damaged")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in SAFETENSORS_DTYPES:
        raise UserError(
            f"{where}: dtype {entry['dtype']!r:.40} is not known; supported: {', '.join(SAFETENSORS_DTYPES)}"
        )
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(_is_size(n, MAX_DIMENSION) for n in shape):
        raise UserError(f"{where}: shape {shape!r:.60} is not a shape; the file is damaged")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n, 2**63) for n in offsets):
        raise UserError(f"{where}: data_offsets {offsets!r:.60} are not two positions; the file is damaged")
    info = TensorInfo(
        name=name,
        dtype=SAFETENSORS_DTYPES[entry["dtype"]],
        shape=tuple(shape),
        file=file,
        start=data_start + offsets[0],
    )
    if offsets[1] - offsets[0] != info.nbytes:
        raise UserError(
            f"{where}: {entry['dtype']} {shape} takes {info.nbytes} bytes, but data_offsets {offsets} hold "
            f"{offsets[1] - offsets[0]}; the file is damaged"
        )
    return info


def _is_size(value: Any, limit: int) -> bool:
    return type(value) is int and 0 <= value <= limit


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object from untrusted bytes. Raises UserError for anything else, or if a key occurs twice."""

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise UserError(f"{where}: key {twice!r:.200} occurs twice; keep one of them")
        return result

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error!s:.100}); restore or download it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: a JSON {type(value).__name__}; must be an object")
    return value


def layout_order(tensors: Iterable[tuple[str, torch.dtype]]) -> list[str]:
    """Return the names in the order in which their bytes are written: wider dtypes first, otherwise unchanged.

    This order aligns every tensor to its dtype, although the format allows no gaps. Loaders that map files in place
    need the alignment.
    """
    return [name for name, dtype in sorted(tensors, key=lambda item: -item[1].itemsize)]


def build_header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Return the header of tensors in this order: length and JSON, padded to a multiple of 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
