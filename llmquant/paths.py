"""Checks of paths that a user gives, and the folder in which the output folder OUT is built."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

from llmquant.errors import UserError

MAX_OWN_FILE_BYTES = 64 * 2**20
"""Upper bound of the size of a page, plot or table that a command writes. A larger file is never overwritten."""


def parse_path(path: str | os.PathLike[str]) -> Path:
    """Return a path that a user gave, with `~` replaced by the home folder. The path need not exist.

    Raises UserError if the path is empty, holds bytes that are not UTF-8, is longer than the file system allows, lies
    in a folder that may not be entered, or begins with the home of an unknown user.
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
    """Raise UserError if a folder exists and its files may not be listed or opened."""
    if folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):
        raise UserError(f"{folder}: may not be read; check its permissions")


def existing_paths(*names: str | os.PathLike[str]) -> list[Path]:
    """Return those names that are paths on this machine. Hub ids and names of presets are left out."""
    return [path for path in map(parse_path, names) if os.path.lexists(path)]


def check_encoding(text: str) -> None:
    """Raise UserError if a name holds bytes that are not UTF-8, because reports and manifests cannot store them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{printable(text)}: holds bytes that are not UTF-8; use another name, or rename it") from None


def printable(text: str) -> str:
    """Return the text with an escape such as `\\udcff` in place of each byte that is not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def real_path(out: Path) -> Path:
    """Return the absolute path of OUT with all links in its parents resolved. A link at OUT itself is not followed."""
    try:
        name = "" if out.name in ("", "..") else out.name
        return Path(os.path.realpath(out.parent if name else out)) / name
    except FileNotFoundError:
        raise UserError(f"{out}: the current folder no longer exists; change to another one") from None


def partial_folder(out: Path) -> Path:
    """Return the folder beside OUT in which the output is built until it is complete."""
    out = real_path(out)
    return out.parent / f"{out.name or 'root'}.partial"


def join_names(names: list[str], max_names: int = 10) -> str:
    """Return names as part of one line: the first `max_names`, and the number of the others."""
    shown = ", ".join(printable(name) for name in names[:max_names])
    return shown if len(names) <= max_names else f"{shown} and {len(names) - max_names} more"


def check_output_file(file: Path, option: str, is_own: Callable[[bytes], bool]) -> None:
    """Raise UserError unless a command may write to a file.

    It may write if the file does not exist, is empty, or was written by an earlier call of the same command.

    option: the option that names the file. is_own: returns whether the command wrote a file with the given content.
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
        if not file.is_file() or file.stat().st_size > MAX_OWN_FILE_BYTES:
            return False
        content = file.read_bytes()
    except OSError:
        return False
    return not content or is_own(content)
