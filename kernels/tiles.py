"""Choose tile configurations of the Triton kernel by GPU, shape and rows of x: from a measured table, else by a rule.

A table is a JSON file for one GPU. `tune.tune_tiles` measures tiles and writes the user's table to the cache folder.
The folder `configs` has tables that come with llmquant; the user's entries are taken before those. Without an entry for
this GPU and shape, `rule_of_thumb` applies. Nothing is tuned while a model runs.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

ROW_BUCKETS = (1, 16, 32, 64, 128, 256, 512)
"""Numbers of rows of x for which tables have an entry. An entry applies to all rows above the previous bucket and up to
its own; the last one applies to all larger numbers too."""

DENSE_FROM_ROWS = 384
"""Rows of x from which the dense path (write the dense weight, then a dense matmul) is used if no table gives a number.
The number was estimated, not measured: writing the dense weight costs the memory traffic that the codes save,
but from this number of rows the matrix units are the limit, not the memory."""

MAX_SPLIT_ROW_TILES = 4
"""Tiles along M that have counters for split-K. Calls with more rows have enough programs without it."""

INSTRUCTIONS = {(True, 64): 3.2, (True, 128): 2.5, (False, 64): 3.7, (False, 128): 3.1}
"""Machine instructions per weight in the loop on sm_90 with few rows, by (post, features of four warps)."""

SHIPPED_TABLES = Path(__file__).parent / "configs"
"""Folder of the measured tables that come with llmquant, one file for each GPU."""

WAIT_CYCLES = 300
"""Cycles for which a program waits in each step along K: for loads, a barrier and its last product. An estimate."""

RESIDENT_PROGRAMS = {
    (16, 64): 6, (16, 128): 3, (32, 64): 4, (32, 128): 2, (64, 64): 3, (64, 128): 2, (128, 64): 2, (128, 128): 2,
}  # fmt: skip
"""Programs of four warps that the registers of a processor can hold, by (rows, features) of the tiles, on sm_90."""


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """A tile configuration of `triton_w4a16.w4a16_kernel`."""

    rows: int
    """Rows of x (tokens) in a tile of y (BM): 16, 32, 64 or 128."""
    features: int
    """Out_features in a tile of y (BN): 64 or 128."""
    split_k: int
    """Number of programs that each sum one part of K for the same tile of y (split-K); 1 for no split."""
    warps: int
    """Warps of a program: 4 or 8. With fewer, Triton passes weights through shared memory and does not use `wgmma`."""
    stages: int
    """Tiles along K that the software pipeline loads ahead (`num_stages` in Triton)."""
    post: bool
    """Whether to scale the products (faster for few rows) instead of the weights (faster for many)."""

    def as_json(self) -> dict[str, Any]:
        """Return the configuration as an entry of a table."""
        return asdict(self)

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Tiles:
        """Return the configuration of an entry. Entries of older tables, which call `split_k` `parts`, are accepted."""
        return cls(**{"split_k" if name == "parts" else name: value for name, value in entry.items()})


@dataclass(frozen=True)
class Gpu:
    """The properties of a GPU on which the choice of tiles depends."""

    name: str
    """Name of the GPU, as torch reports it."""
    processors: int
    """Number of streaming multiprocessors."""
    capability: int
    """Compute capability, 10 * major + minor."""


@dataclass(frozen=True)
class Problem:
    """The properties of a weight on which the choice of tiles depends."""

    features: int
    """Out_features, rounded up to 64."""
    slots: int
    """Slots along K, summed over all planes; a multiple of 128."""
    blocks_per_tile: int
    """Scales per 128 slots: 1, 2 or 4."""
    dtype: str
    """Dtype of x: `bfloat16` or `float16`."""

    @property
    def key(self) -> str:
        """The key of this problem in a table."""
        return f"{self.features}x{self.slots} b{128 // self.blocks_per_tile} {self.dtype}"


def row_bucket(rows: int) -> int:
    """Return the bucket of ROW_BUCKETS for this number of rows."""
    return next((bucket for bucket in ROW_BUCKETS if rows <= bucket), ROW_BUCKETS[-1])


@lru_cache(maxsize=4096)
def choose_tiles(problem: Problem, rows: int, gpu: Gpu) -> Tiles:
    """Return the measured tiles for this GPU and problem, else those of `rule_of_thumb`."""
    entry = _table(gpu.name).get("entries", {}).get(problem.key, {}).get(str(row_bucket(rows)))
    return Tiles.from_json(entry) if entry is not None else rule_of_thumb(problem, rows, gpu)


def dense_from_rows(problem: Problem, gpu: Gpu) -> int:
    """Return the number of rows of x from which the dense path is used."""
    return _table(gpu.name).get("dense_from_rows", {}).get(problem.key, DENSE_FROM_ROWS)


def buckets_of(rows: Iterable[int]) -> tuple[int, ...]:
    """Return the buckets of ROW_BUCKETS for these numbers of rows, in ascending order."""
    return tuple(sorted({row_bucket(number) for number in rows}))


def rule_of_thumb(problem: Problem, rows: int, gpu: Gpu) -> Tiles:
    """Return the tiles with the lowest `estimated_time` of those that suit this number of rows.

    Scaling the products needs one scale per tile and costs time in proportion to the rows, so it is used up to 32 rows.
    Tiles of 128 features need up to a quarter fewer instructions per weight than tiles of 64. A linear with few
    out_features has too few of them to fill the GPU.
    """
    post = problem.blocks_per_tile == 1 and rows <= 32
    divisible = problem.features % 128 == 0
    wide = 128 if divisible else 64
    large_products = gpu.capability // 10 in (9, 10)
    if rows <= 16:
        options = [Tiles(rows=16, features=n, split_k=1, warps=4, stages=4, post=post) for n in {64, wide}]
    elif rows <= 32:
        widths = {64, wide} if gpu.capability // 10 == 9 else {64}
        options = [Tiles(rows=32, features=n, split_k=1, warps=4, stages=4, post=post) for n in widths]
    elif rows <= 64 or not large_products:
        # Without wgmma or tcgen05 (sm_80, 86, 89, 120), larger tiles exceed the registers or the shared memory.
        options = [Tiles(rows=64, features=wide, split_k=1, warps=4, stages=3, post=False)]
    else:
        options = [Tiles(rows=128, features=wide, split_k=1, warps=8 if divisible else 4, stages=3, post=False)]
    if gpu.capability // 10 == 10:  # Triton 3.9 fails to compile 128 features in four warps for tcgen05
        options = [replace(tiles, warps=8) if tiles.features == 128 else tiles for tiles in options]
    options = [tiles for option in options for tiles in with_splits(option, problem, rows)]
    return min(options, key=lambda tiles: (estimated_time(tiles, problem, rows, gpu), tiles.split_k, tiles.features))


def with_splits(tiles: Tiles, problem: Problem, rows: int) -> list[Tiles]:
    """Return these tiles with every sensible split of K.

    A program fills its pipeline at least once, except that K may have only one split. With many rows, there are enough
    programs without a split, and the float32 sums would cost memory traffic.
    """
    num_row_tiles = -(-rows // tiles.rows)
    most = 1 if num_row_tiles > MAX_SPLIT_ROW_TILES else 8 if tiles.rows <= 32 else 4
    most = max(1, min(most, problem.slots // 128 // tiles.stages))
    return [replace(tiles, split_k=split_k) for split_k in range(1, most + 1)]


def estimated_time(tiles: Tiles, problem: Problem, rows: int, gpu: Gpu) -> float:
    """Return the clock cycles of a call on the busiest processor, estimated for Hopper; for comparing tiles only.

    A program takes one step per 128 slots, one more to fill its pipeline, and with split-K some to store and add its
    sums. In a step it issues its instructions and then waits. Other resident programs issue theirs during the wait.
    """
    programs = problem.features // tiles.features * -(-rows // tiles.rows) * tiles.split_k
    busiest = -(-programs // gpu.processors)
    resident = min(busiest, max(1, RESIDENT_PROGRAMS[tiles.rows, tiles.features] * 4 // tiles.warps))
    steps = 1.0 - (-(problem.slots // 128) // tiles.split_k)
    if tiles.split_k > 1:
        steps += 1 + min(rows, tiles.rows) / 18  # a sum has 4 bytes for each row, a step 72 bytes for each feature
    features_of_group = max(64, tiles.features * 4 // tiles.warps)  # of four warps, which share the matrix operand
    issue_cycles = INSTRUCTIONS[tiles.post, features_of_group] * tiles.features  # four schedulers, 32 lanes each
    return steps * busiest * (issue_cycles + WAIT_CYCLES / resident)


def batch_invariant_tiles(problem: Problem) -> Tiles:
    """Return the tiles of backend `triton-invariant`: the same order of additions for any number of rows."""
    split_k = max(1, min(4, problem.slots // 128 // 8))
    return Tiles(rows=16, features=64, split_k=split_k, warps=4, stages=4, post=problem.blocks_per_tile == 1)


def user_table_path(gpu_name: str) -> Path:
    """Return the path of the user's table for a GPU, which `tune.tune_tiles` writes and `choose_tiles` reads."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "llmquant" / f"{_file_name(gpu_name)}.json"


