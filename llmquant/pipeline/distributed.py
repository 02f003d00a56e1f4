"""Several processes (ranks) that quantize one model together: `torchrun --nproc-per-node N -m llmquant quantize …`.

Each rank runs its share of the calibration samples through the model. The statistics of all ranks are summed, the
linears of an input group are divided among the ranks, and every rank receives all results. Only rank 0, the main
process, writes files and prints.

The sum does not depend on the number of ranks. The samples are divided, in order, into pieces (`solver/reduction.py`),
and each rank has some consecutive pieces. The pieces are added in a fixed order: a rank receives the sum of the earlier
pieces, adds its own, and sends the sum on. The last rank sends the total to all. A single process does the same
additions. So the codes are bit for bit those of a single process if all ranks compute alike (the same kind of processor
or GPU, the same number of threads).

The ranks may run on several nodes (machines). Every node needs the same checkpoint, which each rank reads by itself
(`pipeline/nodes.py`). OUT is written on the node of rank 0.

Each linear is quantized on its own, from the statistics of all ranks, so the result does not depend on the rank that
quantizes it. Each rank factors the Hessian itself, because waiting for another rank's factor would take as long, and
sending it would take additional time.

A UserError on one rank is raised on all ranks (`raising_on_all`, `receive`). If a rank ends, all others end too.
"""

from __future__ import annotations

import io
import os
import pickle
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from llmquant.algorithms.statistics import InputStatistics
from llmquant.errors import UserError, one_line
from llmquant.pipeline.nodes import gloo_interface, has_several_nodes, is_on_node_of_main, place_of_rank
from llmquant.solver.division import divide_tasks, pieces_of_rank
from llmquant.solver.reduction import (
    NUM_PIECES,
    PieceSum,
    chunk_of_piece,
    piece_of,
    starts_inside_chunk,
    sums_of_chunks,
)
from llmquant.spec import Options

