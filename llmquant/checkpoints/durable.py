"""Files that are complete or absent, whenever the machine stops.

A file is written under a temporary name, forced to the disk, renamed, and its folder forced to the disk. What can go
wrong with a disk ends in a UserError that says so; nothing that was complete before is touched.
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
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def disk_errors(path: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Turns a full or unwritable disk into a UserError; needed_bytes is the size of what was being written."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
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
    """Writes a file so that it is complete or absent; returns its SHA-256. UserError if the disk does not take it."""
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
        # Give the space back: the next attempt, or the user, needs it.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    return digest.hexdigest()


def make_folder(folder: Path) -> None:
    """Makes a folder, and those above it, so that they survive a power cut; nothing happens if it is there."""
    if not folder.is_dir():
        make_folder(folder.parent)
        with disk_errors(folder):
            folder.mkdir(exist_ok=True)
            sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Forces a folder's entries (what was created, renamed or removed in it) to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
