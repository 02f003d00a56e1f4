"""Activations of waiting sequences on the disk, as far as they do not fit into a budget.

While a sequence runs, every tensor that it makes is noted. When it pauses, those still alive are what it keeps: the
frames of the model's forward pass hold them, and nobody can list them. Where all sequences together keep more than the
budget, the storages of the one that pauses are written to files and emptied in place; so all tensors that share them
are, wherever they are held. A storage comes back when an operation wants to read it, and only then: what a frame keeps
for nothing (the embeddings, say) goes out once and stays.

Sequences run one after the other, always in the same order. So it is the last ones that go to the disk, and the first
that stay: the reverse would put everything out just before it is wanted.
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

from llmquant.checkpoints.durable import disk_errors, make_folder

SMALLEST_BYTES = 4096
"""Smaller storages stay where they are."""


@dataclass
class Kept:
    """What one sequence keeps while it waits."""

    tensors: dict[int, list[weakref.ref[Tensor]]] = field(default_factory=dict)
    """What it has made and what may still be alive, by the address of the storage that they share."""
    files: dict[int, _File] = field(default_factory=dict)
    """Its storages on the disk, by address."""
    resident_bytes: int = 0
    """Bytes of its storages in memory, when it last paused."""


@dataclass
class _File:
    storage: torch.UntypedStorage
    """Empty; held so that its address stays its own."""
    num_bytes: int
    path: Path
    tensors: list[weakref.ref[Tensor]]
    owner: Kept


class Spill(TorchDispatchMode):
    """Keeps what waits within a budget. `running` is around whatever computes with the tensors of sequences."""

    def __init__(self, folder: Path, budget_bytes: int) -> None:
        super().__init__()
        self.folder, self.budget_bytes = folder, budget_bytes
        self.spilled_bytes = 0
        """Bytes written so far."""
        self._resident_bytes = 0
        self._owner: Kept | None = None
        self._files: dict[int, _File] = {}
        self._count = 0

    @contextmanager
    def running(self, owner: Kept | None) -> Iterator[None]:
        """What is made inside belongs to the owner, if there is one; what is read inside comes back."""
        self._owner = owner
        try:
            with self:
                yield
        finally:
            self._owner = None

    @contextmanager
    def nobodys(self) -> Iterator[None]:
        """What is made inside belongs to no sequence: weights that are loaded because one has come to them."""
        before, self._owner = self._owner, None
        try:
            yield
        finally:
            self._owner = before

    def __torch_dispatch__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        for address in given & self._files.keys():
            self._read(self._files[address])
        result = func(*args, **(kwargs or {}))
        if self._owner is not None:
            for tensor in _tensors(result):
                address = tensor.untyped_storage()._cdata
                # A view of what is not the sequence's own (a weight) is not either.
                if address not in given or _alive(self._owner.tensors.get(address, [])):
                    self._owner.tensors.setdefault(address, []).append(weakref.ref(tensor))
        return result

    def settle(self, owner: Kept) -> None:
        """The owner waits: what it keeps is counted, and goes to the disk if it does not fit beside the others'."""
        for file in list(owner.files.values()):
            if not _alive(file.tensors):
                self._forget(file)
        owner.tensors = {address: alive for address, held in owner.tensors.items() if (alive := _alive(held))}
        storages = [held[0]().untyped_storage() for held in owner.tensors.values()]  # type: ignore[union-attr]
        storages = [storage for storage in storages if storage.nbytes() >= SMALLEST_BYTES]
        self._resident_bytes -= owner.resident_bytes
        owner.resident_bytes = sum(storage.nbytes() for storage in storages)
        if self._resident_bytes + owner.resident_bytes > self.budget_bytes:
            for storage in storages:
                self._write(storage, owner)
            owner.resident_bytes = 0
        self._resident_bytes += owner.resident_bytes

    def fetch(self, owner: Kept) -> None:
        """Everything of the owner's comes back, until it waits again."""
        for file in list(owner.files.values()):
            self._read(file)

    def close(self) -> None:
        """Remove every file; the sequences that they belong to have ended."""
        self._files = {}
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, storage: torch.UntypedStorage, owner: Kept) -> None:
        if not self._count:
            make_folder(self.folder)
        self._count += 1
        tensors = owner.tensors.pop(storage._cdata)
        file = _File(storage, storage.nbytes(), self.folder / f"{self._count}", tensors, owner)
        with disk_errors(file.path, file.num_bytes), file.path.open("wb", buffering=0) as handle:
            there = _bytes(storage).cpu()
            content = _memory(there)
            while content:
                content = content[handle.write(content) :]
        self.spilled_bytes += file.num_bytes
        storage.resize_(0)
        self._files[storage._cdata] = owner.files[storage._cdata] = file

    def _read(self, file: _File) -> None:
        file.storage.resize_(file.num_bytes)
        content = _bytes(file.storage)
        landing = content if content.device.type == "cpu" else torch.empty(file.num_bytes, dtype=torch.uint8)
        with disk_errors(file.path), file.path.open("rb", buffering=0) as handle:
            view = _memory(landing)
            while view:
                count = handle.readinto(view)
                assert count, f"{file.path}: ends early"
                view = view[count:]
        if landing is not content:
            content.copy_(landing)
        file.owner.tensors[file.storage._cdata] = file.tensors
        self._forget(file)

    def _forget(self, file: _File) -> None:
        del self._files[file.storage._cdata], file.owner.files[file.storage._cdata]
        file.path.unlink()


def _alive(tensors: list[weakref.ref[Tensor]]) -> list[weakref.ref[Tensor]]:
    return [tensor for tensor in tensors if tensor() is not None]


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    """The storage as uint8, not copied."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _memory(content: Tensor) -> memoryview:
    """The memory of a uint8 tensor of the processor; a storage that numpy has seen could not be emptied any more."""
    return memoryview((ctypes.c_char * content.numel()).from_address(content.data_ptr())).cast("B")


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors in what an operation takes or gives."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, Iterable) and not isinstance(values, str):
        for value in values:
            yield from _tensors(value)
