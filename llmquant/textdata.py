"""Where text comes from: a preset of the hub, Python's own manual, or a local file. Text in rows, and how rows join.

A data set is a list of rows. What perplexity it gives depends on how the rows are joined before tokenizing, so the rule
travels with the rows: the GPTQ paper joins WikiText-2 with a blank line between rows and C4 with a space. A text file
is taken as it stands, unless it is a dump of rows in the raw-WikiText form (see `_text_rows`).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from llmquant.errors import UserError, first_words
from llmquant.paths import typed_path

Conversation = list[dict[str, Any]]
"""Messages in their order, each with "role" and "content"."""
BETWEEN_ROWS = "\n\n"
JOINS = {"rows": BETWEEN_ROWS, "text": ""}
"""What `join` may say besides "auto": a blank line between rows (the GPTQ paper), or nothing (the text as it is)."""


@dataclass(frozen=True, kw_only=True)
class TextRows:
    """Rows of text and the string that goes between them."""

    source: str
    """Name of the preset, or the path as given."""
    rows: list[str]
    """The rows, blank ones included."""
    joiner: str
    """What stands between two rows in `text`."""

    @property
    def text(self) -> str:
        """All rows as one text."""
        return self.joiner.join(self.rows)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A data set of the Hugging Face hub, read through `datasets` straight from its data files."""

    loader: str
    """`datasets` builder: "parquet" or "json"."""
    files: dict[str, str]
    """Data file of each split."""
    column: str
    """Column that holds the text."""
    joiner: str = BETWEEN_ROWS
    max_rows: int | None = None
    """Read only this many rows; the file is streamed then."""


# Pointing at the files, not at the data set's name: the same rows, no loading script, and an unreachable hub is noticed
# at once instead of after half a minute of retries.
_WIKITEXT2 = "hf://datasets/Salesforce/wikitext/wikitext-2-raw-v1"
_C4 = "hf://datasets/allenai/c4/en"
_PTB = "hf://datasets/ptb-text-only/ptb_text_only@refs%2Fconvert%2Fparquet/penn_treebank"
PRESETS: dict[str, Preset] = {
    "wikitext2": Preset(
        loader="parquet",
        files={
            "train": f"{_WIKITEXT2}/train-00000-of-00001.parquet",
            "validation": f"{_WIKITEXT2}/validation-00000-of-00001.parquet",
            "test": f"{_WIKITEXT2}/test-00000-of-00001.parquet",
        },
        column="text",
    ),
    "c4": Preset(
        loader="json",
        files={
            "train": f"{_C4}/c4-train.00000-of-01024.json.gz",
            # C4 has no test split: as in the paper, the validation split stands for it.
            "validation": f"{_C4}/c4-validation.00000-of-00008.json.gz",
            "test": f"{_C4}/c4-validation.00000-of-00008.json.gz",
        },
        column="text",
        joiner=" ",
        max_rows=1100,
    ),
    "ptb": Preset(
        loader="parquet",
        files={split: f"{_PTB}/{split}/0000.parquet" for split in ("train", "validation", "test")},
        column="sentence",
        joiner=" ",
    ),
}
PYTHON_DOCS = "python-docs"
"""The language reference that comes with Python (`pydoc_data.topics`): always there, about 110,000 tokens."""
FILE_TYPES = (".txt", ".jsonl", ".parquet")


def preset_names() -> list[str]:
    """Names that `load_rows` takes besides files."""
    return [*PRESETS, PYTHON_DOCS]


def load_rows(source: str, split: str = "test", join: str = "auto") -> TextRows:
    """Rows of a preset (`preset_names()`) or of a local .txt, .jsonl or .parquet file.

    split: "train", "validation" or "test"; local files and "python-docs" have one split and do not look at it.
    join: "auto" for the rule that belongs to the source, "rows" or "text" (`JOINS`) to set it.
    Raises UserError for an unknown name, an unreachable hub, or a file that cannot be read as text.
    """
    if join != "auto" and join not in JOINS:
        raise UserError(f"join {join!r}: not one of auto, {', '.join(JOINS)}; use --join auto")
    if source in PRESETS:
        rows, joiner = _hub_rows(source, split), PRESETS[source].joiner
    elif source == PYTHON_DOCS:
        rows, joiner = _python_docs_rows(), BETWEEN_ROWS
    else:
        rows, joiner = _file_rows(source)
    if not any(row.strip() for row in rows):
        raise UserError(f"{source}: holds no text; give a file with text in it, or one of {', '.join(preset_names())}")
    return TextRows(source=source, rows=rows, joiner=joiner if join == "auto" else JOINS[join])


