"""Readers of text files: lines of .txt and .md files, records of .jsonl, .ndjson, .json and .parquet files.

All files except .parquet may be compressed (.gz, .bz2, .xz, .zst). The encoding is UTF-8 with or without a byte order
mark, or UTF-16 or UTF-32 with one. A JSON file holds one record per line, or one array of records. Files are read line
by line, and parquet files a few rows at a time. `records.py` selects the text of a record.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from io import BufferedReader, TextIOWrapper
from itertools import chain
from pathlib import Path
from typing import Any

from llmquant.data.records import CHAT_FIELDS, known_fields
from llmquant.errors import UserError, one_line

TEXT_SUFFIXES = (".txt", ".md")
"""Suffixes of files that are read as lines of text."""
RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
"""Suffixes of files that are read as records."""
PARQUET_BATCH_ROWS = 1024
"""Rows of a parquet file that are decoded at a time."""
# The UTF-32 entries come first, because the byte order mark of UTF-32 begins with the mark of UTF-16.
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_UNDECODED = re.compile("[\udc80-\udcff]")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
# This matches a surrogate pair, any escape except \u, or a lone surrogate in JSON. Only a lone surrogate is captured.
_ESCAPES = re.compile(r"\\u[dD][89abAB]..\\u[dD][c-fC-F]..|\\[^u]|(\\u[dD][89a-fA-F]..)")


@dataclass(frozen=True)
class Record:
    """One record of a file: a line, an array element or a row."""

    value: Any
    """The record as plain JSON values."""
    location: str
    """File and line, array element or row of the record, for error messages."""
    num_replaced: int = 0
    """Number of lone surrogates that were replaced by U+FFFD, because they cannot be tokenized."""


def file_suffix(path: Path) -> str:
    """Return the suffix of a path in lower case, ignoring a compression suffix: ".jsonl" for Train.JSONL.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _OPENERS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def text_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file with their line ends (LF or CR LF), without the byte order mark.

    Raises UserError for a file that cannot be read or is not text.
    """
    try:
        with _open(path) as raw, BufferedReader(raw) as file:
            mark = file.peek(4)
            encoding = next((name for start, name in _BYTE_ORDER_MARKS.items() if mark.startswith(start)), "utf-8")
            # A byte that is not UTF-8 is decoded to a surrogate, so that the error message can name its line.
            with TextIOWrapper(file, encoding, "surrogateescape", newline="\n") as text:
                for number, line in enumerate(text, start=1):
                    _check_line(line, number, path)
                    yield line
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not {encoding.upper()} text ({error.reason}); convert it to UTF-8") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise _unreadable_error(path, error) from error


def records(path: Path) -> Iterator[Record]:
    """Yield the records of a file with one of RECORD_SUFFIXES. Messages that are stored as a JSON string are parsed.

    Raises UserError for a file that cannot be read or a line that is not JSON.
    """
    yield from map(_parse_messages, _stored_records(path))


def _stored_records(path: Path) -> Iterator[Record]:
    """Yield the records of a file as they are stored."""
    if file_suffix(path) == ".parquet":
        yield from _parquet_records(path)
        return
    numbered = enumerate((line.removeprefix("\ufeff") for line in text_lines(path)), start=1)
    lines = ((number, line) for number, line in numbered if line.strip())
    first = next(lines, None)
    if first is None:
        return
    if first[1].lstrip().startswith("["):
        text = "".join(line for _, line in chain([first], lines))
        array = _parse_json(text, str(path), "one array of records is needed")
        for number, value in enumerate(array.value, start=1):
            yield Record(value, f"{path} record {number}", array.num_replaced if number == 1 else 0)
        return
    for number, line in chain([first], lines):
        yield _parse_json(line, f"{path} line {number}", "one object per line is needed; correct the line or delete it")


def _unreadable_error(path: Path, error: Exception) -> UserError:
    """Return the error for a file that cannot be opened, decompressed or read."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
    return UserError(f"{path}: cannot be read ({reason}); check the file, or create it again")


def _open_zstd(path: Path) -> Any:
    import pyarrow

    return pyarrow.input_stream(str(path), compression="zstd")


_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}
"""Functions that open a compressed file, by its last suffix."""


def _open(path: Path) -> Any:
    opener = _OPENERS.get(path.suffix.lower())
    return path.open("rb") if opener is None else opener(path)


def _check_line(line: str, number: int, path: Path) -> None:
    """Raise UserError if a line holds a NUL character or a byte that is not UTF-8."""
    if "\0" in line:
        raise UserError(
            f"{path} line {number}: holds a NUL character, like a binary file or UTF-16 without a byte order mark; "
            f"give text in UTF-8"
        )
    if not line.isascii() and (found := _UNDECODED.search(line)):
        byte, offset = ord(found[0]) - 0xDC00, len(line[: found.start()].encode())
        raise UserError(
            f"{path}: not UTF-8 text (0x{byte:02x} in line {number}, at byte {offset}); convert it to UTF-8, "
            f"for example with iconv -f LATIN1 -t UTF-8"
        )


def _parse_messages(record: Record) -> Record:
    """Return the record, with each chat field that holds a JSON string parsed into a list of messages."""
    for name in CHAT_FIELDS if isinstance(record.value, dict) else ():
        text = record.value.get(name)
        if isinstance(text, str) and text.lstrip().startswith("["):
            try:
                inner = _parse_json(text, record.location, "a list of messages is needed")
            except UserError:  # plain text that begins with a bracket
                continue
            if all(message is None or isinstance(message, dict) for message in inner.value):
                value = record.value | {name: inner.value}
                record = replace(record, value=value, num_replaced=record.num_replaced + inner.num_replaced)
    return record


def _parse_json(text: str, location: str, rule: str) -> Record:
    """Parse JSON, with lone surrogates replaced. Raises UserError with the location and the rule for invalid JSON."""
    num_replaced = 0
    if _SURROGATE.search(text):
        num_replaced = sum(1 for escape in _ESCAPES.finditer(text) if escape[1])
        text = _ESCAPES.sub(lambda escape: r"\ufffd" if escape[1] else escape[0], text)
    try:
        return Record(json.loads(text), location, num_replaced)
    except (ValueError, RecursionError) as error:
        at = f"{error.msg}: character {error.pos}" if isinstance(error, json.JSONDecodeError) else one_line(error)
        raise UserError(f"{location}: not JSON ({at}); {rule}") from error


def _parquet_records(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            # If no column is known, all columns are read, so that the error message about the first row can name them.
            columns = known_fields(names) or None
            number = 0
            for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=columns):
                for value in batch.to_pylist():
                    yield Record(value, f"{path} row {number}")
                    number += 1
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable parquet file ({one_line(error)}); create it again") from error
