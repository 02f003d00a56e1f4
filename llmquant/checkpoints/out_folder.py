"""Whether a folder may become OUT. Nothing is written here.

OUT appears by a rename, and the folder that it replaces is deleted. OUT must therefore be free, or empty, or (with
overwrite) a checkpoint that this tool finished and that holds nothing else. Neither OUT nor `<out>.partial` may be,
hold or lead to anything that is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from llmquant.checkpoints.manifest import MANIFEST_FILE, unreplaceable
from llmquant.errors import UserError
from llmquant.paths import check_encoding, listed, partial_folder, real_path


def check_place(out: Path) -> None:
    """UserError unless a folder can be made at OUT by a rename."""
    out = real_path(out)
    check_encoding(str(out))
    _check_parent(out)
    if out.is_symlink():
        raise UserError(f"{out}: a link to {out.readlink()}; give the folder that it leads to, or choose another OUT")
    if os.path.lexists(out) and not out.is_dir():
        raise UserError(f"{out}: exists and is not a folder; choose another OUT")
    current = real_path(Path())
    if any(_same(folder, out) for folder in (current, *current.parents)):
        raise UserError(f"{out}: the current folder is in it, and OUT is put there by a rename; choose another OUT")
    if os.path.ismount(out):
        raise UserError(f"{out}: a mount point, and OUT is put there by a rename; choose a folder inside it")


def _check_parent(out: Path) -> None:
    """UserError unless the folders above OUT are there and writable, or can be made."""
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


def check_apart(out: Path, reads: Iterable[Path]) -> None:
    """UserError if OUT, or the folder in which it is made, is or holds one of the files and folders that are read; or
    if OUT lies in the Hugging Face cache of a model that is read."""
    out = real_path(out)
    for read in reads:
        real, typed_in = Path(os.path.realpath(read)), Path(os.path.realpath(read.parent))
        for folder in (out, partial_folder(out)):
            if _same(read, folder):
                raise UserError(f"{folder}: this command reads it (as {read}); choose another OUT")
            if any(_same(place, folder) for place in dict.fromkeys([*real.parents, typed_in, *typed_in.parents])):
                raise UserError(f"{folder}: holds {read}, which this command reads; choose another OUT")
        if real.parent.name == "snapshots" and out.is_relative_to(real.parent.parent):
            raise UserError(f"{out}: lies in the Hugging Face cache of the model that is read; choose another OUT")


def check_replaceable(folder: Path, out: Path, overwrite: bool) -> None:
    """UserError unless a folder, which is or was OUT, is not there, is empty, or may be replaced without a loss."""
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
            + (", or add --overwrite to replace it" if finished else f" (it holds {listed(names)})")
        )
    try:
        lost = unreplaceable(folder)
    except UserError:
        reason = f"its {MANIFEST_FILE} is damaged" if finished else f"no {MANIFEST_FILE}"
        raise UserError(
            f"{out}: not a checkpoint that llmquant finished ({reason}), so --overwrite spares it; choose another OUT, "
            f"or move away {listed(names)}"
        ) from None
    if lost:
        raise UserError(
            f"{out}: holds more than llmquant wrote, so --overwrite spares it; choose another OUT, or move away "
            f"{listed(lost)}"
        )


def _same(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file or folder that exists, also by a link or by other letters of one name."""
    try:
        return one.samefile(other)
    except OSError:
        return False
