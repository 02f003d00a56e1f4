"""Whether the disk that will hold OUT has room for it, and for what it needs while it is made."""

from __future__ import annotations

import shutil
from pathlib import Path

from llmquant.errors import UserError
from llmquant.paths import partial_folder
from llmquant.pipeline.footprint import feedback_bytes, footprint_of
from llmquant.pipeline.plan import Plan


def free_bytes(out: Path) -> int:
    """Free space of the disk that will hold OUT."""
    return shutil.disk_usage(_existing_folder(out)).free


def disk_bytes(plan: Plan, out: Path) -> int:
    """Space that a run still needs: what it writes, once more the shard that is being put together from its parts,
    activations that do not fit in memory, output moments of both halves of the text, less what an earlier run has left
    to continue from."""
    partial = partial_folder(out)
    there = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file()) if partial.is_dir() else 0
    shard = min(plan.output_bytes, plan.options.max_shard_bytes)
    moments = 2 * feedback_bytes(plan, range(len(plan.block_names))) if plan.recipe.runs_backward else 0
    return max(plan.output_bytes + shard + footprint_of(plan).spilled_bytes + moments - there, 0)


def check_disk(plan: Plan, out: Path) -> None:
    """UserError when the disk that will hold OUT is too small for it."""
    free, needed = free_bytes(out), disk_bytes(plan, out)
    if needed > free:
        raise UserError(
            f"{out}: needs {needed / 1e9:.1f} GB while it is written, and {_existing_folder(out)} has "
            f"{free / 1e9:.1f} GB free; free some space or choose another place"
        )


def _existing_folder(out: Path) -> Path:
    folder = out.absolute().parent
    while not folder.exists():
        folder = folder.parent
    return folder
