"""Python's manual, cut short: tokenizing all of it takes longer than the rest of a tiny run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate

import pytest

from llmquant import textdata

CHARACTERS = 60_000
"""Some 20,000 tokens of a tiny model."""


@contextmanager
def short_manual() -> Iterator[None]:
    """The text `python-docs` ends before the first page that goes beyond CHARACTERS."""
    rows = textdata._python_docs_rows()
    few = [row for row, length in zip(rows, accumulate(map(len, rows)), strict=True) if length <= CHARACTERS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(textdata, "_python_docs_rows", lambda: few)
        yield
