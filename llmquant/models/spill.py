"""DANGER: storages are emptied in place. This module moves the activations of waiting sequences to the disk.

While a sequence runs, `Spill` records every tensor that the sequence makes. The tensors that are still alive when the
sequence pauses are held by the frames of the model's forward pass, so no list of them exists. If all sequences together
hold more than a budget, the storages of the sequence that pauses are written to files and resized to zero bytes. Every
tensor that shares such a storage is then empty. An operation inside `Spill.computing_for` that reads the tensor first
restores its storage. A tensor that a frame holds but never reads (such as the embeddings) is written once and stays on
the disk. Code that keeps a tensor of a sequence beyond the sequence's pause must copy it.

Sequences run one after the other, always in the same order. Therefore the last ones go to the disk and the first ones
stay: the reverse would evict each activation just before it is needed.
"""

from __future__ import annotations

import ctypes
import shutil
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmquant.checkpoints.atomic import disk_errors, make_folder

SMALLEST_BYTES = 4096
"""Storages below this size stay in memory."""


@dataclass
class OwnedStorages:
    """Storages of the tensors that one sequence has made and still holds."""

    tensors: dict[int, list[weakref.ref[Tensor]]] = field(default_factory=dict)
    """Tensors that may still be alive and whose storage is in memory, by the address of the storage that they share."""
    files: dict[int, _File] = field(default_factory=dict)
    """Storages of the sequence on the disk, by address."""
    resident_bytes: int = 0
    """Bytes of the sequence's storages in memory at its last pause."""


@dataclass
class _File:
    storage: torch.UntypedStorage
    """The emptied storage; the reference keeps its address from being reused."""
    num_bytes: int
    path: Path
    tensors: list[weakref.ref[Tensor]]
    owner: OwnedStorages


class Spill(TorchDispatchMode):
    """Keeps the activations of waiting sequences within a memory budget.

    All computation on tensors of the sequences must happen inside `computing_for`.
    """

    def __init__(self, folder: Path, budget_bytes: int) -> None:
        super().__init__()
        self.folder, self.budget_bytes = folder, budget_bytes
        self.spilled_bytes = 0
        """Bytes written to the disk so far."""
        self._resident_bytes = 0
        self._owner: OwnedStorages | None = None
        self._files: dict[int, _File] = {}
        self._num_written = 0

    @contextmanager
    def computing_for(self, owner: OwnedStorages | None) -> Iterator[None]:
        """Restore tensors that operations read in a `with` block; the owner, if any, owns the tensors made there."""
        self._owner = owner
        try:
            with self:
                yield
        finally:
            self._owner = None

    @contextmanager
    def unowned(self) -> Iterator[None]:
        """Within `computing_for`, record no owner for new tensors, such as weights that the forward pass loads."""
        before, self._owner = self._owner, None
        try:
            yield
        finally:
            self._owner = before

    def __torch_dispatch__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {tensor.untyped_storage()._cdata for tensor in _tensors_in((args, kwargs))}
        for address in inputs & self._files.keys():
            self._read(self._files[address])
        result = func(*args, **(kwargs or {}))
        if self._owner is not None:
            for tensor in _tensors_in(result):
                address = tensor.untyped_storage()._cdata
                # A view belongs to the sequence only if its base does: views of weights do not.
                if address not in inputs or _alive(self._owner.tensors.get(address, [])):
                    self._owner.tensors.setdefault(address, []).append(weakref.ref(tensor))
        return result

    def evict_if_over_budget(self, owner: OwnedStorages) -> None:
        """Count a pausing sequence's storages; move them to the disk if the sequences together exceed the budget."""
        for file in list(owner.files.values()):
            if not _alive(file.tensors):
                self._delete(file)
        owner.tensors = {address: alive for address, made in owner.tensors.items() if (alive := _alive(made))}
        storages = [alive[0]().untyped_storage() for alive in owner.tensors.values()]  # type: ignore[union-attr]
        storages = [storage for storage in storages if storage.nbytes() >= SMALLEST_BYTES]
        self._resident_bytes -= owner.resident_bytes
        owner.resident_bytes = sum(storage.nbytes() for storage in storages)
        if self._resident_bytes + owner.resident_bytes > self.budget_bytes:
            for storage in storages:
                self._write(storage, owner)
            owner.resident_bytes = 0
        self._resident_bytes += owner.resident_bytes

    def restore(self, owner: OwnedStorages) -> None:
        """Read all storages of a sequence back into memory; they stay there until the sequence pauses again."""
        for file in list(owner.files.values()):
            self._read(file)

    def close(self) -> None:
        """Delete every file, after the sequences have ended."""
        self._files = {}
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, storage: torch.UntypedStorage, owner: OwnedStorages) -> None:
        if not self._num_written:
            make_folder(self.folder)
        self._num_written += 1
        tensors = owner.tensors.pop(storage._cdata)
        file = _File(storage, storage.nbytes(), self.folder / f"{self._num_written}", tensors, owner)
        with disk_errors(file.path, file.num_bytes), file.path.open("wb", buffering=0) as handle:
            cpu_bytes = _as_bytes(storage).cpu()
            view = _memory_of(cpu_bytes)
            while view:
                view = view[handle.write(view) :]
        self.spilled_bytes += file.num_bytes
        storage.resize_(0)
        self._files[storage._cdata] = owner.files[storage._cdata] = file

    def _read(self, file: _File) -> None:
        file.storage.resize_(file.num_bytes)
        content = _as_bytes(file.storage)
        cpu_bytes = content if content.device.type == "cpu" else torch.empty(file.num_bytes, dtype=torch.uint8)
        with disk_errors(file.path), file.path.open("rb", buffering=0) as handle:
            view = _memory_of(cpu_bytes)
            while view:
                count = handle.readinto(view)
                assert count, f"{file.path}: ends early"
                view = view[count:]
        if cpu_bytes is not content:
            content.copy_(cpu_bytes)
        file.owner.tensors[file.storage._cdata] = file.tensors
        self._delete(file)

    def _delete(self, file: _File) -> None:
        del self._files[file.storage._cdata], file.owner.files[file.storage._cdata]
        file.path.unlink()


def _alive(tensors: list[weakref.ref[Tensor]]) -> list[weakref.ref[Tensor]]:
    return [tensor for tensor in tensors if tensor() is not None]


def _as_bytes(storage: torch.UntypedStorage) -> Tensor:
    """Return a uint8 tensor on the storage, without a copy."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _memory_of(content: Tensor) -> memoryview:
    """Return the memory of a uint8 tensor on the CPU. A storage that numpy references could not be resized."""
    return memoryview((ctypes.c_char * content.numel()).from_address(content.data_ptr())).cast("B")


def _tensors_in(values: Any) -> Iterator[Tensor]:
    """Yield the tensors in the arguments or the result of an operation."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors_in(value)
    elif isinstance(values, Iterable) and not isinstance(values, str):
        for value in values:
            yield from _tensors_in(value)
