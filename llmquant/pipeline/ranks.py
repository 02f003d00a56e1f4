"""Several processes that quantize one model together: `torchrun --nproc-per-node N -m llmquant quantize …`.

Every rank walks through the network with its share of the calibration sequences; their statistics are summed up, the
linears that read one input are solved on different ranks, and all go on with all results. Only the first rank writes,
and only it speaks.

The sum does not depend on the number of ranks. The samples are divided into LANES, in order; each lane is summed up on
its own, and the lanes are added one after the other: a rank receives the sum of those before its own, adds its own, and
hands it on; the last one gives it to all. One process does the same additions. So the codes are those of one process,
bit for bit, as long as all compute alike (the same kind of processor or GPU, the same number of threads).

Each linear is solved on its own, with what all ranks know of its stage, so it does not matter where. Every rank that
solves factors the Hessian itself: one that was sent the factor would have waited for it as long, and then for the
sending.

What goes wrong on one rank goes wrong on all: `together` and `share` pass an error of the user's on to every rank. A
rank that is gone ends the others.
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
from llmquant.errors import UserError, first_words
from llmquant.spec import Options

T = TypeVar("T")
LANES = 8
"""Parts of the samples that are summed up on their own; more ranks than that cannot share them."""
PATIENCE = timedelta(days=7)
"""A rank may wait for hours while another hashes or solves; one that is gone is noticed at once."""
MEETING = timedelta(minutes=5)
"""For all ranks to start and to find each other. One that is gone by then is not noticed by those that wait for it."""
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


class RankLost(UserError):
    """Another process of the run is gone."""


class Ranks:
    """This process among those of its run."""

    def __init__(self, rank: int = 0, size: int = 1, group: dist.ProcessGroup | None = None) -> None:
        """group: of all ranks; None for torch's default one."""
        self.rank, self.size = rank, size
        self._group = group
        self._told: BaseException | None = None

    @classmethod
    def join(cls) -> Ranks:
        """The ranks that torchrun has started, or this process alone."""
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if size > LANES:
            raise UserError(f"ranks {size}: at most {LANES} can share the calibration; use --nproc-per-node {LANES}")
        if size == 1 or dist.is_initialized():
            return cls(rank, size)
        if os.environ.get("LOCAL_WORLD_SIZE") == str(size):
            # gloo would take the address of the host's name, which need not lead back to this machine.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            dist.init_process_group(backend, timeout=MEETING)
            return cls(rank, size, dist.new_group(timeout=PATIENCE))
        except (RuntimeError, ValueError) as error:
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            reason = first_words(error)
            raise RankLost(
                f"ranks {size}: rank {rank} could not join the others at {place} ({reason}); start them with one "
                "torchrun, with --master-port of a free port"
            ) from error

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    def options(self, options: Options) -> Options:
        """The options of this rank: each takes the GPU of its number on its machine."""
        if self.size == 1 or options.device not in ("auto", "cuda") or not torch.cuda.is_available():
            return options
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
        return replace(options, device=device)

    # --- who has which samples ---------------------------------------------------------------------------------------

    @property
    def lanes(self) -> range:
        """The lanes of this rank."""
        return range(LANES * self.rank // self.size, LANES * (self.rank + 1) // self.size)

    def samples(self, num_samples: int, at_least: int) -> range:
        """The samples of this rank. UserError, on all ranks, where one has none, or the first fewer than at_least."""
        with self.together():
            mine = [sample for sample in range(num_samples) if lane_of(sample, num_samples) in self.lanes]
            needed = min(at_least, num_samples) if self.is_first else 1
            if len(mine) < needed:
                raise UserError(
                    f"samples {num_samples}: too few for {self.size} ranks (rank {self.rank} gets {len(mine)}, and "
                    f"needs {needed}); use more --samples, or fewer ranks"
                )
        return range(mine[0], mine[-1] + 1)

    # --- together ----------------------------------------------------------------------------------------------------

    def share(self, work: Callable[[], T]) -> T:
        """What the first rank makes of the work; the others do not do it, and get its result, or its UserError."""
        if self.size == 1:
            return work()
        box: list[Any] = [None, None]
        if self.is_first:
            try:
                box[0] = work()
            except UserError as error:
                box[1] = error
        with _lost_ranks():
            dist.broadcast_object_list(box, src=0, group=self._group, device=torch.device("cpu"))
        if box[1] is not None:
            self._told = box[1]
            raise box[1]
        return box[0]

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Around the whole run: while the first rank works alone, the others wait in `share`, and get its UserError."""
        try:
            yield
        except UserError as error:
            known = error is self._told or isinstance(error, RankLost)
            if self.size > 1 and self.is_first and not known:
                with _lost_ranks():
                    dist.broadcast_object_list([None, error], src=0, group=self._group, device=torch.device("cpu"))
            raise
        finally:
            if self.size > 1 and dist.is_initialized():
                dist.destroy_process_group()

    @contextmanager
    def together(self) -> Iterator[None]:
        """What every rank does by itself: a UserError of any of them, the lowest first, is raised on all."""
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
            self._told = first
            raise first

    def spread(self, costs: Mapping[str, int], work: Callable[[list[str]], dict[str, T]]) -> dict[str, T]:
        """What the ranks make of some tasks, each of its own (`divided`), on all ranks in the order of the tasks.

        costs: of each task, by name. work: makes the results of a rank's tasks, by name, in main memory; a rank
        without a task does not call it.
        """
        parts = divided(costs, self.size)
        mine = parts[self.rank]
        with self.together():
            own = work(mine) if mine else {}
        results = dict(own)
        for rank, names in enumerate(parts if self.size > 1 else []):
            if names:
                box = [own if rank == self.rank else None]
                with _lost_ranks():
                    dist.broadcast_object_list(box, src=rank, group=self._group, device=torch.device("cpu"))
                results |= box[0] or {}
        return {name: results[name] for name in costs}

    def fold(self, lanes: Iterable[InputStatistics], empty: Callable[[], InputStatistics]) -> InputStatistics:
        """The sum of the lanes of all ranks, on all ranks. lanes: this rank's, in order. empty: makes one of no
        token."""
        with self.together():
            # What comes before its own is added first, so a later rank has to keep its lanes apart.
            own = _sum(lanes, empty) if self.is_first else list(lanes)
        if self.size == 1:
            assert isinstance(own, InputStatistics)
            return own
        total = own if isinstance(own, InputStatistics) else empty()
        if isinstance(own, list):
            total.exchange(self._passing(dist.recv, self.rank - 1))
            for lane in own:
                total.merge(lane)
        del own
        if self.rank + 1 < self.size:
            total.exchange(self._passing(dist.send, self.rank + 1))
        total.exchange(self._passing(dist.broadcast, self.size - 1))
        return total

    def _passing(self, call: Callable[..., object], rank: int) -> Callable[[Tensor], None]:
        """Passes a tensor on to, or takes it from, another rank."""

        def pass_on(tensor: Tensor) -> None:
            with _lost_ranks():
                call(tensor, rank, group=self._group)

        return pass_on


def divided(costs: Mapping[str, int], size: int) -> list[list[str]]:
    """The tasks of each rank: the most expensive first, each to the rank that has least to do, the first of several."""
    parts: list[list[str]] = [[] for _ in range(size)]
    loads = [0] * size
    for name in sorted(costs, key=lambda name: -costs[name]):
        rank = loads.index(min(loads))
        parts[rank].append(name)
        loads[rank] += costs[name]
    return parts


def lane_of(sample: int, num_samples: int) -> int:
    """The lane of a sample."""
    return LANES * sample // num_samples


def half_of(sample: int, num_samples: int) -> int:
    """The half of the text, 0 or 1, that a sample's lane counts to: in turn, of those lanes that have a sample."""
    return (lane_of(sample, num_samples) if num_samples >= LANES else sample) % 2


def _sum(lanes: Iterable[InputStatistics], empty: Callable[[], InputStatistics]) -> InputStatistics:
    lanes = iter(lanes)
    total = next(lanes, None) or empty()
    for lane in lanes:
        total.merge(lane)
    return total


@contextmanager
def _lost_ranks() -> Iterator[None]:
    """A broken connection is a rank that has ended."""
    try:
        yield
    except RuntimeError as error:
        raise RankLost(
            "another rank has ended; the same command continues the run, with any number of ranks"
        ) from error
