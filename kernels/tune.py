"""Time kernels on the GPU of this machine, and find the fastest tiles for it.

Calls are timed in a CUDA graph, so that Python costs nothing. They rotate through enough copies of the weight to fill
the second-level cache four times, because a weight that is read twice in a row comes from that cache. The data is
random, because zeros draw less power and let the clock rise. The result is the median of many replays.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmquant.kernels import gpu
from llmquant.kernels.layout import LinearShape
from llmquant.kernels.tiles import (
    ROW_BUCKETS,
    Gpu,
    Problem,
    Tiles,
    estimated_time,
    rule_of_thumb,
    user_table_path,
    with_splits,
    write_table,
)
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

CACHE_FILLS = 4
"""How many times the copies of a weight fill the second-level cache."""

DENSE_ROWS = (128, 192, 256, 384, 512, 768, 1024)
"""Numbers of rows of x for which tuning compares the fused and the dense path."""

MAX_CANDIDATES = 24
"""Tiles to time for each shape and number of rows."""

CANDIDATE_ROWS = {16: (16,), 32: (32,), 64: (32, 64), 128: (64, 128)}
"""Largest number of rows of x -> rows of the tiles to time; (64, 128) above the last one."""


def copies_needed(weight_bytes: int, cache_bytes: int) -> int:
    """Return how many copies of a weight to rotate through, so that none is still cached when it is read again."""
    return max(2, -(-CACHE_FILLS * cache_bytes // weight_bytes))


def graph_microseconds(calls: Sequence[Callable[[], Any]], *, replays: int = 30, min_calls: int = 40) -> float:
    """Return the microseconds per call, as the median of replays of a CUDA graph.

    The graph makes the calls in turn, until there are at least `min_calls`.
    """
    rounds = -(-min_calls // len(calls))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in [*calls, *calls[:3]]:  # before the capture: compile, and allocate the workspace of cuBLAS
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    times = []
    for _ in range(replays):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / (rounds * len(calls)))
    return statistics.median(times)


def copy_bandwidth(device: torch.device) -> float:
    """Return the bytes per second that a device-to-device copy of 1 GiB reads and writes, added together."""
    source = torch.randint(0, 256, (1 << 30,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (graph_microseconds([partial(target.copy_, source)], min_calls=4) * 1e-6)


def random_weight(shape: LinearShape, device: torch.device, generator: torch.Generator) -> QuantizedWeight:
    """Return a weight of this shape with random codes, scales and zero-points. The generator must be on the device."""
    weight_shape, group_shape = (shape.out_features, shape.in_features), (shape.out_features, shape.num_groups)
    codes_NK = torch.randint(0, 2**shape.bits, weight_shape, dtype=torch.uint8, device=device, generator=generator)
    zero_NG = torch.randint(0, 2**shape.bits, group_shape, dtype=torch.uint8, device=device, generator=generator)
    scale_NG = torch.rand(group_shape, device=device, generator=generator) * 0.02 + 0.005
    return QuantizedWeight(
        codes_NK=codes_NK,
        scale_NG=scale_NG.bfloat16().half(),  # exact in both dtypes, so that every error comes from the kernel
        zero_NG=zero_NG.fill_(2 ** (shape.bits - 1)) if shape.symmetric else zero_NG,
        spec=QuantSpec(bits=shape.bits, group_size=shape.group_size, symmetric=shape.symmetric),
        group_index_K=torch.randperm(shape.in_features, device=device, generator=generator) // shape.group_size
        if shape.act_order_groups
        else None,
    )


def prepared_copies(
    shape: LinearShape, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> list[tuple[Tensor, ...]]:
    """Return `copies_needed` different random weights of this shape, prepared by backend `triton`."""
    generator = torch.Generator(device).manual_seed(seed)
    first = gpu.prepare(random_weight(shape, device, generator), dtype, device)
    num_bytes = sum(tensor.nbytes for tensor in first)
    num_copies = copies_needed(num_bytes, torch.cuda.get_device_properties(device).L2_cache_size)
    others = (gpu.prepare(random_weight(shape, device, generator), dtype, device) for _ in range(num_copies - 1))
    return [first, *others]


def candidate_tiles(problem: Problem, rows: int, this_gpu: Gpu) -> list[Tiles]:
    """Return the tiles to time for this number of rows, at most `MAX_CANDIDATES`.

    The first are those of `rule_of_thumb`; the others follow by `estimated_time`, the fastest first.
    """
    first = rule_of_thumb(problem, rows, this_gpu)
    tile_rows = next((sizes for limit, sizes in CANDIDATE_ROWS.items() if rows <= limit), (64, 128))
    others: dict[Tiles, float] = {}
    for size_m, (features, warps), stages in itertools.product(tile_rows, ((64, 4), (128, 4), (128, 8)), (3, 4, 6)):
        if problem.features % features or (size_m == 128 and (stages == 6 or (features, warps) == (128, 4))):
            continue  # the last two need too many registers or too much shared memory
        post = problem.blocks_per_tile == 1 and size_m <= 32
        tiles = Tiles(rows=size_m, features=features, split_k=1, warps=warps, stages=stages, post=post)
        splits = {split: estimated_time(split, problem, rows, this_gpu) for split in with_splits(tiles, problem, rows)}
        others |= {tiles: splits[tiles] for tiles in sorted(splits, key=splits.__getitem__)[:2]}
    others.pop(first, None)
    return [first, *sorted(others, key=others.__getitem__)][:MAX_CANDIDATES]


def tune_tiles(
    shapes: Sequence[LinearShape],
    dtype: torch.dtype,
    device: torch.device,
    *,
    buckets: Sequence[int] = ROW_BUCKETS,
    max_seconds: float | None = None,
    path: Path | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Measure tiles for these linears, write the fastest to a table, and return its path.

    buckets: numbers of rows to measure, of `ROW_BUCKETS`. The number of rows from which the dense path is faster is
    measured if one of them is 128 or more. max_seconds: start no measurement after this time; every shape and bucket
    gets an equal share of it, and those without a measurement get no entry. None for no limit. path: the table; the
    default is the user's table for this GPU. report: called with a line of text for each result.

    Raises RuntimeError if any tiles give another result than those of `rule_of_thumb`. The first linear takes longer
    than others of the same grid, which reuse its compiled kernels.
    """
    this_gpu = gpu.gpu_of(device)
    table: dict[str, Any] = {"gpu": this_gpu.name, "torch": torch.__version__, "entries": {}, "dense_from_rows": {}}
    end = math.inf if max_seconds is None else time.monotonic() + max_seconds
    for number, shape in enumerate(shapes):
        if time.monotonic() >= end:
            report(f"{shape.describe()} and {len(shapes) - number - 1} more shapes are not timed: time is up")
            break
        copies = prepared_copies(shape, dtype, device)
        problem = gpu.problem_of(copies[0])
        best: dict[int, Tiles] = {}
        for position, bucket in enumerate(buckets):
            pairs_left = (len(shapes) - number) * len(buckets) - position
            now = time.monotonic()
            timed = _time_tiles(shape, copies, dtype, device, bucket, this_gpu, now + (end - now) / pairs_left)
            name = f"{shape.describe()} {problem.dtype} up to {bucket} rows"
            if timed.fastest is None:
                report(f"{name}: not timed, time is up")
                continue
            best[bucket] = timed.fastest
            report(f"{name}: {timed.describe()}")
        table["entries"][problem.key] = {str(bucket): tiles.as_json() for bucket, tiles in best.items()}
        if best and max(best) >= DENSE_ROWS[0] and time.monotonic() < end:
            table["dense_from_rows"][problem.key] = _dense_threshold(shape, copies, dtype, device, best)
            report(f"{shape.describe()} {problem.dtype}: dense from {table['dense_from_rows'][problem.key]} rows")
    path = path or user_table_path(this_gpu.name)
    write_table(path, table)
    gpu.forget_plans()
    return path


