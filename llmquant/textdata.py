"""Where text comes from: a preset of the hub, Python's own manual, or a local file. Text in rows, and how rows join.

A data set is a list of rows. What perplexity it gives depends on how the rows are joined before tokenizing, so the rule
travels with the rows: the GPTQ paper joins WikiText-2 with a blank line between rows and C4 with a space. A text file
is taken as it stands, unless it is a dump of rows in the raw-WikiText form (see `_text_rows`). Which files are read is
said in `textfiles.py`, which fields of their records in `records.py`.
"""

from __future__ import annotations

import itertools
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmquant.errors import UserError, first_words
from llmquant.records import Conversation, record_conversation, record_text
from llmquant.textfiles import RECORD_TYPES, TEXT_TYPES, file_type, records, text_lines

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
    remarks: tuple[str, ...] = ()
    """What was changed while the text was read, in words."""

    @property
    def text(self) -> str:
        """All rows as one text."""
        return "".join(self.parts())

    def parts(self) -> Iterator[str]:
        """The text in parts: the rows, and what stands between them. Takes no memory of the text's size."""
        for number, row in enumerate(self.rows):
            if number and self.joiner:
                yield self.joiner
            yield row


@dataclass(frozen=True, kw_only=True)
class Conversations:
    """Chats, and what was changed while they were read."""

    chats: list[Conversation]
    remarks: tuple[str, ...] = ()
    """As `TextRows.remarks`."""


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
FILE_TYPES = ".txt, .jsonl or .parquet file"
"""The usual files, for messages; `textfiles` reads a few more."""
_UNPRINTABLE = re.compile("[\0-\x1f\x7f\ud800-\udfff]")


def preset_names() -> list[str]:
    """Names that `load_rows` takes besides files."""
    return [*PRESETS, PYTHON_DOCS]


def load_rows(source: str, split: str = "test", join: str = "auto") -> TextRows:
    """Rows of a preset (`preset_names()`) or of a local file of text or records.

    split: "train", "validation" or "test"; local files and "python-docs" have one split and do not look at it.
    join: "auto" for the rule that belongs to the source, "rows" or "text" (`JOINS`) to set it.
    Raises UserError for an unknown name, an unreachable hub, or a file that cannot be read as text.
    """
    if join != "auto" and join not in JOINS:
        raise UserError(f"join {join!r}: not one of auto, {', '.join(JOINS)}; use --join auto")
    remarks: tuple[str, ...] = ()
    if source in PRESETS:
        rows, joiner = _hub_rows(source, split), PRESETS[source].joiner
    elif source == PYTHON_DOCS:
        rows, joiner = _python_docs_rows(), BETWEEN_ROWS
    else:
        rows, joiner, remarks = _file_rows(source)
    if not any(row.strip() for row in rows):
        raise UserError(f"{source}: holds no text; give a file with text in it, or one of {', '.join(preset_names())}")
    return TextRows(source=source, rows=rows, joiner=joiner if join == "auto" else JOINS[join], remarks=remarks)


def load_conversations(source: str) -> Conversations:
    """The chats of a local .jsonl or .parquet file whose records hold "messages" or "conversations".

    Raises UserError for any other source.
    """
    if source in preset_names() or file_type(Path(source)) not in RECORD_TYPES:
        raise UserError(
            f'{source}: holds no conversations; with --chat give a .jsonl or .parquet file whose rows hold "messages"'
        )
    chats, num_replaced = [], 0
    for record in records(_existing_file(source)):
        chats.append(record_conversation(record.value, record.where))
        num_replaced += record.num_replaced
    if not any(chats):
        raise UserError(f"{source}: holds no conversation; give a file with messages in it")
    return Conversations(chats=chats, remarks=_replaced(num_replaced))


def check_preset(name: str, split: str) -> None:
    """Read the first row of a preset of the hub. Raises UserError as `load_rows` does where the hub is out of reach."""
    _hub_rows(name, split, max_rows=1)


def _hub_rows(name: str, split: str, max_rows: int | None = None) -> list[str]:
    """The rows of a preset. max_rows: of these only the first, without fetching the others where that can be done."""
    preset = PRESETS[name]
    max_rows = max_rows or preset.max_rows
    if split not in preset.files:
        raise UserError(f"{name}: has no split {split!r}; its splits are {', '.join(preset.files)}")
    import datasets

    try:
        data = datasets.load_dataset(
            preset.loader, data_files=preset.files[split], split="train", streaming=max_rows is not None
        )
        return [str(row[preset.column]) for row in itertools.islice(data, max_rows)]
    # The ways a download can fail come from four libraries without a common base; the cause is in the message.
    except Exception as error:
        raise UserError(
            f"{name}: cannot be read from the Hugging Face hub ({first_words(error)}); "
            f"give a local {FILE_TYPES}, or {PYTHON_DOCS}, which needs no network"
        ) from error


def _python_docs_rows() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _file_rows(source: str) -> tuple[list[str], str, tuple[str, ...]]:
    """Rows, what stands between them, and remarks."""
    path = _existing_file(source)
    kind = file_type(path)
    if kind in RECORD_TYPES:
        rows, num_replaced = [], 0
        for record in records(path):
            rows.append(record_text(record.value, record.where))
            num_replaced += record.num_replaced
        return rows, BETWEEN_ROWS, _replaced(num_replaced)
    if kind in TEXT_TYPES:
        return *_text_rows(list(text_lines(path))), ()
    raise UserError(
        f"{source}: type {kind or 'without a suffix'} is not read; give a {FILE_TYPES}, or give a file of plain text "
        f"the suffix .txt"
    )


def _existing_file(source: str) -> Path:
    """The path of a regular file. Raises UserError for anything else."""
    instead = f"give a {FILE_TYPES}, or one of {', '.join(preset_names())}"
    # Reports hold the name: it must be text, and stay on one line.
    if not source or _UNPRINTABLE.search(source):
        raise UserError(f"{source!r:.100}: not a usable name of a file; {instead}")
    try:
        path = Path(source).expanduser()
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        unknown = "" if file_type(path) in (*TEXT_TYPES, *RECORD_TYPES) else "not a known data set and "
        raise UserError(f"{source}: {unknown}no such file; {instead}") from None
    # A name that is too long, holds a NUL character or begins with an unknown ~user; a folder that must not be read.
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{source:.100}: no file can be read there ({first_words(error, 60)}); {instead}") from None
    if stat.S_ISDIR(mode):
        raise UserError(f"{source}: is a folder; {instead}")
    if not stat.S_ISREG(mode):
        raise UserError(f"{source}: is a pipe or a device; save the text as a file and give that")
    return path


def _text_rows(lines: list[str]) -> tuple[list[str], str]:
    """Lines with their line ends, which concatenate to the file itself.

    The raw WikiText files are dumps of rows: every row ends in a newline, and an empty row is a line of one space. They
    are known by their beginning, an empty row and a title between equal signs, and give the rows of the data set (an
    empty row is ""), joined as the GPTQ paper joins them.
    """
    if lines[:1] == [" \n"] and "".join(lines[1:2]).startswith(" = "):
        return ["" if line == " \n" else line for line in lines], BETWEEN_ROWS
    return lines, ""


def _replaced(num_replaced: int) -> tuple[str, ...]:
    """The remark about lone surrogates, if there were any."""
    if not num_replaced:
        return ()
    return (f"lone surrogates (halves of characters that were cut in two) read as U+FFFD: {num_replaced}",)
