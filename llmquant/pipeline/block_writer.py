"""Writing finished decoder blocks, on a GPU while the next block is computed."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial as partial_call
from types import TracebackType
from typing import Any

from torch import Tensor

from llmquant.checkpoints.copies import tensor_digest
from llmquant.pipeline.output import pack_part
from llmquant.pipeline.run import Run
from llmquant.solver.output_hessian import cross_row_part
from llmquant.solver.quantize_linear import LinearResult


class BlockWriter:
    """Packs and writes the blocks of a run, one after the other. A context manager, which waits for the last one.

    On a GPU, a thread of its own does so: packing, hashing and the disk then cost no time unless a block takes longer
    to write than the next one takes to quantize. At most one block waits, so memory holds the codes of two. On a CPU,
    the writing would compete with the computation, and blocks are written at once.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._pool = ThreadPoolExecutor(1, "writer") if run.plan.skeleton.device.type == "cuda" else None
        self._pending: Future[None] | None = None

    def __enter__(self) -> BlockWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except Exception:  # an error of the computation came first, and is the one to report
            if error is None:
                raise
        finally:
            if self._pool is not None:
                self._pool.shutdown()

    def write(self, index: int, part: str, results: Mapping[str, LinearResult], folded: Mapping[str, Tensor]) -> None:
        """Write a block as a part of the unfinished checkpoint, and remove its part with cross-row factors.

        results: by name within the block. folded: parameters that AWQ's scales changed, by name in the model. Raises
        the UserErrors of `PartialCheckpoint.add_part` for this block or, on a GPU, for the block before it.
        """
        self.wait()
        with self._run.log.timed("writing"):
            linears = self._run.plan.linears_of_block(index)
            digests = {name: tensor_digest(folded[name]) for name in sorted(folded)}
            note = self._run.log.record_of(linears.values()) | {"folded": digests}
            work = partial_call(self._write, index, part, results, folded, note)
            if self._pool is None:
                work()
            else:
                self._pending = self._pool.submit(work)

    def wait(self) -> None:
        """Wait until the last block is on the disk. Raises the UserErrors of `PartialCheckpoint.add_part`."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            with self._run.log.timed("writing"):
                pending.result()

    def _write(
        self,
        index: int,
        part: str,
        results: Mapping[str, LinearResult],
        folded: Mapping[str, Tensor],
        note: dict[str, Any],
    ) -> None:
        plan, checkpoint = self._run.plan, self._run.checkpoint
        checkpoint.add_part(part, pack_part(plan, index, plan.linears_of_block(index), results, folded), note)
        checkpoint.drop_part(cross_row_part(index))
