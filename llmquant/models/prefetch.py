"""Reading the weights of the next decoder block while a GPU computes with those of the current one."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from llmquant.checkpoints.reader import CheckpointReader


class Prefetcher:
    """Reads tensors of a checkpoint in a thread of its own, into pinned memory, from which copies to a GPU are fast."""

    def __init__(self, reader: CheckpointReader) -> None:
        self._reader = reader
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._futures: dict[str, Future[Tensor]] = {}

    def start(self, names: Iterable[str]) -> None:
        """Start to read these tensors. Those of an earlier call that were not taken are freed."""
        self.cancel()
        self._futures = {name: self._pool.submit(self._read, name) for name in names}

    def cancel(self) -> None:
        """Start no further read, and free what was not taken. Without this, a process that ends reads everything."""
        for future in self._futures.values():
            future.cancel()
        self._futures = {}

    def take(self, name: str) -> Tensor | None:
        """Return a tensor once it is read, and forget it; None if it was not prefetched.

        Raises the UserErrors of `CheckpointReader.read`.
        """
        future = self._futures.pop(name, None)
        return None if future is None else future.result()

    def _read(self, name: str) -> Tensor:
        tensor = self._reader.read(name)
        try:
            return tensor.pin_memory() if torch.cuda.is_available() else tensor
        except RuntimeError:  # the system limits pinned memory; the copy to the GPU is then slower, and nothing else
            return tensor
