"""`journal.json`: the request of an unfinished run, and the files that are complete.

Each update replaces the whole file atomically. A file that the journal does not name counts as missing.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmquant.checkpoints.atomic import write_atomically
from llmquant.checkpoints.header import parse_json
from llmquant.errors import UserError

JOURNAL_FILE = "journal.json"
PARTS, SCRATCH, CHECKPOINT, REPLACED = FOLDERS = ("parts", "scratch", "checkpoint", "replaced")
LAYOUT = 2
"""Version of the journal and of the notes of its parts. Every incompatible change of either must increase it."""


@dataclass(kw_only=True)
class FileRecord:
    """Size and hash of a complete file."""

    bytes: int
    sha256: str
    note: dict[str, Any] | None = None
    """JSON values that the writer of a part stores with it; None if there are none."""


@dataclass(kw_only=True)
class ShardPlan:
    """The shards of the finished checkpoint. With a plan, an unfinished run can be completed from its journal alone."""

    shards: dict[str, dict[str, str]]
    """Shard file name -> {tensor: the part that holds it}, in order."""
    metadata: dict[str, str]
    """`__metadata__` in the header of every shard."""
    manifest: dict[str, Any]
    """Entries of the manifest other than `files`."""


@dataclass(kw_only=True)
class Journal:
    """The state of an unfinished run."""

    folder: Path
    """The folder of the unfinished run, `<out>.partial`."""
    request: dict[str, Any]
    """Everything that the result depends on: options, versions, hashes of inputs."""
    parts: dict[str, FileRecord] = field(default_factory=dict)
    """Complete parts by name."""
    shards: dict[str, FileRecord] = field(default_factory=dict)
    """Complete shards by file name."""
    plan: ShardPlan | None = None
    """The planned shards; None until all parts are complete."""

    def save(self) -> None:
        """Write `journal.json` atomically. Raises UserError if the disk is full."""
        content = asdict(self) | {"layout": LAYOUT}
        del content["folder"]
        write_atomically(self.folder / JOURNAL_FILE, [json.dumps(content, indent=1, ensure_ascii=False).encode()])

    @classmethod
    def load(cls, folder: Path) -> Journal:
        """Read `journal.json` from a folder. Raises UserError if it is damaged or has another layout."""
        file = folder / JOURNAL_FILE
        remedy = "add --restart to begin anew, or choose another OUT"
        if (folder / REPLACED).exists():
            remedy = "add --restart and --overwrite to begin anew, or choose another OUT"
        try:
            content = parse_json(file.read_bytes(), str(file))
            layout = content.pop("layout")
            if layout == LAYOUT:
                plan = content.pop("plan")
                return cls(
                    folder=folder,
                    request=content["request"],
                    parts={name: FileRecord(**record) for name, record in content["parts"].items()},
                    shards={name: FileRecord(**record) for name, record in content["shards"].items()},
                    plan=None if plan is None else ShardPlan(**plan),
                )
        except (UserError, OSError, KeyError, TypeError, AttributeError):
            raise UserError(f"{file}: damaged; {remedy}") from None
        raise UserError(
            f"{file}: an unfinished run of another version of llmquant (layout {layout!r:.20}, not {LAYOUT}), which "
            f"this version cannot continue; {remedy}"
        )


def as_json(value: dict[str, Any]) -> dict[str, Any]:
    """Return a dict as it would be read back from JSON, so that requests can be compared."""
    return json.loads(json.dumps(value))


def differences(before: Any, now: Any, key: str = "") -> list[str]:
    """Return `key was a, is b` for every leaf that differs between two JSON values."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            text
            for name in sorted(before.keys() | now.keys())
            for text in differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)
        ]
    return [] if before == now else [f"{key} was {before!r:.60}, is {now!r:.60}"]
