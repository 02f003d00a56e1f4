"""A shorter calibration text: tokenizing all of Python's manual takes longer than the rest of a tiny run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate

import pytest

from llmquant.data import sources as textdata

CHARACTERS = 60_000
"""About 20,000 tokens of the tokenizer of the tiny models."""


@contextmanager
def short_manual() -> Iterator[None]:
    """Shorten the calibration text `python-docs` to its first CHARACTERS, in whole pages."""
    rows = textdata._python_docs_rows()
    first = [row for row, length in zip(rows, accumulate(map(len, rows)), strict=True) if length <= CHARACTERS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(textdata, "_python_docs_rows", lambda: first)
        yield
