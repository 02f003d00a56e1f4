"""A Hugging Face checkpoint folder, opened lazily.

Opening reads `config.json` and the shards' headers and checks all of them against each other; a tensor's bytes are
read when it is asked for, into memory of its own. Files are never memory-mapped: mapped pages count as the process's
memory for as long as the map lives, and a file that shrinks under a map kills the process.

An index decides which tensors there are, and in which file. Where the shards hold more or less than it lists, the
difference is a note: it matters only to a model that needs one of those tensors.

Nothing is ever unpickled, and no file outside the folder is opened (a Hugging Face cache, whose files are links to
its own `blobs` folder, is let through).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmquant.checkpoints.files import adapter_note, adapter_refusal, find_weights
from llmquant.checkpoints.header import TensorInfo, parse_json, read_header
from llmquant.checkpoints.storage import CONFIG_KEYS
from llmquant.checkpoints.wrappers import unwrapped_names
from llmquant.errors import UserError

OLD_CONFIG_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files in which old tools wrote a `quantization_config`, and the method that they leave out."""

MAX_JSON_BYTES = 256 * 2**20
CHUNK_BYTES = 8 * 2**20


class CheckpointReader:
    """The tensors and the configuration of a checkpoint folder. Raises UserError if anything about it is wrong."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise UserError(f"{self.path}: no such folder; give the folder of a Hugging Face checkpoint")
        if not self.path.is_dir():
            raise UserError(f"{self.path}: a file; give the folder that holds config.json and the safetensors files")
        if not (self.path / "config.json").exists():
            why = adapter_refusal(self.path)
            raise UserError(why or f"{self.path}: no config.json; give the folder of a Hugging Face checkpoint")
        self.config: dict[str, Any] = self._read_json("config.json")
        self._key = self._quantization_key()
        self._stamps: dict[Path, tuple[int, int, int]] = {}
        self._notes: list[str] = []
        self.unread: dict[str, str] = {}
        """Tensors that only the index or only a shard knows, and that are not read: name -> why."""
        self.tensors: dict[str, TensorInfo] = self._unwrapped(self._open_shards())

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def shards(self) -> list[Path]:
        """The safetensors files, sorted by name."""
        return sorted(self._stamps)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is unusual about the folder and does not stand in the way of reading it, a sentence each."""
        return tuple(self._notes)

    @cached_property
    def quantization_config(self) -> dict[str, Any] | None:
        """What the folder says about its quantization, or None; `checkpoints/storage.py` sees if its tensors agree.

        It is part of config.json. Before that, AutoGPTQ wrote `quantize_config.json`, and AutoAWQ `quant_config.json`.
        """
        return self._read_json_of_old_tools(self.quantization_file) if self._key is None else self.config[self._key]

    @cached_property
    def quantization_file(self) -> str:
        """Name of the file in which `quantization_config` stands, or would stand."""
        names = [name for name in OLD_CONFIG_FILES if (self.path / name).exists()]
        return names[0] if names and self._key is None else "config.json"

    def _quantization_key(self) -> str | None:
        """The key of config.json that holds a `quantization_config`; an empty one says nothing."""
        for key in CONFIG_KEYS:
            value = self.config.get(key)
            if value and not isinstance(value, dict):
                raise UserError(f"{self.path / 'config.json'}: {key} {value!r:.40}; must be an object")
            if value:
                return key
        return None

    def _read_json_of_old_tools(self, file_name: str) -> dict[str, Any] | None:
        if file_name not in OLD_CONFIG_FILES:
            return None
        return {"quant_method": OLD_CONFIG_FILES[file_name], **self._read_json(file_name)}

    def info(self, name: str) -> TensorInfo:
        """Where a tensor lies; UserError if there is none of that name."""
        if name not in self.tensors:
            raise UserError(f"{self.path}: no tensor {name}; config.json and the safetensors files do not fit together")
        return self.tensors[name]

    def read(self, name: str) -> Tensor:
        """A tensor in memory of its own, as stored."""
        info = self.info(name)
        tensor = read_tensor(info)
        self._check_unchanged(info)
        return tensor

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The bytes of a tensor piece by piece, to copy one that is too large to hold. A piece is valid until the
        next."""
        info = self.info(name)
        yield from tensor_chunks(info)
        self._check_unchanged(info)

    def file_hashes(self) -> dict[str, str]:
        """SHA-256 of config.json and of every shard, by file name: what identifies these inputs. Reads everything
        once."""
        return {file.name: file_sha256(file) for file in [self.path / "config.json", *self.shards]}

    # --- opening -----------------------------------------------------------------------------------------------------

    def _open_shards(self) -> dict[str, TensorInfo]:
        files = find_weights(self.path)
        self._notes += [note for note in (files.note, adapter_note(self.path)) if note]
        if files.single is not None:
            return self._read_shard(files.single)
        assert files.index is not None
        return self._read_indexed_shards(files.index)

    def _read_indexed_shards(self, index_name: str) -> dict[str, TensorInfo]:
        index = self.path / index_name
        weight_map = self._read_json(index_name).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index}: weight_map {weight_map!r:.40}; must map tensor names to files")
        for name, file_name in weight_map.items():
            if not isinstance(file_name, str) or not _is_plain_name(file_name):
                raise UserError(
                    f"{index}: {name!r:.200} lies in {file_name!r:.200}; must be the plain name of a .safetensors file "
                    "in the same folder"
                )
        tensors: dict[str, TensorInfo] = {}
        unlisted: dict[str, str] = {}
        for file_name in sorted(set(weight_map.values())):
            if not (self.path / file_name).exists() and not (self.path / file_name).is_symlink():
                raise UserError(f"{self.path / file_name}: missing, though {index_name} names it; download it again")
            for name, info in self._read_shard(file_name).items():
                if weight_map.get(name) == file_name:
                    tensors[name] = info
                else:
                    unlisted[name] = file_name
        for name, file_name in unlisted.items():
            if name in weight_map and name not in tensors:
                raise UserError(
                    f"{self.path / file_name}: holds {name!r:.200}, but {index_name} says {weight_map[name]}; "
                    "index and shards disagree, download them again"
                )
        extra = {name: file_name for name, file_name in unlisted.items() if name not in weight_map}
        absent = {name: file_name for name, file_name in weight_map.items() if name not in tensors}
        self.unread |= {
            name: f"{file_name} holds it, but {index_name} does not list it" for name, file_name in extra.items()
        }
        self.unread |= {
            name: f"{index_name} says that it lies in {file_name}, which does not hold it"
            for name, file_name in absent.items()
        }
        for names, what in (
            (list(extra), f"stored, but not listed in {index_name}: not read"),
            ([name for name in unlisted if name in tensors], f"stored twice: read from where {index_name} says"),
            (list(absent), f"listed in {index_name}, but stored nowhere"),
        ):
            if names:
                self._notes.append(f"{count_tensors(names)} {what}")
        return tensors

    def _unwrapped(self, tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
        """The same tensors by their names in the model, if a wrapper's names were saved with them."""
        plain, removed = unwrapped_names(tensors)
        if not removed:
            return tensors
        unwrapped: dict[str, TensorInfo] = {}
        for stored, name in plain.items():
            if name in unwrapped:
                raise UserError(
                    f"{self.path}: two tensors would be called {name!r:.200} without {_quoted(removed)}; save the "
                    "model again from outside its wrapper"
                )
            unwrapped[name] = replace(tensors[stored], name=name)
        self._notes.append(
            f"names of tensors are read without {_quoted(removed)}, which a training wrapper added to them"
        )
        return unwrapped

    def _read_shard(self, file_name: str) -> dict[str, TensorInfo]:
        file = self.path / file_name
        self.check_link(file)
        try:
            with file.open("rb") as handle:
                status = os.fstat(handle.fileno())
                self._stamps[file] = _stamp(status)
                return read_header(file, handle, status.st_size)
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror}); check the file and its permissions") from None

    def check_link(self, file: Path) -> None:
        """A link may lead anywhere in the folder, or from a snapshot of a Hugging Face cache into that cache's
        blobs."""
        try:
            target, folder = file.resolve(strict=True), self.path.resolve(strict=True)
        except (OSError, RuntimeError):
            raise UserError(f"{file}: a link that leads nowhere; download it again") from None
        blobs = folder.parent.parent / "blobs"
        in_cache = folder.parent.name == "snapshots" and blobs.parent.name.startswith("models--")
        if not target.is_relative_to(folder) and not (in_cache and target.is_relative_to(blobs)):
            raise UserError(f"{file}: a link to {target}, outside the checkpoint; copy the file into the folder")

    def _read_json(self, file_name: str) -> dict[str, Any]:
        file = self.path / file_name
        self.check_link(file)
        try:
            if file.stat().st_size > MAX_JSON_BYTES:
                raise UserError(f"{file}: {file.stat().st_size} bytes; no such file is larger than {MAX_JSON_BYTES}")
            return parse_json(file.read_bytes(), str(file))
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror}); check the file and its permissions") from None

    def _check_unchanged(self, info: TensorInfo) -> None:
        """UserError if the file of a tensor that was just read is not the one that was opened."""
        try:
            unchanged = _stamp(info.file.stat()) == self._stamps[info.file]
        except OSError:
            unchanged = False
        if not unchanged:
            raise UserError(
                f"{info.file}: changed while it was used ({info.name}); start again once nothing writes to it"
            )


