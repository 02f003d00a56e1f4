"""Several processes (ranks) that quantize one model together: `torchrun --nproc-per-node N -m llmquant quantize …`.

Each rank runs its share of the calibration samples through the model. The statistics of all ranks are summed, the
linears of an input group are divided among the ranks, and every rank receives all results. Only rank 0, the main
process, writes files and prints.

The sum does not depend on the number of ranks. The samples are divided, in order, into NUM_CHUNKS chunks. Each chunk is
summed on its own, and the chunks are added in order: a rank receives the sum of the earlier chunks, adds its own, and
sends the sum on. The last rank sends the total to all. A single process does the same additions. So the codes are bit
for bit those of a single process if all ranks compute alike (the same kind of processor or GPU, the same number of
threads).

Each linear is quantized on its own, from the statistics of all ranks, so the result does not depend on the rank that
quantizes it. Each rank factors the Hessian itself, because waiting for another rank's factor would take as long, and
sending it would take additional time.

A UserError on one rank is raised on all ranks (`raising_on_all`, `receive`). If a rank ends, all others end too.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from llmquant.algorithms.statistics import InputStatistics
from llmquant.errors import UserError, one_line
from llmquant.solver.reduction import NUM_CHUNKS, chunk_of
from llmquant.spec import Options

T = TypeVar("T")
OPERATION_TIMEOUT = timedelta(days=7)
"""Timeout of an operation between ranks. A rank may wait for hours while another hashes or quantizes. The wait
ends at once if another rank ends."""
START_TIMEOUT = timedelta(minutes=5)
"""Timeout for all ranks to start and connect. If a rank ends before it connects, the others wait until this timeout."""
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


class RankLost(UserError):
    """Another rank of the run has ended."""


class Ranks:
    """The rank of this process, and its communication with the other ranks of the run."""

    def __init__(self, rank: int = 0, size: int = 1, group: dist.ProcessGroup | None = None) -> None:
        """group: the process group of all ranks; None for PyTorch's default group."""
        self.rank, self.size = rank, size
        self._group = group
        self._sent: BaseException | None = None

    @classmethod
    def join(cls) -> Ranks:
        """Connect the ranks that torchrun has started. Without torchrun, this process is the only rank."""
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if size > NUM_CHUNKS:
            raise UserError(
                f"ranks {size}: at most {NUM_CHUNKS} can share the samples; use --nproc-per-node {NUM_CHUNKS}"
            )
        if size == 1 or dist.is_initialized():
            return cls(rank, size)
        if os.environ.get("LOCAL_WORLD_SIZE") == str(size):
            # By default, gloo uses the address of the host's name, which may not be an address of this machine.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            dist.init_process_group(backend, timeout=START_TIMEOUT)
            return cls(rank, size, dist.new_group(timeout=OPERATION_TIMEOUT))
        except (RuntimeError, ValueError) as error:
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            reason = one_line(error)
            raise RankLost(
                f"ranks {size}: rank {rank} could not join the others at {place} ({reason}); start them with one "
                "torchrun, with --master-port of a free port"
            ) from error

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the main process, which writes files and prints."""
        return self.rank == 0

    def options(self, options: Options) -> Options:
        """Return the options of this rank. The number of its GPU is the rank's number on its machine (LOCAL_RANK)."""
        if self.size == 1 or options.device not in ("auto", "cuda") or not torch.cuda.is_available():
            return options
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
        return replace(options, device=device)

    # --- division of the samples --------------------------------------------------------------------------------------

    @property
    def chunks(self) -> range:
        """The chunks of samples that this rank sums."""
        return range(NUM_CHUNKS * self.rank // self.size, NUM_CHUNKS * (self.rank + 1) // self.size)

    def samples(self, num_samples: int, at_least: int) -> range:
        """Return the samples of this rank.

        Raises UserError on all ranks if a rank has no sample, or if rank 0 has fewer than min(at_least, num_samples).
        """
        with self.raising_on_all():
            mine = [sample for sample in range(num_samples) if chunk_of(sample, num_samples) in self.chunks]
            needed = min(at_least, num_samples) if self.is_main else 1
            if len(mine) < needed:
                raise UserError(
                    f"samples {num_samples}: too few for {self.size} ranks (rank {self.rank} gets {len(mine)}, and "
                    f"needs {needed}); use more --samples or fewer ranks"
                )
        return range(mine[0], mine[-1] + 1)

    # --- communication ------------------------------------------------------------------------------------------------

    def send(self, value: object) -> None:
        """Send a value from rank 0 to all other ranks, which call `receive`."""
        self._broadcast([value, None])

    def receive(self) -> Any:
        """Receive the value that rank 0 sends, or raise the UserError that rank 0 has raised instead."""
        value, error = self._broadcast([None, None])
        if error is not None:
            self._sent = error
            raise error
        return value

    def on_main(self, work: Callable[[], T]) -> T:
        """Run work on rank 0 alone and return its result on all ranks, or raise its UserError on all ranks."""
        if not self.is_main:
            return self.receive()
        try:
            value = work()
        except UserError as error:
            self._sent = error
            self._broadcast([None, error])
            raise
        self.send(value)
        return value

    def _broadcast(self, message: list[Any]) -> list[Any]:
        """Send [value, error] from rank 0, and return it on all ranks. A single rank sends nothing."""
        if self.size > 1:
            with _lost_ranks():
                dist.broadcast_object_list(message, src=0, group=self._group, device=torch.device("cpu"))
        return message

    @contextmanager
    def session(self) -> Iterator[None]:
        """Send a UserError of rank 0 to the others, and close the connection. A context for the whole run."""
        try:
            yield
        except UserError as error:
            is_known = error is self._sent or isinstance(error, RankLost)
            if self.is_main and not is_known:
                self._broadcast([None, error])
            raise
        finally:
            if self.size > 1 and dist.is_initialized():
                dist.destroy_process_group()

    @contextmanager
    def raising_on_all(self) -> Iterator[None]:
        """Raise a UserError of any rank on all ranks. A context for work that every rank does by itself.

        If several ranks raise one, the error of the lowest rank is raised.
        """
        if self.size == 1:
            yield
            return
        own: UserError | None = None
        try:
            yield
        except UserError as error:
            own = error
        errors: list[UserError | None] = [None] * self.size
        with _lost_ranks():
            dist.all_gather_object(errors, own, group=self._group)
        if (first := next((error for error in errors if error is not None), None)) is not None:
            self._sent = first
            raise first

    def divide(self, costs: Mapping[str, int], work: Callable[[list[str]], dict[str, T]]) -> dict[str, T]:
        """Divide tasks among the ranks (`divide_tasks`) and return all results on all ranks, in the order of the tasks.

        costs: the cost of each task, by name. work: a function that computes the results of named tasks in CPU
        memory. A rank without a task does not call it.
        """
        names_of_ranks = divide_tasks(costs, self.size)
        mine = names_of_ranks[self.rank]
        with self.raising_on_all():
            own = work(mine) if mine else {}
        results = dict(own)
        for rank, names in enumerate(names_of_ranks if self.size > 1 else []):
            if names:
                box = [own if rank == self.rank else None]
                with _lost_ranks():
                    dist.broadcast_object_list(box, src=rank, group=self._group, device=torch.device("cpu"))
                results |= box[0] or {}
        return {name: results[name] for name in costs}

    def sum_statistics(
        self, chunks: Iterable[InputStatistics], empty: Callable[[], InputStatistics]
    ) -> InputStatistics:
        """Add the statistics of all chunks in order, and return the sum on all ranks.

        chunks: the statistics of this rank's chunks, in order. empty: a function that creates statistics of no token.
        """
        with self.raising_on_all():
            # The chunks of earlier ranks are added first, so only rank 0 can add up its own chunks at once.
            own = _sum(chunks, empty) if self.is_main else list(chunks)
        if self.size == 1:
            assert isinstance(own, InputStatistics)
            return own
        total = own if isinstance(own, InputStatistics) else empty()
        if isinstance(own, list):
            total.exchange(self._passing(dist.recv, self.rank - 1))
            for chunk in own:
                total.merge(chunk)
        del own
        if self.rank + 1 < self.size:
            total.exchange(self._passing(dist.send, self.rank + 1))
        total.exchange(self._passing(dist.broadcast, self.size - 1))
        return total

    def _passing(self, call: Callable[..., object], rank: int) -> Callable[[Tensor], None]:
        """Return a function that sends a tensor to a rank, or overwrites it with the tensor from that rank."""

        def pass_on(tensor: Tensor) -> None:
            with _lost_ranks():
                call(tensor, rank, group=self._group)

        return pass_on


def divide_tasks(costs: Mapping[str, int], size: int) -> list[list[str]]:
    """Return the tasks of each rank. The most expensive come first, each to the rank with the least work so far."""
    tasks: list[list[str]] = [[] for _ in range(size)]
    loads = [0] * size
    for name in sorted(costs, key=lambda name: -costs[name]):
        rank = loads.index(min(loads))
        tasks[rank].append(name)
        loads[rank] += costs[name]
    return tasks


def _sum(chunks: Iterable[InputStatistics], empty: Callable[[], InputStatistics]) -> InputStatistics:
    chunks = iter(chunks)
    total = next(chunks, None) or empty()
    for chunk in chunks:
        total.merge(chunk)
    return total


@contextmanager
def _lost_ranks() -> Iterator[None]:
    """Raise RankLost for a broken connection, which means that a rank has ended."""
    try:
        yield
    except RuntimeError as error:
        raise RankLost(
            "another rank has ended; the same command continues the run, with any number of ranks"
        ) from error