@dataclass(frozen=True, kw_only=True)
class _Timings:
    """What the timing of the candidates for one shape and one number of rows found."""

    fastest: Tiles | None
    """The fastest tiles; None if there was no time for any."""
    microseconds: float
    """Time of a call with the fastest tiles."""
    rule_microseconds: float
    """Time of a call with the tiles of `rule_of_thumb`; NaN if the GPU does not support them."""
    num_timed: int
    """Candidates that were timed or that the GPU does not support."""
    num_candidates: int
    """All candidates."""

    def describe(self) -> str:
        """Return a line for the report."""
        stopped = "" if self.num_timed == self.num_candidates else f"; {self.num_timed} of {self.num_candidates} timed"
        return f"{self.microseconds:.1f} us (rule {self.rule_microseconds:.1f}), {self.fastest}{stopped}"


def _time_tiles(
    shape: LinearShape,
    copies: list[tuple[Tensor, ...]],
    dtype: torch.dtype,
    device: torch.device,
    rows: int,
    this_gpu: Gpu,
    deadline: float,
) -> _Timings:
    """Time the candidates for this number of rows; start none after the deadline, a time of `time.monotonic`."""
    x_MK = torch.randn(rows, shape.in_features, device=device).to(dtype)
    problem = gpu.problem_of(copies[0])
    candidates = candidate_tiles(problem, rows, this_gpu)
    expected = None
    times: dict[Tiles, float] = {}
    num_timed = 0
    for tiles in candidates:
        if time.monotonic() >= deadline:
            break
        num_timed += 1
        try:
            y_MN = gpu.launch(x_MK, copies[0], None, shape, tiles).float()
        except Exception as error:  # too little shared memory, or the compiler cannot compile these tiles
            if not _is_unsupported(error):
                raise
            continue
        expected = y_MN if expected is None else expected
        if (y_MN - expected).norm() > 4e-3 * expected.norm():
            raise RuntimeError(
                f"{shape.describe()}, {rows} rows: {tiles} gives another result than the tiles of the rule"
            )
        times[tiles] = graph_microseconds([partial(gpu.launch, x_MK, copy, None, shape, tiles) for copy in copies])
    fastest = min(times, key=times.__getitem__, default=None)
    return _Timings(
        fastest=fastest,
        microseconds=math.nan if fastest is None else times[fastest],
        rule_microseconds=times.get(candidates[0], math.nan),
        num_timed=num_timed,
        num_candidates=len(candidates),
    )


def _dense_threshold(
    shape: LinearShape,
    copies: list[tuple[Tensor, ...]],
    dtype: torch.dtype,
    device: torch.device,
    best: dict[int, Tiles],
) -> int:
    """Return the smallest of DENSE_ROWS from which on the dense path is never slower than the fused kernel.

    If there is none, return a number above all of them.
    """
    threshold = DENSE_ROWS[-1] + 1
    for rows in reversed(DENSE_ROWS):
        x_MK = torch.randn(rows, shape.in_features, device=device).to(dtype)
        tiles = best[min((bucket for bucket in best if bucket >= rows), default=max(best))]
        fused = graph_microseconds([partial(gpu.launch, x_MK, copy, None, shape, tiles) for copy in copies])
        dense = graph_microseconds([partial(gpu.matmul_dense, x_MK, copy, None, shape) for copy in copies])
        if fused < dense:
            return threshold
        threshold = rows
    return threshold


def _is_unsupported(error: Exception) -> bool:
    """Whether an exception of a launch means that this GPU or compiler does not support the tiles."""
    names = {cls.__name__ for cls in type(error).__mro__}
    return bool(names & {"OutOfResources", "CompilationError", "PTXASError"}) or "PassManager" in str(error)
