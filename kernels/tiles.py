"""Choose tile configurations of the Triton kernel by GPU, shape and rows of x: from a measured table, else by a rule.

A table is a JSON file for one GPU in the user's cache folder. `tune.tune_tiles` measures the tiles and writes the
table. Without an entry for this GPU and shape, `rule_of_thumb` applies. Nothing is tuned while a model runs.
"""

from __future__ import annotations

import json
import os
import re
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


def rule_of_thumb(problem: Problem, rows: int, gpu: Gpu) -> Tiles:
    """Choose tiles that keep the memory pipeline of every processor full and need few instructions per weight.

    Scaling the products needs one scale per tile and costs time in proportion to the rows, so it is used up to 32 rows.
    Tiles of 128 features need up to a quarter fewer instructions per weight than tiles of 64. With few rows, only large
    linears have enough tiles of 128 features to fill the GPU.
    """
    post = problem.blocks_per_tile == 1 and rows <= 32
    divisible = problem.features % 128 == 0
    if rows <= 16:
        wide = divisible and problem.features >= 96 * gpu.processors
        tiles = Tiles(rows=16, features=128 if wide else 64, split_k=1, warps=4, stages=4, post=post)
    elif rows <= 32:
        tiles = Tiles(rows=32, features=64, split_k=1, warps=4, stages=4, post=post)
    elif rows <= 64 or gpu.capability // 10 not in (9, 10):
        # Without wgmma or tcgen05 (sm_80, 86, 89, 120), larger tiles exceed the registers or the shared memory.
        tiles = Tiles(rows=64, features=128 if divisible else 64, split_k=1, warps=4, stages=3, post=False)
    else:
        tiles = Tiles(
            rows=128, features=128 if divisible else 64, split_k=1, warps=8 if divisible else 4, stages=3, post=False
        )
    if gpu.capability // 10 == 10 and tiles.features == 128:
        tiles = replace(tiles, warps=8)  # Triton 3.9 fails to compile 128 features in four warps for tcgen05
    programs = problem.features // tiles.features * -(-rows // tiles.rows)
    programs_needed = gpu.processors * (4 if tiles.rows <= 32 else 2)
    # Limit the split: each program should fill its pipeline a few times, and its float32 sums cost memory traffic.
    max_split = min(8 if tiles.rows <= 32 else 4, max(1, problem.slots // 128 // (2 * tiles.stages)))
    return replace(tiles, split_k=max(1, min(max_split, round(programs_needed / programs))))


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
    old = json.loads(path.read_text() or "{}") if path.exists() else {}
    for section in ("entries", "dense_from_rows"):
        table[section] = {**old.get(section, {}), **table.get(section, {})}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    _table.cache_clear()
    choose_tiles.cache_clear()


@lru_cache(maxsize=16)
def _table(gpu_name: str) -> dict[str, Any]:
    """Return the user's table for a GPU; {} if there is none."""
    path = user_table_path(gpu_name)
    return json.loads(path.read_text()) if path.exists() else {}


def _file_name(gpu_name: str) -> str:
    """Return a file name for a GPU: `nvidia-h100-80gb-hbm3` for `NVIDIA H100 80GB HBM3`."""
    return re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-")
