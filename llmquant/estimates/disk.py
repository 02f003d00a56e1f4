"""An estimate of the disk space that a run needs, and a check that the disk of OUT has enough."""

from __future__ import annotations

import shutil
from pathlib import Path

from llmquant.errors import UserError
from llmquant.estimates.memory import estimate_memory, output_hessian_bytes
from llmquant.paths import partial_folder
from llmquant.planning.plan import Plan


def free_bytes(out: Path) -> int:
    """Return the free bytes on the disk that will hold OUT."""
    return shutil.disk_usage(_existing_folder(out)).free


def disk_bytes(plan: Plan, out: Path) -> int:
    """Return the disk space in bytes that a run still needs.

    It is the sum of all output files, a second copy of the shard that is being assembled from its part files, the
    activations that do not fit in memory, and the output-side Hessians of both splits of the text. The files that an
    unfinished run has left are subtracted, because the run continues from them.
    """
    partial = partial_folder(out)
    existing = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file()) if partial.is_dir() else 0
    shard = min(plan.output_bytes, plan.options.max_shard_bytes)
    hessians = 2 * output_hessian_bytes(plan, range(len(plan.block_names))) if plan.recipe.runs_backward else 0
    return max(plan.output_bytes + shard + estimate_memory(plan).spilled_bytes + hessians - existing, 0)


def check_disk(plan: Plan, out: Path) -> None:
    """Raise UserError if the disk that will hold OUT has too little free space.

    A dry run for another machine is not checked, because the disk of that machine is not known.
    """
    if plan.options.machine is not None:
        return
    free, needed = free_bytes(out), disk_bytes(plan, out)
    if needed > free:
        raise UserError(
            f"{out}: needs {needed / 1e9:.1f} GB while it is written, and {_existing_folder(out)} has "
            f"{free / 1e9:.1f} GB free; free some space or choose another place"
        )


def _existing_folder(out: Path) -> Path:
    """Return the nearest folder above OUT that exists."""
    folder = out.absolute().parent
    while not folder.exists():
        folder = folder.parent
    return folder
