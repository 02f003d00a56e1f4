"""Decide whether a new run may continue, replace or remove `<out>.partial`, the folder of an unfinished run.

journal.json     the request of the run, and the files that are complete
lock             held by the process that writes here
parts/           one safetensors file per part, for example the tensors of one decoder block
scratch/         temporary files of the current run
checkpoint/      the future OUT
replaced/        the old OUT, between the last two renames of a run with overwrite
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llmquant.checkpoints.atomic import TEMPORARY_SUFFIX, disk_errors
from llmquant.checkpoints.journal import (
    CHECKPOINT,
    FOLDERS,
    JOURNAL_FILE,
    PARTS,
    REPLACED,
    FileRecord,
    Journal,
    ShardPlan,
    as_json,
    differences,
)
from llmquant.checkpoints.lock import LOCK_FILE, check_unlocked
from llmquant.checkpoints.out_folder import check_location, check_no_overlap, check_replaceable
from llmquant.checkpoints.reader import file_sha256
from llmquant.errors import UserError
from llmquant.paths import join_names, partial_folder, real_path


def check_out_folder(
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    restart: bool = False,
    inputs: Iterable[Path] = (),
    request: Mapping[str, Any] | None = None,
) -> None:
    """Raise the UserErrors of `PartialCheckpoint.open` before any work is done. Writes nothing.

    inputs: files and folders that the run reads; OUT must not overlap with them. request: as for
    `PartialCheckpoint.open`; if it is None, it is not compared with that of an unfinished run.
    """
    out, folder = real_path(Path(out)), partial_folder(Path(out))
    check_no_overlap(out, inputs)
    check_location(out)
    journal = find_journal(folder, restart)
    check_unlocked(folder)
    published = journal is not None and is_published(journal, out)
    if journal is None and (folder / REPLACED).exists() and not out.exists():
        if not overwrite:
            raise UserError(
                f"{folder / REPLACED}: the OUT that an unfinished run was about to replace; omit --restart to finish "
                "that run, or add --overwrite"
            )
        check_replaceable(folder / REPLACED, out, overwrite)
    elif not published:
        check_replaceable(out, out, overwrite)
    if journal is None or request is None:
        return
    requested = as_json(dict(request))
    if not published:
        check_same_request(folder, journal.request, requested)
        if journal.plan is not None:
            check_needed_files(journal, journal.plan)
    elif journal.request != requested:
        check_replaceable(out, out, overwrite)


def unfinished_request(out: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return the request of the unfinished run for OUT, or None if there is none. Raises UserError if the journal is
    damaged."""
    journal = find_journal(partial_folder(Path(out)), restart=False)
    return None if journal is None else journal.request


def find_journal(folder: Path, restart: bool) -> Journal | None:
    """Return the journal of an unfinished run, or None if there is none or restart discards it.

    Raises UserError if llmquant did not create the folder, or if the journal cannot be read.
    """
    if not os.path.lexists(folder):
        return None
    if folder.is_symlink() or not folder.is_dir():
        raise UserError(f"{folder}: not a folder that llmquant made; move it away, or choose another OUT")
    _check_created_by_llmquant(folder)
    return None if restart or not (folder / JOURNAL_FILE).exists() else Journal.load(folder)


def _check_created_by_llmquant(folder: Path) -> None:
    """Raise UserError if no run of llmquant created the folder. A run removes its own files without asking.

    Beside a valid journal, other files are accepted, and they are never removed. Without a valid journal, they show
    that the folder does not belong to a run.
    """
    own = {LOCK_FILE, JOURNAL_FILE + TEMPORARY_SUFFIX}
    if (folder / JOURNAL_FILE).is_file():
        own |= {JOURNAL_FILE, *FOLDERS}
    foreign = sorted(file.name for file in folder.glob("*") if file.name not in own)
    links = sorted(name for name in own if (folder / name).is_symlink())
    if links or (foreign and not _has_valid_journal(folder)):
        raise UserError(
            f"{folder}: not left by llmquant (it holds {join_names(links or foreign)}); move it away, or choose "
            "another OUT"
        )


def _has_valid_journal(folder: Path) -> bool:
    try:
        Journal.load(folder)
    except UserError:
        return False
    return True


def is_published(journal: Journal, out: Path) -> bool:
    """Whether the run has renamed its finished checkpoint to OUT."""
    return journal.plan is not None and not (journal.folder / CHECKPOINT).exists() and out.exists()


def part_file(folder: Path, name: str) -> Path:
    """Return the path of a part."""
    return folder / PARTS / f"{name}.safetensors"


def is_intact(file: Path, record: FileRecord) -> bool:
    """Whether a file has the size and the hash of its record. Reads the file."""
    return file.is_file() and file.stat().st_size == record.bytes and file_sha256(file) == record.sha256


def check_same_request(folder: Path, unfinished: dict[str, Any], requested: dict[str, Any]) -> None:
    """Raise UserError if the request of the unfinished run differs from the new one."""
    if unfinished != requested:
        changes = "; ".join(differences(unfinished, requested))
        raise UserError(
            f"{folder}: left by a run with other options ({changes}); repeat those to continue it, "
            "add --restart to begin anew, or choose another OUT"
        )


def needed_parts(journal: Journal, plan: ShardPlan) -> set[str]:
    """Return the parts from which missing shards must still be copied."""
    return {part for shard, parts in plan.shards.items() if shard not in journal.shards for part in parts.values()}


def check_needed_files(journal: Journal, plan: ShardPlan) -> None:
    """Raise UserError if a part or shard that is needed to finish the checkpoint is damaged."""
    files = {journal.folder / CHECKPOINT / shard: record for shard, record in journal.shards.items()}
    files |= {part_file(journal.folder, part): journal.parts[part] for part in needed_parts(journal, plan)}
    for file, record in files.items():
        if not is_intact(file, record):
            raise UserError(f"{file}: damaged since it was written; add --restart to begin anew")


def restore_replaced(out: Path, folder: Path) -> None:
    """Undo the first of the two renames with which a run replaces OUT."""
    if (folder / REPLACED).exists() and not os.path.lexists(out):
        with disk_errors(out):
            (folder / REPLACED).replace(out)


def remove_contents(folder: Path) -> None:
    """Remove all files of the run but the lock. The journal is last: it shows that the others belong to the run."""
    with disk_errors(folder):
        for name in FOLDERS:
            if (folder / name).exists():
                shutil.rmtree(folder / name)
        for name in (JOURNAL_FILE + TEMPORARY_SUFFIX, JOURNAL_FILE):
            (folder / name).unlink(missing_ok=True)


def remove_if_empty(folder: Path) -> None:
    """Remove the folder if it holds nothing but the lock."""
    if [file.name for file in folder.iterdir()] == [LOCK_FILE]:
        (folder / LOCK_FILE).unlink()
        folder.rmdir()
