"""Sources of text: presets on the Hugging Face hub, Python's language reference, and local files.

A data set is a list of rows. Perplexity depends on how the rows are joined before tokenizing, so rows are returned
together with their joiner: the GPTQ paper joins WikiText-2 with a blank line between rows, and C4 with a space. A text
file is used unchanged, unless it is a dump of rows in the raw-WikiText form (see `_text_rows`). `files.py` reads the
files, and `records.py` selects the fields of their records.
"""

from __future__ import annotations

import itertools
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmquant.data.files import RECORD_SUFFIXES, TEXT_SUFFIXES, file_suffix, records, text_lines
from llmquant.data.records import Conversation, record_conversation, record_text
from llmquant.errors import UserError, one_line

BLANK_LINE = "\n\n"
"""The joiner of most sources: a blank line between rows, as in the GPTQ paper."""
JOINERS = {"rows": BLANK_LINE, "text": ""}
"""Joiner for each value of `join` except "auto": a blank line between rows ("rows"), or nothing ("text")."""


@dataclass(frozen=True, kw_only=True)
class TextRows:
    """Rows of text, and the string that joins them."""

    source: str
    """Name of the preset, or the path as the user gave it."""
    rows: list[str]
    """All rows, including blank ones."""
    joiner: str
    """String between two rows of `text`."""
    notes: tuple[str, ...] = ()
    """Descriptions of the changes that were made to the text while it was read, one string each."""

    @property
    def text(self) -> str:
        """All rows, joined to one text."""
        return "".join(self.segments())

    def segments(self) -> Iterator[str]:
        """Yield the rows and the joiners between them, which concatenate to `text`, without building the whole text."""
        for number, row in enumerate(self.rows):
            if number and self.joiner:
                yield self.joiner
            yield row


@dataclass(frozen=True, kw_only=True)
class ConversationRows:
    """Conversations from a file of records."""

    rows: list[Conversation]
    """All conversations in the order of the file."""
    notes: tuple[str, ...] = ()
    """Descriptions of the changes that were made to the text while it was read, one string each."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A data set on the Hugging Face hub. The `datasets` package reads its data files directly."""

    loader: str
    """Name of the `datasets` builder: "parquet" or "json"."""
    files: dict[str, str]
    """URL of the data file of each split."""
    column: str
    """Column that holds the text."""
    joiner: str = BLANK_LINE
    """String between two rows."""
    max_rows: int | None = None
    """Number of rows to read from the start of the file, which is then streamed; None reads the whole file."""


# A preset names the data files, not the data set. The rows are the same, no loading script runs, and an unreachable hub
# is an error at once instead of after half a minute of retries.
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
            # C4 has no test split. As in the GPTQ paper, the validation split takes its place.
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
"""The preset of the language reference that comes with Python (`pydoc_data.topics`). It has about 110,000 tokens and
needs no network."""
COMMON_FILES = ".txt, .jsonl or .parquet file"
"""The most common types of files, for error messages. `files.py` reads a few more."""
_UNPRINTABLE = re.compile("[\0-\x1f\x7f\ud800-\udfff]")


def preset_names() -> list[str]:
    """Return the names that `load_rows` accepts besides files."""
    return [*PRESETS, PYTHON_DOCS]


def load_rows(source: str, split: str = "test", join: str = "auto") -> TextRows:
    """Return the rows of a preset (`preset_names()`) or of a local file of text or records.

    split: "train", "validation" or "test". Local files and "python-docs" have one split and ignore this argument.
    join: "auto" for the joiner of the source, or "rows" or "text" for one of JOINERS.
    Raises UserError for an unknown name, an unreachable hub, or a file that cannot be read as text.
    """
    if join != "auto" and join not in JOINERS:
        raise UserError(f"join {join!r}: not one of auto, {', '.join(JOINERS)}; use --join auto")
    notes: tuple[str, ...] = ()
    if source in PRESETS:
        rows, joiner = _hub_rows(source, split), PRESETS[source].joiner
    elif source == PYTHON_DOCS:
        rows, joiner = _python_docs_rows(), BLANK_LINE
    else:
        rows, joiner, notes = _file_rows(source)
    if not any(row.strip() for row in rows):
        raise UserError(f"{source}: holds no text; give a file with text in it, or one of {', '.join(preset_names())}")
    return TextRows(source=source, rows=rows, joiner=joiner if join == "auto" else JOINERS[join], notes=notes)