def read_tensor(info: TensorInfo) -> Tensor:
    """A tensor in memory of its own; UserError if the file is not what its header said."""
    buffer = torch.empty(info.nbytes, dtype=torch.uint8)
    with _open_at(info) as handle:
        _read_into(handle, memoryview(buffer.numpy()), info)  # type: ignore[arg-type]
    return buffer.view(info.dtype).reshape(info.shape)


def tensor_chunks(info: TensorInfo) -> Iterator[memoryview]:
    """The bytes of a tensor piece by piece; a piece is valid until the next."""
    buffer = memoryview(bytearray(min(CHUNK_BYTES, info.nbytes)))
    with _open_at(info) as handle:
        for position in range(0, info.nbytes, CHUNK_BYTES):
            piece = buffer[: min(CHUNK_BYTES, info.nbytes - position)]
            _read_into(handle, piece, info)
            yield piece


def _open_at(info: TensorInfo) -> FileIO:
    try:
        handle = FileIO(info.file)
    except OSError as error:
        raise UserError(
            f"{info.file}: vanished while it was used ({error.strerror}); restore it, start again"
        ) from None
    handle.seek(info.start)
    return handle


def _read_into(handle: FileIO, view: memoryview, info: TensorInfo) -> None:
    while view.nbytes:
        try:
            count = handle.readinto(view)
        except OSError as error:
            raise UserError(f"{info.file}: {info.name} cannot be read ({error.strerror}); check the disk") from None
        if not count:
            raise UserError(f"{info.file}: ends inside {info.name}; it changed while it was used, start again")
        view = view[count:]


def file_sha256(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK_BYTES))
    try:
        with file.open("rb", buffering=0) as handle:
            while count := handle.readinto(buffer):
                digest.update(buffer[:count])
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); check the file and its permissions") from None
    return digest.hexdigest()


def count_tensors(names: Sequence[str]) -> str:
    """How many tensors, and the first of them, as the subject of a note."""
    return f"1 tensor ('{names[0]}')" if len(names) == 1 else f"{len(names)} tensors ('{names[0]}', …)"


def _quoted(names: Iterable[str]) -> str:
    return " and ".join(f"'{name}'" for name in names)


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    """What changes when a file is written or replaced."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def _is_plain_name(name: str) -> bool:
    """True for a .safetensors file name without any folder part."""
    return name.endswith(".safetensors") and not any(mark in name for mark in ("/", "\\", "\0")) and name[0] != "."
