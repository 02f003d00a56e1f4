"""The lock of `<out>.partial`: only one run at a time writes a checkpoint.

The lock is a `flock` on a file that holds the process id of its owner. The kernel releases it when that process ends,
however it ends. The `filelock` package is not used: it cannot test a lock without taking it, and its older versions
truncate the file of a lock that another process holds.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from llmquant.checkpoints.atomic import disk_errors, make_folder
from llmquant.errors import UserError

LOCK_FILE = "lock"


def acquire_lock(folder: Path) -> int:
    """Create the folder if necessary, lock it, and return the file descriptor that holds the lock.

    Raises UserError if another run holds the lock.
    """
    file = folder / LOCK_FILE
    with disk_errors(folder):
        while True:
            make_folder(folder)
            try:
                lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The previous owner may have finished, and removed the file, between `open` and `flock`.
                if file.exists() and os.path.samestat(os.fstat(lock), file.stat()):
                    os.truncate(lock, 0)
                    os.write(lock, str(os.getpid()).encode())
                    return lock
            except BlockingIOError:
                error = _held_by_another(folder, lock)
                os.close(lock)
                raise error from None
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)


def check_unlocked(folder: Path) -> None:
    """Raise UserError if another run holds the lock. Writes nothing."""
    try:
        lock = os.open(folder / LOCK_FILE, os.O_RDONLY)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _held_by_another(folder, lock) from None
    finally:
        os.close(lock)


def _held_by_another(folder: Path, lock: int) -> UserError:
    owner = os.pread(lock, 20, 0).decode(errors="replace") or "unknown"
    return UserError(f"{folder}: process {owner} is writing it; wait until it ends, or choose another OUT")
