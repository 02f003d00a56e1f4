"""Files of text: lines of a .txt or .md file, records (`records.py`) of a .jsonl, .ndjson, .json or .parquet file.

All but .parquet may be compressed (.gz, .bz2, .xz, .zst). Text is UTF-8, with or without a byte order mark, or UTF-16
or UTF-32 with one. JSON is one record a line, or one array of records. Files are read line by line, parquet files a few
rows at a time.
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

from llmquant.errors import UserError, first_words
from llmquant.records import CHATS, known_fields

TEXT_TYPES = (".txt", ".md")
RECORD_TYPES = (".jsonl", ".ndjson", ".json", ".parquet")
PARQUET_ROWS = 1024
"""Rows of a parquet file that are decoded at a time."""
# The mark of UTF-32 begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_UNDECODED = re.compile("[\udc80-\udcff]")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
# Escapes in JSON: a surrogate pair, any escape but \u, and the half of a pair, which is the group.
_ESCAPES = re.compile(r"\\u[dD][89abAB]..\\u[dD][c-fC-F]..|\\[^u]|(\\u[dD][89a-fA-F]..)")


@dataclass(frozen=True)
class Record:
    """A line, array element or row of a file."""

    value: Any
    """Plain values, as JSON has them."""
    where: str
    """File and line, for messages."""
    num_replaced: int = 0
    """Lone surrogates (half a character) that were replaced by U+FFFD, for they cannot be tokenized."""


def file_type(path: Path) -> str:
    """The suffix in lower case, without the compression's: ".jsonl" for Train.JSONL.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _OPENERS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def text_lines(path: Path) -> Iterator[str]:
    """Lines of a text file with their ends, LF or CR LF: they concatenate to the file without its byte order mark.

    Raises UserError for a file that cannot be read, or is not text.
    """
    try:
        with _open(path) as raw, BufferedReader(raw) as file:
            mark = file.peek(4)
            encoding = next((name for start, name in _MARKS.items() if mark.startswith(start)), "utf-8")
            # A byte that is not UTF-8 comes as a surrogate, so that its line is known.
            with TextIOWrapper(file, encoding, "surrogateescape", newline="\n") as text:
                for number, line in enumerate(text, start=1):
                    _check_line(line, number, path)
                    yield line
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not {encoding.upper()} text ({error.reason}); convert it to UTF-8") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise unreadable(path, error) from error


def records(path: Path) -> Iterator[Record]:
    """The records of a file of RECORD_TYPES in their order. Messages that a file holds as a string of JSON are parsed.

    Raises UserError for a file that cannot be read, or a line that is not JSON.
    """
    yield from map(_with_messages, _stored_records(path))


def _stored_records(path: Path) -> Iterator[Record]:
    if file_type(path) == ".parquet":
        yield from _parquet_records(path)
        return
    numbered = enumerate((line.removeprefix("\ufeff") for line in text_lines(path)), start=1)
    lines = ((number, line) for number, line in numbered if line.strip())
    first = next(lines, None)
    if first is None:
        return
    if first[1].lstrip().startswith("["):
        array = _parsed("".join(line for _, line in chain([first], lines)), str(path), "one array of records is needed")
        for number, value in enumerate(array.value, start=1):
            yield Record(value, f"{path} record {number}", array.num_replaced if number == 1 else 0)
        return
    for number, line in chain([first], lines):
        yield _parsed(line, f"{path} line {number}", "one object per line is needed, mend the line or delete it")


def unreadable(path: Path, error: Exception) -> UserError:
    """The error of a file that cannot be opened, decompressed or read."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else first_words(error)
    return UserError(f"{path}: cannot be read ({reason}); check the file, or write it anew")


def _open_zstd(path: Path) -> Any:
    import pyarrow

    return pyarrow.input_stream(str(path), compression="zstd")


_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}
"""How a compressed file is opened, by its last suffix."""


def _open(path: Path) -> Any:
    opener = _OPENERS.get(path.suffix.lower())
    return path.open("rb") if opener is None else opener(path)


def _check_line(line: str, number: int, path: Path) -> None:
    if "\0" in line:
        raise UserError(
            f"{path} line {number}: holds a NUL character, as binary files do, and UTF-16 without a byte order mark; "
            f"give text in UTF-8"
        )
    if not line.isascii() and (found := _UNDECODED.search(line)):
        byte, offset = ord(found[0]) - 0xDC00, len(line[: found.start()].encode())
        raise UserError(
            f"{path}: not UTF-8 text (0x{byte:02x} in line {number}, at byte {offset}); convert it to UTF-8, "
            f"for example by iconv -f LATIN1 -t UTF-8"
        )


def _with_messages(record: Record) -> Record:
    """The record with a list in the place of a string that holds the messages of a chat as JSON."""
    for name in CHATS if isinstance(record.value, dict) else ():
        text = record.value.get(name)
        if isinstance(text, str) and text.lstrip().startswith("["):
            try:
                inner = _parsed(text, record.where, "a list of messages is needed")
            except UserError:  # text that begins with a bracket
                continue
            if all(message is None or isinstance(message, dict) for message in inner.value):
                value = record.value | {name: inner.value}
                record = replace(record, value=value, num_replaced=record.num_replaced + inner.num_replaced)
    return record


def _parsed(text: str, where: str, needed: str) -> Record:
    num_replaced = 0
    if _SURROGATE.search(text):
        num_replaced = sum(1 for escape in _ESCAPES.finditer(text) if escape[1])
        text = _ESCAPES.sub(lambda escape: r"\ufffd" if escape[1] else escape[0], text)
    try:
        return Record(json.loads(text), where, num_replaced)
    except (ValueError, RecursionError) as error:
        at = f"{error.msg}: character {error.pos}" if isinstance(error, json.JSONDecodeError) else first_words(error)
        raise UserError(f"{where}: not JSON ({at}); {needed}") from error


def _parquet_records(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            # Without a known column the first row is read whole: the message about it names the columns.
            columns = known_fields(names) or None
            number = 0
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=columns):
                for value in batch.to_pylist():
                    yield Record(value, f"{path} row {number}")
                    number += 1
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable parquet file ({first_words(error)}); write it anew") from error
