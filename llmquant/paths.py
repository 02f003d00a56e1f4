"""Paths as a user types them, and the folder in which OUT is made."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

from llmquant.errors import UserError

MOST_OWN_BYTES = 64 * 2**20
"""No page, plot or table is larger."""


def typed_path(path: str | os.PathLike[str]) -> Path:
    """The path with `~` replaced by the home folder.

    Raises UserError for an empty path, for bytes that are not UTF-8, for a name that is longer than the file system
    takes, and for the home of a user who does not exist.
    """
    text = os.fspath(path)
    check_encoding(text)
    if not text or "\0" in text:
        raise UserError(f"path {text!r}: not a path; give the name of a file or folder")
    try:
        expanded = Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{text}: no such user; write ./{text} if the name begins with ~") from None
    try:
        expanded.lstat()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"{text}: longer than a name may be on this disk; use a shorter one") from None
        if isinstance(error, PermissionError):
            raise UserError(f"{text}: a folder above it may not be entered; check the permissions") from None
    return expanded


def check_readable(folder: Path) -> None:
    """UserError if a folder is there and its files may not be listed and opened."""
    if folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):
        raise UserError(f"{folder}: may not be read; check its permissions")


def typed_inputs(*names: str | os.PathLike[str]) -> list[Path]:
    """The typed names that exist on this machine, as paths; hub ids and presets are left out."""
    return [path for path in map(typed_path, names) if os.path.lexists(path)]


def check_encoding(text: str) -> None:
    """UserError if a text that was typed holds bytes that are not UTF-8: no report and no manifest can hold them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{printable(text)}: holds bytes that are not UTF-8; use another name, or rename it") from None


def printable(text: str) -> str:
    """The text with an escape such as `\\udcff` in place of each byte that is not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def real_path(out: Path) -> Path:
    """The absolute path of OUT without links above it; a link at OUT itself is not followed."""
    try:
        name = "" if out.name in ("", "..") else out.name
        return Path(os.path.realpath(out.parent if name else out)) / name
    except FileNotFoundError:
        raise UserError(f"{out}: the current folder no longer exists; change to another one") from None


def partial_folder(out: Path) -> Path:
    """The folder beside OUT in which OUT is made."""
    out = real_path(out)
    return out.parent / f"{out.name or 'root'}.partial"


def listed(names: list[str], most: int = 10) -> str:
    """Names as part of one line."""
    shown = ", ".join(printable(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def check_file(file: Path, option: str, is_own: Callable[[bytes], bool]) -> None:
    """UserError unless a command may write to a file: nothing is there yet, or what an earlier call of it wrote.

    option: the one that names the file. is_own: whether such a content was written by the command.
    """
    if file.is_dir():
        raise UserError(f"{file}: a folder; give {option} the name of a file")
    folder = file.absolute().parent
    if not folder.is_dir():
        raise UserError(f"{file}: its folder does not exist; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{file}: its folder cannot be written; check its permissions, or choose another one")
    if os.path.lexists(file) and not _is_own(file, is_own):
        raise UserError(f"{file}: exists, and this command did not write it; choose another {option}, or move it away")


def _is_own(file: Path, is_own: Callable[[bytes], bool]) -> bool:
    try:
        if not file.is_file() or file.stat().st_size > MOST_OWN_BYTES:
            return False
        content = file.read_bytes()
    except OSError:
        return False
    return not content or is_own(content)
