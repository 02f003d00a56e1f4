"""Check whether a folder may become OUT, the output folder of a run. Nothing is written here.

A run creates OUT by a rename and deletes the folder that OUT replaces. So OUT must not exist, or must be empty, or
(with overwrite) must be a finished checkpoint of llmquant that holds nothing else. Neither OUT nor `<out>.partial` may
be, contain or link to an input.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from llmquant.checkpoints.manifest import MANIFEST_FILE, unlisted_or_changed
from llmquant.errors import UserError
from llmquant.paths import check_encoding, join_names, partial_folder, real_path


def check_location(out: Path) -> None:
    """Raise UserError unless a rename can create a folder at OUT."""
    out = real_path(out)
    check_encoding(str(out))
    _check_parent(out)
    if out.is_symlink():
        raise UserError(f"{out}: a link to {out.readlink()}; give the folder that it leads to, or choose another OUT")
    if os.path.lexists(out) and not out.is_dir():
        raise UserError(f"{out}: exists and is not a folder; choose another OUT")
    current = real_path(Path())
    if any(_same(folder, out) for folder in (current, *current.parents)):
        raise UserError(f"{out}: the current folder is in it, and OUT is created by a rename; choose another OUT")
    if os.path.ismount(out):
        raise UserError(f"{out}: a mount point, and OUT is created by a rename; choose a folder inside it")


def _check_parent(out: Path) -> None:
    """Raise UserError unless the folders above OUT are writable, or can be created."""
    partial = partial_folder(out)
    parent = next(folder for folder in partial.parents if os.path.lexists(folder))
    if not parent.is_dir():
        raise UserError(f"{out}: {parent} is not a folder; choose another OUT")
    longest = os.pathconf(parent, "PC_NAME_MAX")
    if any(len(os.fsencode(name)) > longest for name in partial.relative_to(parent).parts):
        raise UserError(f"{out}: a name of more than {longest - len('.partial')} bytes; choose a shorter OUT")
    for folder in (parent, partial, out):
        if folder.is_dir() and not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            raise UserError(f"{out}: {folder} cannot be written; check its permissions, or choose another OUT")


def check_no_overlap(out: Path, inputs: Iterable[Path]) -> None:
    """Raise UserError if OUT or `<out>.partial` is or contains an input, or if OUT is in the Hugging Face cache of the
    model that is read."""
    out = real_path(out)
    for path in inputs:
        target, parent = Path(os.path.realpath(path)), Path(os.path.realpath(path.parent))
        for folder in (out, partial_folder(out)):
            if _same(path, folder):
                raise UserError(f"{folder}: this command reads it (as {path}); choose another OUT")
            if any(_same(above, folder) for above in dict.fromkeys([*target.parents, parent, *parent.parents])):
                raise UserError(f"{folder}: holds {path}, which this command reads; choose another OUT")
        if target.parent.name == "snapshots" and out.is_relative_to(target.parent.parent):
            raise UserError(f"{out}: lies in the Hugging Face cache of the model that is read; choose another OUT")


def check_replaceable(folder: Path, out: Path, overwrite: bool) -> None:
    """Raise UserError unless a folder may be replaced: it does not exist, is empty, or holds only files of llmquant.

    folder: OUT, or the place to which an unfinished run has moved it. overwrite: whether a checkpoint may be replaced.
    """
    if not folder.is_dir():
        return
    try:
        names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    except OSError as error:
        raise UserError(f"{out}: cannot be read ({error.strerror}); choose another OUT") from None
    finished = (folder / MANIFEST_FILE).is_file()
    if not names:
        return
    if not overwrite:
        raise UserError(
            f"{out}: exists; choose another OUT"
            + (", or add --overwrite to replace it" if finished else f" (it holds {join_names(names)})")
        )
    try:
        lost = unlisted_or_changed(folder)
    except UserError:
        reason = f"its {MANIFEST_FILE} is damaged" if finished else f"no {MANIFEST_FILE}"
        raise UserError(
            f"{out}: not a checkpoint that llmquant finished ({reason}), so --overwrite does not replace it; "
            f"choose another OUT, or move away {join_names(names)}"
        ) from None
    if lost:
        raise UserError(
            f"{out}: holds more than llmquant wrote, so --overwrite does not replace it; choose another OUT, "
            f"or move away {join_names(lost)}"
        )


def _same(one: Path, other: Path) -> bool:
    """Whether two paths are the same existing file or folder, also through links or names that differ only in case."""
    try:
        return one.samefile(other)
    except OSError:
        return False
