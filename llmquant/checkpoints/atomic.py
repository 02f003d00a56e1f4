"""Atomic writing: after a crash at any point, a file is complete or does not exist.

A file is written under a temporary name, flushed to the disk with fsync, and renamed; then its folder is flushed. Disk
errors become UserErrors, and existing complete files stay unchanged.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llmquant.errors import UserError

TEMPORARY_SUFFIX = ".tmp"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def disk_errors(path: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Turn errors of a full or unwritable disk into UserErrors. needed_bytes: size of the file that is written."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise UserError(
                f"{path}: cannot be written ({error.strerror}); check the folder and its permissions, "
                "then run the same command again to continue"
            ) from None
        free = ""
        with suppress(OSError):
            free = f", {shutil.disk_usage(path.parent).free} are free"
        needed = "" if needed_bytes is None else f": it takes {needed_bytes} bytes{free}"
        raise UserError(
            f"{path}: no space left{needed} ({error.strerror}); make room, then run the same command again to continue"
        ) from None


def write_atomically(path: Path, pieces: Iterable[bytes | memoryview], needed_bytes: int | None = None) -> str:
    """Write a file atomically and return its SHA-256. Raises UserError if the disk is full or not writable."""
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    digest = hashlib.sha256()
    try:
        with disk_errors(path, needed_bytes):
            with temporary.open("wb") as handle:
                for piece in pieces:
                    digest.update(piece)
                    handle.write(piece)
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
    except UserError:
        # Free the space, because the next attempt needs it.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    return digest.hexdigest()


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, and flush them to the disk. An existing folder is accepted."""
    if not folder.is_dir():
        make_folder(folder.parent)
        with disk_errors(folder):
            folder.mkdir(exist_ok=True)
            sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder (created, renamed and removed files) to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
