"""`llmquant.json` in a finished checkpoint: the request that produced it, and the size and hash of every file."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from llmquant.checkpoints.header import parse_json
from llmquant.checkpoints.journal import FileRecord
from llmquant.checkpoints.reader import file_sha256
from llmquant.errors import UserError
from llmquant.paths import check_readable

MANIFEST_FILE = "llmquant.json"
REPORT_JSON, REPORT_HTML = REPORT_FILES = ("quantize_report.json", "report.html")
"""Reports of the run that wrote a checkpoint. They contain times and memory, which differ from run to run. So the
reports are not reproducible, have no hash in the manifest, and may be rewritten."""

SMALL_FILE_BYTES = 64 * 2**20
"""`unlisted_or_changed` hashes files up to this size. It hashes a larger file only if it is newer than the manifest."""


def build_manifest(content: dict[str, Any], files: dict[str, FileRecord]) -> bytes:
    """Return the bytes of the manifest: `content`, and the size and SHA-256 of each of `files`."""
    records = {name: {"bytes": files[name].bytes, "sha256": files[name].sha256} for name in sorted(files)}
    return json.dumps(content | {"files": records}, indent=2, ensure_ascii=False).encode() + b"\n"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint. Raises UserError if there is none, or if it is damaged."""
    check_readable(folder)
    file = folder / MANIFEST_FILE
    if not file.is_file():
        raise UserError(f"{folder}: no {MANIFEST_FILE}; only checkpoints that llmquant wrote can be verified")
    content = parse_json(file.read_bytes(), str(file))
    if not isinstance(content.get("files"), dict):
        raise UserError(f"{file}: no list of files; it is damaged, quantize again")
    return content


def verify_files(folder: Path) -> list[str]:
    """Return the differences between a checkpoint and its manifest, one line each. Reads every file."""
    records = read_manifest(folder)["files"]
    problems = []
    for name, record in records.items():
        file = folder / name
        if ".." in Path(name).parts or Path(name).is_absolute() or not isinstance(record, dict):
            problems.append(f"{name}: not a file of this checkpoint")
        elif not file.is_file():
            problems.append(f"{name}: missing")
        elif file.stat().st_size != record.get("bytes"):
            problems.append(f"{name}: {file.stat().st_size} bytes, was {record.get('bytes')}")
        elif file_sha256(file) != record.get("sha256"):
            problems.append(f"{name}: content changed")
    shards = {file.name for file in folder.glob("*.safetensors")}
    problems += [f"{name}: not there when the checkpoint was written" for name in sorted(shards - records.keys())]
    return problems


def unlisted_or_changed(folder: Path) -> list[str]:
    """Return the files of a finished checkpoint that its manifest does not list, or whose content has changed.

    Replacing the checkpoint would lose them. Names of folders end in a slash; "(changed)" follows a changed file.
    Links are not followed. Raises UserError if there is no manifest, or if it is damaged.
    """
    records, written_ns = read_manifest(folder)["files"], (folder / MANIFEST_FILE).stat().st_mtime_ns
    expected_folders = {parent for name in records for parent in Path(name).parents}
    lost = []
    for path, folders, files in os.walk(folder):
        here = Path(path).relative_to(folder)
        unexpected = [
            name for name in folders if here / name not in expected_folders or (folder / here / name).is_symlink()
        ]
        lost += [f"{(here / name).as_posix()}/" for name in unexpected]
        folders[:] = sorted(set(folders) - set(unexpected))
        for name in (here / file for file in files):
            file = folder / name
            listed = name.as_posix() in records
            if not stat.S_ISREG(file.lstat().st_mode) or not (listed or str(name) in (MANIFEST_FILE, *REPORT_FILES)):
                lost.append(name.as_posix())
            elif listed and not _is_unchanged(file, records[name.as_posix()], written_ns):
                lost.append(f"{name.as_posix()} (changed)")
    return sorted(lost)


def _is_unchanged(file: Path, record: Any, written_ns: int) -> bool:
    """Whether a file still equals its record in the manifest. written_ns: modification time of the manifest."""
    status = file.stat()
    if not isinstance(record, dict) or status.st_size != record.get("bytes"):
        return False
    if status.st_size > SMALL_FILE_BYTES and status.st_mtime_ns <= written_ns:
        return True
    try:
        return file_sha256(file) == record.get("sha256")
    except UserError:
        return False
