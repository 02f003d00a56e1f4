"""Time kernels on the GPU that is here, and find the best tiles for it.

How time is taken: calls are captured in a CUDA graph, so that Python costs nothing; they rotate through enough copies
of the weight to fill the second-level cache four times over, since a weight that is read twice in a row comes from
there; data is random, since zeros draw less power and let the clock rise; and the median of many replays counts.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmquant.kernels import gpu
from llmquant.kernels.layout import LinearShape
from llmquant.kernels.tiles import ROW_BUCKETS, Gpu, Problem, Tiles, rule_of_thumb, user_table_path, write_table
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

CACHE_FILLS = 4
"""How often the rotated weights fill the second-level cache."""

DENSE_ROWS = (128, 192, 256, 384, 512, 768, 1024)
"""Rows of x at which the fused and the dense path are compared."""


def copies_needed(weight_bytes: int, cache_bytes: int) -> int:
    """Copies of a weight so that none is still cached when its turn comes again."""
    return max(2, -(-CACHE_FILLS * cache_bytes // weight_bytes))


def graph_microseconds(calls: Sequence[Callable[[], Any]], *, replays: int = 30, least_calls: int = 40) -> float:
    """Microseconds per call: the median replay of a CUDA graph that makes the calls in turn, `least_calls` or more."""
    rounds = -(-least_calls // len(calls))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in [*calls, *calls[:3]]:  # compiles, and lets cuBLAS take its workspace, before the capture
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
    """Bytes per second that a device-to-device copy of 1 GiB moves, reads and writes counted."""
    source = torch.randint(0, 256, (1 << 30,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (graph_microseconds([partial(target.copy_, source)], least_calls=4) * 1e-6)


def random_weight(layer: LinearShape, device: torch.device, generator: torch.Generator) -> QuantizedWeight:
    """Random codes, scales and zeros of this shape, on the device. The generator is the device's."""
    size, groups = (layer.out_features, layer.in_features), (layer.out_features, layer.num_groups)
    codes_NK = torch.randint(0, 2**layer.bits, size, dtype=torch.uint8, device=device, generator=generator)
    zero_NG = torch.randint(0, 2**layer.bits, groups, dtype=torch.uint8, device=device, generator=generator)
    scale_NG = torch.rand(groups, device=device, generator=generator) * 0.02 + 0.005
    return QuantizedWeight(
        codes_NK=codes_NK,
        scale_NG=scale_NG.bfloat16().half(),  # exact in both, so that an error is the kernel's
        zero_NG=zero_NG.fill_(2 ** (layer.bits - 1)) if layer.symmetric else zero_NG,
        spec=QuantSpec(bits=layer.bits, group_size=layer.group_size, symmetric=layer.symmetric),
        group_index_K=torch.randperm(layer.in_features, device=device, generator=generator) // layer.group_size
        if layer.moving_groups
        else None,
    )