T = TypeVar("T")
OPERATION_TIMEOUT = timedelta(days=7)
"""Timeout of an operation between ranks. A rank may wait for hours while another hashes or quantizes. The wait
ends at once if another rank ends."""
START_TIMEOUT = timedelta(minutes=5)
"""Timeout for all ranks to start and connect. If a rank ends before it connects, the others wait until this timeout."""


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
        if size > NUM_PIECES:
            raise UserError(
                f"ranks {size}: at most {NUM_PIECES} can share the samples; use --nnodes and --nproc-per-node with a "
                f"product of at most {NUM_PIECES}"
            )
        if size == 1 or dist.is_initialized():
            return cls(rank, size)
        # By default, gloo uses the address of the host's name, which may not be an address of this machine.
        if (interface := gloo_interface()) is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            dist.init_process_group(backend, timeout=START_TIMEOUT)
            return cls(rank, size, dist.new_group(timeout=OPERATION_TIMEOUT))
        except (RuntimeError, ValueError) as error:
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            reason = one_line(error)
            remedy = "start them with one torchrun, with --master-port of a free port"
            if has_several_nodes():
                remedy = (
                    "start the same torchrun on every node, with a --master-addr that all can reach, and set "
                    "GLOO_SOCKET_IFNAME to the network interface that connects them"
                )
            raise RankLost(
                f"ranks {size}: rank {rank} could not join the others at {place} ({reason}); {remedy}"
            ) from error

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the main process, which writes files and prints."""
        return self.rank == 0

    def options(self, options: Options) -> Options:
        """Return the options of this rank. The number of its GPU is the rank's number on its machine (LOCAL_RANK).

        Raises UserError on all ranks if a machine has fewer GPUs than ranks.
        """
        if self.size == 1:
            return options
        with self.raising_on_all():
            device = self._device(options.device)
            if device != options.device:
                torch.cuda.set_device(device)
        return replace(options, device=device)

    def _device(self, device: str) -> str:
        """Return the device of this rank for the device of the options."""
        if device.startswith("cuda:"):
            raise UserError(f"device '{device}': {self.size} ranks cannot share one GPU; use --device cuda")
        if device not in ("auto", "cuda") or not torch.cuda.is_available():
            return device
        number, num_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if number >= num_gpus:
            raise UserError(
                f"ranks {self.size}: rank {self.rank} needs GPU {number} of its node, which has {num_gpus}; use "
                f"--nproc-per-node {num_gpus}"
            )
        return f"cuda:{number}"

    # --- nodes --------------------------------------------------------------------------------------------------------

    @property
    def compares_files(self) -> bool:
        """Whether this rank compares the files of the checkpoint on its node with those on the node of rank 0."""
        return not is_on_node_of_main() and os.environ.get("LOCAL_RANK", "0") == "0"

    def check_alike(self, facts: Callable[[], Mapping[str, str]] | None) -> None:
        """Compare facts, name -> value, with those of rank 0. All ranks call this; None compares nothing.

        Raises UserError on all ranks if one differs.
        """
        if self.size == 1:
            return
        with self.raising_on_all():
            own_facts = None if facts is None else facts()
        expected = self.on_main(lambda: dict(own_facts or {}))
        compared = expected if own_facts is None else own_facts
        with self.raising_on_all():
            for name in sorted(expected.keys() | compared.keys()):
                own, main = (which.get(name, "missing") for which in (compared, expected))
                if own != main:
                    raise UserError(
                        f"{name}: {own} here, {main} on rank 0; give every rank the same checkpoint and the same "
                        "versions of packages"
                    )

    def scratch(self, folder: Path) -> Path:
        """Return this rank's folder for temporary files. folder: that of rank 0, which other nodes may not have."""
        if is_on_node_of_main() or folder.parent.is_dir():
            return folder / f"rank-{self.rank}"
        return Path(tempfile.mkdtemp(prefix="llmquant-"))

    # --- division of the samples --------------------------------------------------------------------------------------

    @property
    def pieces(self) -> range:
        """The pieces of the samples that this rank sums."""
        return pieces_of_rank(self.rank, self.size)

    def samples(self, num_samples: int, at_least: int) -> range:
        """Return the samples that this rank runs: those of its pieces, and on rank 0 the first `at_least` too.

        Raises UserError on all ranks if a rank has no sample.
        """
        with self.raising_on_all():
            mine = [sample for sample in range(num_samples) if piece_of(sample, num_samples) in self.pieces]
            if not mine:
                raise UserError(
                    f"samples {num_samples}: too few for {self.size} ranks (rank {self.rank} gets none); use more "
                    "--samples or fewer ranks"
                )
        stop = mine[-1] + 1
        return range(mine[0], max(stop, min(at_least, num_samples)) if self.is_main else stop)

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
        return message if self.size == 1 else self._share(message, 0)

    def _share(self, value: Any, source: int) -> Any:
        """Send a value from one rank to all others, and return it. Tensors arrive in CPU memory.

        A pickled tensor would be copied several times on its way, so the bytes of the tensors are sent without pickle.
        """
        tensors: list[Tensor] = []
        box: list[Any] = [None, None]
        if self.rank == source:
            box = [_pickled_without_tensors(value, tensors), [(tensor.dtype, tensor.shape) for tensor in tensors]]
        with _lost_ranks():
            dist.broadcast_object_list(box, src=source, group=self._group, device=torch.device("cpu"))
            pickled, kinds = box
            if self.rank != source:
                tensors = [torch.empty(shape, dtype=dtype) for dtype, shape in kinds]
            for tensor in tensors:
                if tensor.numel():
                    dist.broadcast(tensor.view(-1).view(torch.uint8), src=source, group=self._group)
        return value if self.rank == source else _unpickled(pickled, tensors)

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

        If several ranks raise one, the error of the lowest rank is raised. An error on another node than that of rank 0
        names the rank and the node.
        """
        if self.size == 1:
            yield
            return
        own: UserError | None = None
        try:
            yield
        except UserError as error:
            if not is_on_node_of_main():
                error.args = (f"{place_of_rank(self.rank)}: {error}",)
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
                results |= self._share(own if rank == self.rank else None, rank)
        return {name: results[name] for name in costs}

    def sum_statistics(
        self, pieces: Iterable[tuple[int, InputStatistics]], empty: Callable[[], InputStatistics]
    ) -> InputStatistics:
        """Add the statistics of all pieces in order, and return the sum on all ranks.

        pieces: the numbers of this rank's pieces and their statistics, in order. empty: a function that creates
        statistics of no token.
        """
        total, own = PieceSum(), []
        with self.raising_on_all():
            # The pieces of earlier ranks are added first, so only rank 0 can add its own to the total at once.
            if self.is_main:
                for piece, statistics in pieces:
                    total.add(chunk_of_piece(piece), statistics)
                    # Without `del`, this piece would stay in memory until the next piece is complete.
                    del statistics
            else:
                own = list(sums_of_chunks(pieces, self.pieces.start))
        if self.rank > 0:
            receive = self._passing(dist.recv, self.rank - 1)
            total.closed = _exchanged(empty(), receive)
            if starts_inside_chunk(self.pieces.start):
                total.chunk, total.open = chunk_of_piece(self.pieces.start), _exchanged(empty(), receive)
        while own:
            total.add(*own.pop(0))
        if self.rank + 1 < self.size:
            self._send_sum(total, empty)
        whole = total.close() or empty()
        return whole if self.size == 1 else _exchanged(whole, self._passing(dist.broadcast, self.size - 1))

    def _send_sum(self, total: PieceSum, empty: Callable[[], InputStatistics]) -> None:
        """Send the sum so far to the next rank. It continues the last chunk if that chunk belongs to both ranks."""
        send, part = self._passing(dist.send, self.rank + 1), None
        if starts_inside_chunk(self.pieces.stop) and total.chunk == chunk_of_piece(self.pieces.stop):
            part, total.open = total.open, None
        _exchanged(total.close() or empty(), send)
        if starts_inside_chunk(self.pieces.stop):
            _exchanged(part or empty(), send)

    def _passing(self, call: Callable[..., object], rank: int) -> Callable[[Tensor], None]:
        """Return a function that sends a tensor to a rank, or overwrites it with the tensor from that rank."""

        def pass_on(tensor: Tensor) -> None:
            with _lost_ranks():
                call(tensor, rank, group=self._group)

        return pass_on


def _exchanged(statistics: InputStatistics, pass_on: Callable[[Tensor], None]) -> InputStatistics:
    statistics.exchange(pass_on)
    return statistics


class _Pickler(pickle.Pickler):
    """Pickles a value without its tensors, which it appends to a list."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._tensors = tensors

    def persistent_id(self, value: Any) -> int | None:
        """Return the number of a tensor; None for any other value."""
        if type(value) is not Tensor:
            return None
        self._tensors.append(value.detach().to("cpu").contiguous())
        return len(self._tensors) - 1


class _Unpickler(pickle.Unpickler):
    """Restores a value that `_Pickler` has pickled."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        """Return a tensor by its number."""
        return self._tensors[number]


def _pickled_without_tensors(value: Any, tensors: list[Tensor]) -> bytes:
    """Pickle a value, and append its tensors to a list instead, contiguous and in CPU memory."""
    file = io.BytesIO()
    _Pickler(file, tensors).dump(value)
    return file.getvalue()


def _unpickled(pickled: bytes, tensors: list[Tensor]) -> Any:
    return _Unpickler(io.BytesIO(pickled), tensors).load()


@contextmanager
def _lost_ranks() -> Iterator[None]:
    """Raise RankLost for a broken connection, which means that a rank has ended."""
    try:
        yield
    except RuntimeError as error:
        raise RankLost(
            "another rank has ended; the same command continues the run, with any number of ranks"
        ) from error
