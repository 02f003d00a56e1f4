"""`journal.json`: what a partial checkpoint was asked to become, and which of its files are complete.

It is replaced as a whole, so it is never half a journal; a file that it does not name does not count.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmquant.checkpoints.durable import write_atomically
from llmquant.checkpoints.header import parse_json
from llmquant.errors import UserError

JOURNAL_FILE = "journal.json"
LAYOUT = 1


@dataclass(kw_only=True)
class FileRecord:
    """A complete file."""

    bytes: int
    sha256: str
    note: dict[str, Any] | None = None
    """What its maker wants to remember of it."""


@dataclass(kw_only=True)
class Plan:
    """What finishing will write. Once it is there, a partial checkpoint can be completed without anything else."""

    shards: dict[str, dict[str, str]]
    """File name -> {tensor: the part that holds it}, in order."""
    metadata: dict[str, str]
    """`__metadata__` of every shard."""
    manifest: dict[str, Any]
    """What the manifest says beside the files."""


@dataclass(kw_only=True)
class Journal:
    """The state of a partial checkpoint."""

    folder: Path
    request: dict[str, Any]
    """Everything the result depends on: options, versions, hashes of inputs."""
    parts: dict[str, FileRecord] = field(default_factory=dict)
    """Parts by name."""
    shards: dict[str, FileRecord] = field(default_factory=dict)
    """Finished shards by file name."""
    plan: Plan | None = None

    def save(self) -> None:
        content = asdict(self) | {"layout": LAYOUT}
        del content["folder"]
        write_atomically(self.folder / JOURNAL_FILE, [json.dumps(content, indent=1, ensure_ascii=False).encode()])

    @classmethod
    def load(cls, folder: Path) -> Journal:
        """UserError if it is damaged or of another layout."""
        file = folder / JOURNAL_FILE
        remedy = "add --restart to begin anew, or choose another OUT"
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
                    plan=None if plan is None else Plan(**plan),
                )
        except (UserError, OSError, KeyError, TypeError, AttributeError):
            raise UserError(f"{file}: damaged; {remedy}") from None
        raise UserError(
            f"{file}: written by another version of llmquant (layout {layout!r:.20}, not {LAYOUT}); {remedy}"
        )


def as_json(value: dict[str, Any]) -> dict[str, Any]:
    """What a dict becomes when it is written and read back, so that requests can be compared."""
    return json.loads(json.dumps(value))


def differences(before: Any, now: Any, key: str = "") -> list[str]:
    """`key was a, is b` for every leaf that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            text
            for name in sorted(before.keys() | now.keys())
            for text in differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)
        ]
    return [] if before == now else [f"{key} was {before!r:.60}, is {now!r:.60}"]
