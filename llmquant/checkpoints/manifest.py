"""`llmquant.json` inside a finished checkpoint: how it was made, and the hash of every file, so that it can be
checked."""

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
"""What is told of the run that made a checkpoint. It holds times and memory, which differ from run to run, so it has no
part in the promise of same bytes, and no hash in the manifest: it can be made anew without harm."""

SMALL_FILE_BYTES = 64 * 2**20
"""A file up to this size is hashed to tell whether it changed; a larger one only if it is younger than the manifest."""


def build_manifest(content: dict[str, Any], files: dict[str, FileRecord]) -> bytes:
    """The manifest's bytes: content, and size and SHA-256 of every other file."""
    records = {name: {"bytes": files[name].bytes, "sha256": files[name].sha256} for name in sorted(files)}
    return json.dumps(content | {"files": records}, indent=2, ensure_ascii=False).encode() + b"\n"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; UserError if there is none, or if it is damaged."""
    check_readable(folder)
    file = folder / MANIFEST_FILE
    if not file.is_file():
        raise UserError(f"{folder}: no {MANIFEST_FILE}; only checkpoints that llmquant wrote can be verified")
    content = parse_json(file.read_bytes(), str(file))
    if not isinstance(content.get("files"), dict):
        raise UserError(f"{file}: no list of files; it is damaged, quantize again")
    return content


def verify_files(folder: Path) -> list[str]:
    """What differs between a checkpoint and its manifest, one line each; empty if nothing does. Reads every file."""
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


def unreplaceable(folder: Path) -> list[str]:
    """What would be lost if a finished checkpoint were replaced: the names in it that its manifest does not list, and
    the listed files that changed since they were written, marked so. Folders end in a slash. Links are not followed.

    Raises UserError if there is no manifest, or if it is damaged.
    """
    records, written_ns = read_manifest(folder)["files"], (folder / MANIFEST_FILE).stat().st_mtime_ns
    expected_folders = {parent for name in records for parent in Path(name).parents}
    found = []
    for path, folders, files in os.walk(folder):
        here = Path(path).relative_to(folder)
        unexpected = [
            name for name in folders if here / name not in expected_folders or (folder / here / name).is_symlink()
        ]
        found += [f"{(here / name).as_posix()}/" for name in unexpected]
        folders[:] = sorted(set(folders) - set(unexpected))
        for name in (here / file for file in files):
            file = folder / name
            listed = name.as_posix() in records
            if not stat.S_ISREG(file.lstat().st_mode) or not (listed or str(name) in (MANIFEST_FILE, *REPORT_FILES)):
                found.append(name.as_posix())
            elif listed and not _is_unchanged(file, records[name.as_posix()], written_ns):
                found.append(f"{name.as_posix()} (changed)")
    return sorted(found)


def _is_unchanged(file: Path, record: Any, written_ns: int) -> bool:
    """Whether a file is the one of which the manifest keeps a record. written_ns: when the manifest was written."""
    status = file.stat()
    if not isinstance(record, dict) or status.st_size != record.get("bytes"):
        return False
    if status.st_size > SMALL_FILE_BYTES and status.st_mtime_ns <= written_ns:
        return True
    try:
        return file_sha256(file) == record.get("sha256")
    except UserError:
        return False
