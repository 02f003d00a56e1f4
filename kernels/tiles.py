"""How the Triton kernel cuts its work, by GPU, shape and rows of x: a measured table, else a rule.

Tables are JSON files, one per GPU: `configs/` beside this file ships those we measured, and `tune.tune` writes the
user's own to the cache folder, which is read first. Nothing is tuned while a model runs.
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
"""A configuration holds for the rows up to its bucket; above the last one it holds for all."""

DENSE_FROM_ROWS = 384
"""Rows of x from which writing the dense weight once and a dense matmul win, where no table says otherwise. An
estimate, not measured: the dense weight costs the traffic that it saved, and from here the matrix units are the limit.
"""


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """One configuration of `w4a16_kernel`."""

    rows: int
    """Tokens of a tile (BM): 16, 32, 64 or 128."""
    features: int
    """Out_features of a tile (BN): 64 or 128."""
    parts: int
    """Programs that share one tile of y along K (SPLIT_K)."""
    warps: int
    """4 or 8; with fewer than 4, Triton leaves `wgmma` for the older instruction and shared memory."""
    stages: int
    """Tiles in flight."""
    post: bool
    """Scale the products (few rows) or the weights (many)."""

    def as_json(self) -> dict[str, Any]:
        """An entry of a table."""
        return asdict(self)


@dataclass(frozen=True)
class Gpu:
    """What the choice of tiles has to know of a GPU."""

    name: str
    processors: int
    """Streaming multiprocessors."""
    capability: int
    """Compute capability, 10 * major + minor."""


@dataclass(frozen=True)
class Problem:
    """What the choice of tiles depends on, besides the rows of x."""

    features: int
    """Out_features, rounded up to 64."""
    slots: int
    """Slots along K over all planes, a multiple of 128."""
    blocks_per_tile: int
    """Scales per 128 slots: 1, 2 or 4."""
    dtype: str
    """`bfloat16` or `float16`."""

    @property
    def key(self) -> str:
        """Its name in a table."""
        return f"{self.features}x{self.slots} b{128 // self.blocks_per_tile} {self.dtype}"


def row_bucket(rows: int) -> int:
    """The bucket that `rows` fall into."""
    return next((bucket for bucket in ROW_BUCKETS if rows <= bucket), ROW_BUCKETS[-1])


@lru_cache(maxsize=4096)
def choose_tiles(problem: Problem, rows: int, gpu: Gpu) -> Tiles:
    """The measured tiles for this GPU and shape, else those of `rule_of_thumb`."""
    entry = _table(gpu.name).get("entries", {}).get(problem.key, {}).get(str(row_bucket(rows)))
    return Tiles(**entry) if entry is not None else rule_of_thumb(problem, rows, gpu)


def dense_from_rows(problem: Problem, gpu: Gpu) -> int:
    """Rows of x from which the dense path is taken."""
    return _table(gpu.name).get("dense_from_rows", {}).get(problem.key, DENSE_FROM_ROWS)


def rule_of_thumb(problem: Problem, rows: int, gpu: Gpu) -> Tiles:
    """Tiles from counting: enough programs to keep every processor's memory pipe full, and few instructions per weight.

    Scaling products needs one scale per tile and costs in proportion to the rows, so it ends at 32 rows. Wide tiles
    need a quarter fewer instructions per weight, but for few rows only large layers have enough of them.
    """
    post = problem.blocks_per_tile == 1 and rows <= 32
    even = problem.features % 128 == 0
    if rows <= 16:
        wide = even and problem.features >= 96 * gpu.processors
        tiles = Tiles(rows=16, features=128 if wide else 64, parts=1, warps=4, stages=4, post=post)
    elif rows <= 32:
        tiles = Tiles(rows=32, features=64, parts=1, warps=4, stages=4, post=post)
    elif rows <= 64 or gpu.capability // 10 not in (9, 10):
        # Without wgmma or tcgen05 (sm_80, 89, 120), larger tiles outgrow registers and the 99 KB of shared memory.
        tiles = Tiles(rows=64, features=128 if even else 64, parts=1, warps=4, stages=3, post=False)
    else:
        tiles = Tiles(rows=128, features=128 if even else 64, parts=1, warps=8 if even else 4, stages=3, post=False)
    if gpu.capability // 10 == 10 and tiles.features == 128:
        tiles = replace(tiles, warps=8)  # Triton 3.9 fails to compile 128 features in four warps for tcgen05
    programs = problem.features // tiles.features * -(-rows // tiles.rows)
    wanted = gpu.processors * (4 if tiles.rows <= 32 else 2)
    # Each part should still run its pipeline full a few times over, and its float32 sums are traffic as well.
    most = min(8 if tiles.rows <= 32 else 4, max(1, problem.slots // 128 // (2 * tiles.stages)))
    return replace(tiles, parts=max(1, min(most, round(wanted / programs))))


def batch_invariant_tiles(problem: Problem) -> Tiles:
    """The one configuration of backend `triton-invariant`: the same order of additions for any number of rows."""
    parts = max(1, min(4, problem.slots // 128 // 8))
    return Tiles(rows=16, features=64, parts=parts, warps=4, stages=4, post=problem.blocks_per_tile == 1)


def shipped_tables() -> list[dict[str, Any]]:
    """The tables in `configs/`."""
    return [json.loads(path.read_text()) for path in sorted((Path(__file__).parent / "configs").glob("*.json"))]


def user_table_path(gpu_name: str) -> Path:
    """Where `tune.tune` writes."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "llmquant" / f"{_file_stem(gpu_name)}.json"


def is_table(content: bytes) -> bool:
    """Whether a file with this content was written by `write_table`."""
    try:
        table = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(table, dict) and all(isinstance(table.get(key), dict) for key in ("entries", "dense_from_rows"))


def write_table(path: Path, table: dict[str, Any]) -> None:
    """Write a table, merged over what the file already holds, and forget what was chosen by the old one."""
    old = json.loads(path.read_text() or "{}") if path.exists() else {}
    for section in ("entries", "dense_from_rows"):
        table[section] = {**old.get(section, {}), **table.get(section, {})}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    _table.cache_clear()
    choose_tiles.cache_clear()


@lru_cache(maxsize=16)
def _table(gpu_name: str) -> dict[str, Any]:
    for path in (user_table_path(gpu_name), Path(__file__).parent / "configs" / f"{_file_stem(gpu_name)}.json"):
        if path.exists():
            return json.loads(path.read_text())
    return {}


def _file_stem(gpu_name: str) -> str:
    """`NVIDIA H100 80GB HBM3` -> `nvidia-h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-")