def load_conversations(source: str) -> ConversationRows:
    """Return the conversations of a local file of records that hold "messages" or "conversations".

    Raises UserError for any other source.
    """
    if source in preset_names() or file_suffix(Path(source)) not in RECORD_SUFFIXES:
        raise UserError(
            f'{source}: holds no conversations; with --chat give a .jsonl or .parquet file whose rows hold "messages"'
        )
    rows, num_replaced = [], 0
    for record in records(_regular_file(source)):
        rows.append(record_conversation(record.value, record.location))
        num_replaced += record.num_replaced
    if not any(rows):
        raise UserError(f"{source}: holds no conversation; give a file with messages in it")
    return ConversationRows(rows=rows, notes=_surrogate_notes(num_replaced))


def check_preset(name: str, split: str) -> None:
    """Read the first row of a preset on the hub. Raises UserError if the hub cannot be reached."""
    _hub_rows(name, split, max_rows=1)


def _hub_rows(name: str, split: str, max_rows: int | None = None) -> list[str]:
    """Return the rows of a preset. max_rows: return only the first rows, and avoid fetching the others if possible."""
    preset = PRESETS[name]
    max_rows = max_rows or preset.max_rows
    if split not in preset.files:
        raise UserError(f"{name}: has no split {split!r}; its splits are {', '.join(preset.files)}")
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise UserError(
            f"{name}: is on the Hugging Face hub, and reading it needs the Python package {error.name}, which is not "
            f"installed; run `pip install {error.name}`, or give a local {COMMON_FILES}, or {PYTHON_DOCS}"
        ) from error
    try:
        data = datasets.load_dataset(
            preset.loader, data_files=preset.files[split], split="train", streaming=max_rows is not None
        )
        return [str(row[preset.column]) for row in itertools.islice(data, max_rows)]
    # A failed download raises exceptions of four libraries without a common base class. The message holds the cause.
    except Exception as error:
        raise UserError(
            f"{name}: cannot be read from the Hugging Face hub ({one_line(error)}); "
            f"give a local {COMMON_FILES}, or {PYTHON_DOCS}, which needs no network"
        ) from error


def _python_docs_rows() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _file_rows(source: str) -> tuple[list[str], str, tuple[str, ...]]:
    """Return the rows of a local file, their joiner, and notes."""
    path = _regular_file(source)
    suffix = file_suffix(path)
    if suffix in RECORD_SUFFIXES:
        rows, num_replaced = [], 0
        for record in records(path):
            rows.append(record_text(record.value, record.location))
            num_replaced += record.num_replaced
        return rows, BLANK_LINE, _surrogate_notes(num_replaced)
    if suffix in TEXT_SUFFIXES:
        return *_text_rows(list(text_lines(path))), ()
    kind = f"type {suffix}" if suffix else "a file without a suffix"
    raise UserError(
        f"{source}: {kind} is not read; give a {COMMON_FILES}, or rename a file of plain text to the suffix .txt"
    )


def _regular_file(source: str) -> Path:
    """Return the path of a regular file. Raises UserError for anything else, with the presets as a remedy."""
    instead = f"give a {COMMON_FILES}, or one of {', '.join(preset_names())}"
    # Reports store the name, which must be printable text on one line.
    if not source or _UNPRINTABLE.search(source):
        raise UserError(f"{source!r:.100}: not a usable file name; {instead}")
    try:
        path = Path(source).expanduser()
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        unknown = "" if file_suffix(path) in (*TEXT_SUFFIXES, *RECORD_SUFFIXES) else "not a known data set and "
        raise UserError(f"{source}: {unknown}no such file; {instead}") from None
    # This happens if the name is too long or begins with an unknown ~user, or if its folder may not be read.
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{source:.100}: cannot be opened as a file ({one_line(error, 60)}); {instead}") from None
    if stat.S_ISDIR(mode):
        raise UserError(f"{source}: is a folder; {instead}")
    if not stat.S_ISREG(mode):
        raise UserError(f"{source}: is a pipe or a device; save the text as a file and give that")
    return path


def _text_rows(lines: list[str]) -> tuple[list[str], str]:
    """Return the rows of a text file and their joiner.

    lines: the lines of the file with their line ends, which concatenate to the file. In most files each line is a row.

    The raw WikiText files are dumps of rows: every row ends in a newline, and an empty row is a line of one space. They
    begin with an empty row and a title between equal signs, which identifies them. Their rows are those of the data set
    (an empty row is ""), joined as in the GPTQ paper.
    """
    if lines[:1] == [" \n"] and "".join(lines[1:2]).startswith(" = "):
        return ["" if line == " \n" else line for line in lines], BLANK_LINE
    return lines, ""


def _surrogate_notes(num_replaced: int) -> tuple[str, ...]:
    """Return the note about replaced lone surrogates, if there are any."""
    if not num_replaced:
        return ()
    return (f"lone surrogates (halves of characters that were cut in two) read as U+FFFD: {num_replaced}",)