def load_conversations(source: str) -> list[Conversation]:
    """The chats of a local .jsonl or .parquet file whose rows hold "messages", each with a role and a content.

    Raises UserError for any other source.
    """
    path = typed_path(source)
    if path.suffix not in (".jsonl", ".parquet"):
        raise UserError(
            f'{source}: holds no conversations; with --chat give a .jsonl or .parquet file whose rows hold "messages"'
        )
    conversations = []
    for record, where in _records(path):
        messages = record.get("messages") if isinstance(record, dict) else None
        if not _are_messages(messages) or not all(isinstance(message.get("role"), str) for message in messages):
            raise UserError(
                f'{where}: holds no "messages" (a list with "role" and "content" strings); leave out --chat for text'
            )
        conversations.append(messages)
    if not conversations:
        raise UserError(f"{source}: holds no conversation; give a file with messages in it")
    return conversations


def _hub_rows(name: str, split: str) -> list[str]:
    preset = PRESETS[name]
    if split not in preset.files:
        raise UserError(f"{name}: has no split {split!r}; its splits are {', '.join(preset.files)}")
    import datasets

    try:
        data = datasets.load_dataset(
            preset.loader, data_files=preset.files[split], split="train", streaming=preset.max_rows is not None
        )
        return [str(row[preset.column]) for row in itertools.islice(data, preset.max_rows)]
    # The ways a download can fail come from four libraries without a common base; the cause is in the message.
    except Exception as error:
        raise UserError(
            f"{name}: cannot be read from the Hugging Face hub ({first_words(error)}); "
            f"give a local .txt, .jsonl or .parquet file, or {PYTHON_DOCS}, which needs no network"
        ) from error


def _python_docs_rows() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _file_rows(source: str) -> tuple[list[str], str]:
    path = typed_path(source)
    if path.suffix not in FILE_TYPES and not path.exists():
        raise UserError(
            f"{source}: not a known data set and no such file; known are {', '.join(preset_names())}, "
            f"or give the path of a {', '.join(FILE_TYPES)} file"
        )
    if not path.is_file():
        raise UserError(f"{source}: no such file; give a {', '.join(FILE_TYPES)} file or one of {', '.join(PRESETS)}")
    if path.suffix in (".jsonl", ".parquet"):
        return [_record_text(record, where) for record, where in _records(path)], BETWEEN_ROWS
    if path.suffix == ".txt":
        return _text_rows(_read_text(path))
    raise UserError(f"{source}: type {path.suffix or 'without a suffix'} is not read; give {', '.join(FILE_TYPES)}")


def _read_text(path: Path) -> str:
    try:
        # newline="" leaves the line ends alone: a carriage return is part of the text that is measured.
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); convert it to UTF-8"
        ) from error


def _text_rows(text: str) -> tuple[list[str], str]:
    """Lines with their line ends, which concatenate to the file itself.

    The raw WikiText files are dumps of rows: every row ends in a newline, and an empty row is a line of one space. They
    are known by their beginning, an empty row and a title between equal signs, and give the rows of the data set (an
    empty row is ""), joined as the GPTQ paper joins them.
    """
    lines = text.split("\n")
    rows = [line + "\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])
    if text.startswith(" \n = "):
        return ["" if row == " \n" else row for row in rows], BETWEEN_ROWS
    return rows, ""


def _records(path: Path) -> Iterator[tuple[Any, str]]:
    """What each line or row holds, and where that is."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a {', '.join(FILE_TYPES)} file")
    if path.suffix == ".parquet":
        yield from _parquet_records(path)
        return
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            yield json.loads(line), where
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON ({error.msg}); one object per line is needed") from error


def _are_messages(value: Any) -> TypeGuard[Conversation]:
    return isinstance(value, list) and all(
        isinstance(message, dict) and isinstance(message.get("content"), str) for message in value
    )


def _record_text(record: Any, where: str) -> str:
    """The field "text", or the contents of a chat's "messages", one after the other."""
    if isinstance(record, dict):
        if isinstance(record.get("text"), str):
            return record["text"]
        if _are_messages(messages := record.get("messages")):
            return "\n".join(message["content"] for message in messages)
    raise UserError(
        f'{where}: holds neither "text" (a string) nor "messages" (a list with "content" strings); rename the field'
    )


def _parquet_records(path: Path) -> Iterator[tuple[Any, str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        columns = [name for name in ("text", "messages") if name in file.schema_arrow.names]
        records = file.read(columns).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({first_words(error)}); write it anew") from error
    for number, record in enumerate(records):
        yield record, f"{path} row {number}"