def prepared_copies(
    layer: LinearShape, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> list[tuple[Tensor, ...]]:
    """Different random weights of this shape in the runtime layout, enough to rotate through."""
    generator = torch.Generator(device).manual_seed(seed)
    first = gpu.prepare(random_weight(layer, device, generator), dtype, device)
    num_bytes = sum(tensor.nbytes for tensor in first)
    number = copies_needed(num_bytes, torch.cuda.get_device_properties(device).L2_cache_size)
    others = (gpu.prepare(random_weight(layer, device, generator), dtype, device) for _ in range(number - 1))
    return [first, *others]


def candidates(problem: Problem, rows: int, here: Gpu) -> Iterator[Tiles]:
    """Tiles worth a try for this many rows: the rule's, and its neighbours."""
    first = rule_of_thumb(problem, rows, here)
    yield first
    tile_rows = [size for size in (16, 32, 64, 128) if size == 16 or size < 2 * rows]
    tile_features = [size for size in (64, 128) if problem.features % size == 0]
    most_parts = problem.slots // 128 // 2
    for size_m, size_n, post in itertools.product(tile_rows[-2:], tile_features, (True, False)):
        if post and (problem.blocks_per_tile > 1 or size_m > 32):
            continue
        warps = 8 if size_n == 128 and (size_m == 128 or here.capability // 10 == 10) else 4
        for parts, stages in itertools.product((1, 2, 3, 4, 6, 8), (3, 4, 6)):
            tiles = Tiles(rows=size_m, features=size_n, parts=parts, warps=warps, stages=stages, post=post)
            programs = problem.features // size_n * -(-rows // size_m) * parts
            idle, crowded = programs < here.processors // 2, programs > 12 * here.processors
            if tiles != first and (parts == 1 or not (idle or crowded or parts > most_parts)):
                yield tiles


def tune(
    layers: Sequence[LinearShape],
    dtype: torch.dtype,
    device: torch.device,
    *,
    buckets: Sequence[int] = ROW_BUCKETS,
    path: Path | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Measure tiles for these layers, write the best to `path` (default: the user's table for this GPU), return it.

    Only tiles whose result is that of the rule's tiles are timed. The first layer takes some minutes, most of it
    compiling; layers of the same grid reuse what was compiled.
    """
    here = gpu.gpu_of(device)
    table: dict[str, Any] = {"gpu": here.name, "torch": torch.__version__, "entries": {}, "dense_from_rows": {}}
    for layer in layers:
        copies = prepared_copies(layer, dtype, device)
        problem = gpu.problem_of(copies[0])
        best: dict[int, Tiles] = {}
        for bucket in buckets:
            best[bucket], microseconds = _fastest(layer, copies, dtype, device, bucket, here)
            report(f"{layer.describe()} {problem.dtype} up to {bucket} rows: {microseconds:.1f} us, {best[bucket]}")
        table["entries"][problem.key] = {str(bucket): tiles.as_json() for bucket, tiles in best.items()}
        table["dense_from_rows"][problem.key] = _dense_from(layer, copies, dtype, device, best)
        report(f"{layer.describe()} {problem.dtype}: dense from {table['dense_from_rows'][problem.key]} rows")
    path = path or user_table_path(here.name)
    write_table(path, table)
    return path


def _fastest(
    layer: LinearShape, copies: list[tuple[Tensor, ...]], dtype: torch.dtype, device: torch.device, rows: int, here: Gpu
) -> tuple[Tiles, float]:
    x_MK = torch.randn(rows, layer.in_features, device=device).to(dtype)
    problem = gpu.problem_of(copies[0])
    expected = gpu.launch(x_MK, copies[0], None, layer, rule_of_thumb(problem, rows, here)).float()
    timed = []
    for tiles in candidates(problem, rows, here):
        try:
            y_MN = gpu.launch(x_MK, copies[0], None, layer, tiles).float()
        except Exception as error:  # out of shared memory, or a compiler that gives up: not tiles for this GPU
            if not _means_unfit(error):
                raise
            continue
        if (y_MN - expected).norm() > 4e-3 * expected.norm():
            raise RuntimeError(
                f"{layer.describe()}, {rows} rows: {tiles} computes something else than the rule's tiles"
            )
        calls = [partial(gpu.launch, x_MK, copy, None, layer, tiles) for copy in copies]
        timed.append((graph_microseconds(calls), tiles))
    microseconds, tiles = min(timed, key=lambda pair: pair[0])
    return tiles, microseconds


def _dense_from(
    layer: LinearShape,
    copies: list[tuple[Tensor, ...]],
    dtype: torch.dtype,
    device: torch.device,
    best: dict[int, Tiles],
) -> int:
    """The smallest of DENSE_ROWS from which on the dense path is never slower."""
    threshold = DENSE_ROWS[-1] + 1
    for rows in reversed(DENSE_ROWS):
        x_MK = torch.randn(rows, layer.in_features, device=device).to(dtype)
        tiles = best[min((bucket for bucket in best if bucket >= rows), default=max(best))]
        fused = graph_microseconds([partial(gpu.launch, x_MK, copy, None, layer, tiles) for copy in copies])
        dense = graph_microseconds([partial(gpu.matmul_dense, x_MK, copy, None, layer) for copy in copies])
        if fused < dense:
            return threshold
        threshold = rows
    return threshold


def _means_unfit(error: Exception) -> bool:
    """Whether an exception says that this GPU or compiler cannot have these tiles."""
    names = {cls.__name__ for cls in type(error).__mro__}
    return bool(names & {"OutOfResources", "CompilationError", "PTXASError"}) or "PassManager" in str(error)