def is_table(content: bytes) -> bool:
    """Whether the content of a file is a table, as `write_table` writes it."""
    try:
        table = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(table, dict) and all(isinstance(table.get(key), dict) for key in ("entries", "dense_from_rows"))


def write_table(path: Path, table: dict[str, Any]) -> None:
    """Write a table to a file, merged over its previous entries, and drop the choices cached from the old table."""
    merged: dict[str, Any] = {"entries": {}, "dense_from_rows": {}}
    if path.exists():
        _merge(merged, json.loads(path.read_text() or "{}"))
    _merge(merged, table)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table | merged, indent=1, sort_keys=True) + "\n")
    _table.cache_clear()
    choose_tiles.cache_clear()


@lru_cache(maxsize=16)
def _table(gpu_name: str) -> dict[str, Any]:
    """Return the table for a GPU: the shipped entries, replaced by the user's where both have one."""
    table: dict[str, Any] = {"entries": {}, "dense_from_rows": {}}
    for path in (SHIPPED_TABLES / f"{_file_name(gpu_name)}.json", user_table_path(gpu_name)):
        if path.exists():
            _merge(table, json.loads(path.read_text() or "{}"))
    return table


def _merge(table: dict[str, Any], newer: dict[str, Any]) -> None:
    """Put the entries of a newer table into a table, bucket by bucket."""
    for key, entry in newer.get("entries", {}).items():
        table["entries"][key] = {**table["entries"].get(key, {}), **entry}
    table["dense_from_rows"].update(newer.get("dense_from_rows", {}))


def _file_name(gpu_name: str) -> str:
    """Return a file name for a GPU: `nvidia-h100-80gb-hbm3` for `NVIDIA H100 80GB HBM3`."""
    return re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-")
