"""Read a Hugging Face checkpoint folder lazily.

Opening a folder reads `config.json` and the headers of the shards, and checks that they agree. The bytes of a tensor
are read on request, into new memory. Files are never memory-mapped: mapped pages count as memory of the process as long
as the map exists, and a file that shrinks under a map kills the process.

If the folder has an index, the index decides which tensors exist, and in which file. If the shards hold more or fewer
tensors than it lists, the reader adds a note and raises no error, because the difference matters only to a model that
needs one of those tensors.

Nothing is ever unpickled. No file outside the folder is opened, except in a Hugging Face cache, whose files are links
into its own `blobs` folder.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
"""File in which an old tool wrote its `quantization_config` -> the quant_method, which the file omits."""

MAX_JSON_BYTES = 256 * 2**20
CHUNK_BYTES = 8 * 2**20
HASHING_THREADS = 4
"""Number of shards that are hashed at the same time."""


class CheckpointReader:
    """The tensors and the configuration of a checkpoint folder. Raises UserError if the folder is not valid."""

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
        """Tensors that cannot be read because only the index or only a shard has them: name -> reason."""
        self.tensors: dict[str, TensorInfo] = self._without_wrappers(self._open_shards())
        """All readable tensors by name."""

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
        """Unusual facts about the folder that do not prevent reading it, one sentence each."""
        return tuple(self._notes)

    @cached_property
    def quantization_config(self) -> dict[str, Any] | None:
        """The `quantization_config` of the folder, or None. `checkpoints/quantized.py` checks it against the tensors.

        It is part of config.json. Old versions of AutoGPTQ wrote it into `quantize_config.json`, and old versions of
        AutoAWQ into `quant_config.json`.
        """
        return self._read_json_of_old_tools(self.quantization_file) if self._key is None else self.config[self._key]

    @cached_property
    def quantization_file(self) -> str:
        """Name of the file that holds `quantization_config`; config.json if there is none."""
        names = [name for name in OLD_CONFIG_FILES if (self.path / name).exists()]
        return names[0] if names and self._key is None else "config.json"

    def _quantization_key(self) -> str | None:
        """Return the key of config.json that holds a non-empty `quantization_config`, or None."""
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
        """Return dtype, shape and position of a tensor. Raises UserError if there is no such tensor."""
        if name not in self.tensors:
            raise UserError(
                f"{self.path}: no tensor {name}; config.json and the safetensors files do not match, "
                "download them again"
            )
        return self.tensors[name]

    def read(self, name: str) -> Tensor:
        """Read a tensor into new memory, in its stored dtype."""
        info = self.info(name)
        tensor = read_tensor(info)
        self._check_unchanged(info)
        return tensor

    def chunks(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of a tensor in chunks, to copy it without holding it in memory. Reading a chunk overwrites
        the previous one."""
        info = self.info(name)
        yield from tensor_chunks(info)
        self._check_unchanged(info)

    def file_hashes(self) -> dict[str, str]:
        """Return the SHA-256 of config.json and of every shard, by file name. Reads all files."""
        files = [self.path / "config.json", *self.shards]
        is_over = threading.Event()
        with ThreadPoolExecutor(max_workers=HASHING_THREADS) as pool:  # hashlib releases the interpreter's lock
            digests = pool.map(lambda file: file_sha256(file, is_over), files)
            try:
                return {file.name: digest for file, digest in zip(files, digests, strict=True)}
            finally:  # after an error or an interruption, the threads must not read on
                is_over.set()

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
        for names, problem in (
            (list(extra), f"stored, but not listed in {index_name}: not read"),
            ([name for name in unlisted if name in tensors], f"stored twice: read from where {index_name} says"),
            (list(absent), f"listed in {index_name}, but stored nowhere"),
        ):
            if names:
                self._notes.append(f"{count_tensors(names)} {problem}")
        return tensors

    def _without_wrappers(self, tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
        """Return the tensors without the names of training wrappers, such as `module.`."""
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
        """Raise UserError unless a file, or the target of a link, is in the folder. Links from a snapshot in a Hugging
        Face cache into the `blobs` folder of that cache are accepted too."""
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
                raise UserError(f"{file}: {file.stat().st_size} bytes; must be at most {MAX_JSON_BYTES}")
            return parse_json(file.read_bytes(), str(file))
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror}); check the file and its permissions") from None

    def _check_unchanged(self, info: TensorInfo) -> None:
        """Raise UserError if the file of a tensor has changed since its header was read."""
        try:
            unchanged = _stamp(info.file.stat()) == self._stamps[info.file]
        except OSError:
            unchanged = False
        if not unchanged:
            raise UserError(
                f"{info.file}: changed while it was used ({info.name}); start again once nothing writes to it"
            )


def read_tensor(info: TensorInfo) -> Tensor:
    """Read a tensor into new memory. Raises UserError if the file no longer matches its header."""
    buffer = torch.empty(info.nbytes, dtype=torch.uint8)
    with _open_at(info) as handle:
        _read_into(handle, memoryview(buffer.numpy()), info)  # type: ignore[arg-type]
    return buffer.view(info.dtype).reshape(info.shape)


def tensor_chunks(info: TensorInfo) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in chunks. Reading a chunk overwrites the previous one."""
    buffer = memoryview(bytearray(min(CHUNK_BYTES, info.nbytes)))
    with _open_at(info) as handle:
        for position in range(0, info.nbytes, CHUNK_BYTES):
            chunk = buffer[: min(CHUNK_BYTES, info.nbytes - position)]
            _read_into(handle, chunk, info)
            yield chunk


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


def file_sha256(file: Path, is_over: threading.Event | None = None) -> str:
    """Return the SHA-256 of a file, in hexadecimal. is_over: another thread sets it if the result is not needed."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK_BYTES))
    try:
        with file.open("rb", buffering=0) as handle:
            while count := handle.readinto(buffer):
                digest.update(buffer[:count])
                if is_over is not None and is_over.is_set():
                    break
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); check the file and its permissions") from None
    return digest.hexdigest()


def count_tensors(names: Sequence[str]) -> str:
    """Return the number of tensors and the first name, as the subject of a note."""
    return f"1 tensor ('{names[0]}')" if len(names) == 1 else f"{len(names)} tensors ('{names[0]}', …)"


def _quoted(names: Iterable[str]) -> str:
    return " and ".join(f"'{name}'" for name in names)


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    """Return inode, size and modification time, which change when a file is written or replaced."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def _is_plain_name(name: str) -> bool:
    """Whether a name is that of a .safetensors file, without a folder."""
    return name.endswith(".safetensors") and not any(mark in name for mark in ("/", "\\", "\0")) and name[0] != "."
