"""The tokens that a quantization looks at: windows drawn from a text, and an account of what was used and what was not.

The text is tokenized (`token_ids`) and cut into windows that do not overlap; `num_samples` of them are drawn at random,
by a seed, and the next few of the draw are held out: the finished model is measured on text that it was not fitted
to. Where the tokenizer starts a text with special tokens (a BOS), so does every window: the first token's large
activations are part of what a model sees in use.

Letters: S samples, L tokens of a sample, W held-out windows.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmquant.errors import UserError, first_words
from llmquant.textdata import PRESETS, PYTHON_DOCS, TextRows, load_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AUTO = "auto"
"""The default source: a broad one from the hub, or, where the hub cannot be reached, the one that is always there."""
AUTO_PRESET = "c4"
PIECE_CHARACTERS = 2**18
"""Text that is tokenized at a time."""
_BETWEEN_WORDS = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])")
MIN_HELD_OUT, MAX_HELD_OUT, SAMPLES_PER_HELD_OUT = 2, 8, 32
"""Windows held out: one for so many samples, so that measuring on them costs a few percent of the run; at least two."""


@dataclass(frozen=True, kw_only=True)
class CalibrationTokens:
    """The samples, and where they come from."""

    tokens_SL: Tensor
    """int64 [S, L]."""
    held_out_WL: Tensor
    """int64 [W, L], windows that are not among the samples; fewer than wanted, or none, where the text is too short."""
    source: str
    """Preset or path the text came from."""
    seed: int
    """What the draw was made with."""
    num_rows: int
    """Rows of the source."""
    num_blank_rows: int
    """Rows without text."""
    num_duplicate_rows: int
    """Rows that repeat an earlier one, word for word; they are kept."""
    num_tokens_available: int
    """Tokens of the whole text, special ones at the start not counted."""
    num_tokens_used: int
    """Tokens of that text which are in the samples."""
    num_windows_available: int
    """Windows the samples were drawn from."""
    num_tokens_left_over: int
    """Tokens at the end of the text, too few for a window."""
    incidents: tuple[str, ...] = ()
    """What did not go as asked, in words: to be told at the end, and to fail a strict run."""

    def audit(self) -> dict[str, object]:
        """Everything but the tokens, as plain values."""
        tokens = ("tokens_SL", "held_out_WL")
        counts = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in tokens}
        num_samples, seq_len = self.tokens_SL.shape
        return counts | {"incidents": list(self.incidents), "num_samples": num_samples, "seq_len": seq_len}


def calibration_tokens(
    tokenizer: PreTrainedTokenizerBase, source: str = AUTO, num_samples: int = 128, seq_len: int = 512, seed: int = 0
) -> CalibrationTokens:
    """Draw `num_samples` windows of `seq_len` tokens; the same arguments and text give the same tokens.

    source: what `textdata.load_rows` takes, its train split, or "auto".
    Raises UserError for a source that cannot be read or is too short.
    """
    if num_samples < 1:
        raise UserError(f"samples {num_samples}: at least 1 is needed; use --samples 128")
    text_rows, incidents = _load(source)
    prefix = tokenizer("", verbose=False)["input_ids"]
    window = seq_len - len(prefix)
    if window < 1:
        raise UserError(f"seq_len {seq_len}: no room for text after {len(prefix)} special tokens; use --seq-len 512")
    tokens_T = token_ids(tokenizer, text_rows.text)
    available = len(tokens_T) // window
    if available < num_samples:
        raise UserError(
            f"{text_rows.source}: {len(tokens_T)} tokens make {available} samples of {seq_len}, and {num_samples} are "
            f"asked for; give a longer text, or use --samples {max(available, 1)} or a shorter --seq-len"
        )
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    windows = tokens_T[: available * window].view(available, window)[order[: num_samples + num_held_out(num_samples)]]
    windows = torch.cat([torch.tensor(prefix, dtype=torch.int64).expand(len(windows), len(prefix)), windows], dim=1)
    texts = [row for row in text_rows.rows if row.strip()]
    return CalibrationTokens(
        tokens_SL=windows[:num_samples],
        held_out_WL=windows[num_samples:],
        source=text_rows.source,
        seed=seed,
        num_rows=len(text_rows.rows),
        num_blank_rows=len(text_rows.rows) - len(texts),
        num_duplicate_rows=sum(count - 1 for count in Counter(texts).values()),
        num_tokens_available=len(tokens_T),
        num_tokens_used=num_samples * window,
        num_windows_available=available,
        num_tokens_left_over=len(tokens_T) - available * window,
        incidents=incidents,
    )


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """The tokens of a text without special ones, int64 [T].

    A tokenizer takes up to 150 bytes for every byte of a text, so a long one is given to it in pieces. They are cut
    between two words, in front of the space, where tokenizers cut too; one that starts a text with a space of its own
    does so with each piece.
    """
    pieces, start = [], 0
    while start < len(text):
        cut = _BETWEEN_WORDS.search(text, start + PIECE_CHARACTERS)
        stop = cut.start() if cut else len(text)
        ids = tokenizer(text[start:stop], add_special_tokens=False, verbose=False)["input_ids"]
        pieces.append(torch.tensor(ids, dtype=torch.int64))
        start = stop
    return torch.cat(pieces)


def num_held_out(num_samples: int) -> int:
    """Windows to hold out beside so many samples."""
    return min(max(num_samples // SAMPLES_PER_HELD_OUT, MIN_HELD_OUT), MAX_HELD_OUT)


def is_local(source: str) -> bool:
    """Whether a source can be read without a network."""
    return source != AUTO and source not in PRESETS


def _load(source: str) -> tuple[TextRows, tuple[str, ...]]:
    if source != AUTO:
        return load_rows(source, split="train"), ()
    try:
        return load_rows(AUTO_PRESET, split="train"), ()
    except UserError as error:
        return load_rows(PYTHON_DOCS), (
            f"calibrated on {PYTHON_DOCS}, because {AUTO_PRESET} cannot be read from the Hugging Face hub "
            f"({first_words(error.__cause__ or error)}); for a better fit give --calibration a text like what the "
            f"model will see",
        )
