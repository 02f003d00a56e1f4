"""Calibration tokens: windows drawn at random from a text, and counts of the text that was used and left over.

The text is tokenized (`tokens.token_ids`) and cut into windows that do not overlap. `num_samples` windows are drawn at
random with a seed. The next few windows of the draw are held out, so that the finished model can be measured on text
that it was not fitted to. If the tokenizer starts a text with special tokens (BOS), every window starts with them too,
because the large activations of the first token are part of normal use.

Letters: S samples, L tokens of a sample, W held-out windows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmquant.data.sources import PRESETS, PYTHON_DOCS, TextRows, check_preset, load_rows
from llmquant.data.tokens import special_ids, token_ids
from llmquant.errors import UserError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AUTO_SOURCE = "auto"
"""The default source: AUTO_PRESET, or `sources.PYTHON_DOCS` if the Hugging Face hub cannot be reached."""
AUTO_PRESET = "c4"
"""The preset that AUTO_SOURCE reads from the hub: web text on many subjects."""
SAMPLES_PER_HELD_OUT = 32
"""Number of samples per held-out window. Measuring on the held-out windows then takes a few percent of the run."""
MIN_HELD_OUT, MAX_HELD_OUT = 2, 8
"""Smallest and largest number of held-out windows."""
REPEATED_FRACTION = 0.5
"""A note is written if at least this fraction of the characters is in repeated rows."""
UNKNOWN_FRACTION = 0.01
"""A note is written if at least this fraction of the tokens is unknown."""
TOKENS_PER_CHARACTER = 1.5
"""A note is written if a text has at least this number of tokens per character. English and Chinese have 0.2 to 0.8
tokens per character with a tokenizer that was trained on them, and 1 to 3 with another one."""


@dataclass(frozen=True, kw_only=True)
class CalibrationTokens:
    """The calibration samples, the held-out windows, and counts of the text that they were drawn from."""

    tokens_SL: Tensor
    """Token ids of the calibration samples, int64 [S, L]."""
    held_out_WL: Tensor
    """Token ids of windows that are not among the samples, int64 [W, L]. A short text gives fewer windows, or none."""
    source: str
    """Preset or path that the text came from."""
    seed: int
    """Seed of the random draw of windows."""
    num_rows: int
    """Number of rows of the source."""
    num_blank_rows: int
    """Number of rows without text."""
    num_duplicate_rows: int
    """Number of rows that repeat an earlier row exactly. They are part of the text."""
    num_tokens_available: int
    """Tokens of the whole text, without special tokens at its start."""
    num_tokens_used: int
    """Tokens of the text that are in the samples."""
    num_windows_available: int
    """Number of windows that the samples were drawn from."""
    num_tokens_left_over: int
    """Tokens at the end of the text that do not fill a window."""
    fallbacks: tuple[str, ...] = ()
    """Departures from the requested calibration, one string each. The report lists them, and a strict run fails."""
    notes: tuple[str, ...] = ()
    """Observations about the text that do not fail a run, one string each."""

    def summary(self) -> dict[str, object]:
        """Return everything except the tokens as plain values, and the shape of the samples."""
        tokens = ("tokens_SL", "held_out_WL")
        counts = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in tokens}
        num_samples, seq_len = self.tokens_SL.shape
        words = {"fallbacks": list(self.fallbacks), "notes": list(self.notes)}
        return counts | words | {"num_samples": num_samples, "seq_len": seq_len}


def calibration_tokens(
    tokenizer: PreTrainedTokenizerBase,
    source: str = AUTO_SOURCE,
    num_samples: int = 128,
    seq_len: int = 512,
    seed: int = 0,
) -> CalibrationTokens:
    """Draw `num_samples` windows of `seq_len` tokens. The same arguments and text give the same tokens.

    source: "auto", or a source of `sources.load_rows`, whose train split is read.
    Raises UserError if the source cannot be read or is too short.
    """
    if num_samples < 1:
        raise UserError(f"samples {num_samples}: at least 1 is needed; use --samples 128")
    prefix, _ = special_ids(tokenizer)
    window = seq_len - len(prefix)
    if window < 1:
        raise UserError(f"seq_len {seq_len}: no room for text after {len(prefix)} special tokens; use --seq-len 512")
    text_rows, fallbacks = _load(source)
    tokens_T = token_ids(tokenizer, text_rows.segments())
    available = len(tokens_T) // window
    if available < num_samples:
        fewer = f", or use --samples {available}" if available else ""
        name = text_rows.source + (f" (in place of {AUTO_PRESET}, which cannot be read)" if fallbacks else "")
        raise UserError(
            f"{name}: {len(tokens_T)} tokens make {available} samples of {seq_len}, and {num_samples} are "
            f"requested; give a longer text{fewer} or a shorter --seq-len"
        )
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    windows = tokens_T[: available * window].view(available, window)[order[: num_samples + num_held_out(num_samples)]]
    windows = torch.cat([torch.tensor(prefix, dtype=torch.int64).expand(len(windows), len(prefix)), windows], dim=1)
    rows = count_rows(text_rows)
    return CalibrationTokens(
        tokens_SL=windows[:num_samples],
        held_out_WL=windows[num_samples:],
        source=text_rows.source,
        seed=seed,
        num_rows=len(text_rows.rows),
        num_blank_rows=rows.num_blank,
        num_duplicate_rows=rows.num_repeated,
        num_tokens_available=len(tokens_T),
        num_tokens_used=num_samples * window,
        num_windows_available=available,
        num_tokens_left_over=len(tokens_T) - available * window,
        fallbacks=fallbacks,
        notes=(*text_rows.notes, *_text_notes(tokenizer, tokens_T, rows)),
    )


def preview_calibration(
    tokenizer: PreTrainedTokenizerBase,
    source: str = AUTO_SOURCE,
    num_samples: int = 128,
    seq_len: int = 512,
    seed: int = 0,
) -> tuple[dict[str, Any], Tensor | None]:
    """Return `CalibrationTokens.summary` and `tokens_SL` of the samples that `calibration_tokens` would draw.

    All samples of a local text are drawn. Only the first row of a text on the hub is fetched, so its summary has no
    counts and its tokens are None. Raises UserError for the same reasons as `calibration_tokens`.
    """
    preset = AUTO_PRESET if source == AUTO_SOURCE else source
    if preset in PRESETS:
        try:
            check_preset(preset, split="train")
            return {"source": preset, "num_samples": num_samples, "seq_len": seq_len}, None
        except UserError:
            if source != AUTO_SOURCE:
                raise
    drawn = calibration_tokens(tokenizer, source, num_samples, seq_len, seed)
    return drawn.summary(), drawn.tokens_SL


@dataclass(frozen=True)
class RowCounts:
    """Counts of the rows of a text and of their characters."""

    num_blank: int
    """Number of rows without text."""
    num_repeated: int
    """Number of rows that repeat an earlier row exactly."""
    num_characters: int
    """Characters of all rows."""
    num_repeated_characters: int
    """Characters of the rows that repeat an earlier row."""


def count_rows(text_rows: TextRows) -> RowCounts:
    """Count the blank and the repeated rows of a text, and their characters."""
    seen: set[str] = set()
    num_blank = num_repeated = num_characters = num_repeated_characters = 0
    for row in text_rows.rows:
        num_characters += len(row)
        if not row.strip():
            num_blank += 1
        elif row in seen:
            num_repeated += 1
            num_repeated_characters += len(row)
        else:
            seen.add(row)
    return RowCounts(num_blank, num_repeated, num_characters, num_repeated_characters)


def num_held_out(num_samples: int) -> int:
    """Return the number of windows to hold out for a number of samples."""
    return min(max(num_samples // SAMPLES_PER_HELD_OUT, MIN_HELD_OUT), MAX_HELD_OUT)


def _text_notes(tokenizer: PreTrainedTokenizerBase, tokens_T: Tensor, rows: RowCounts) -> Iterator[str]:
    """Yield a note for each property that makes a text a poor sample of ordinary input."""
    repeated = rows.num_repeated_characters / rows.num_characters
    if repeated >= REPEATED_FRACTION:
        yield f"{repeated:.0%} of the text is in rows that repeat an earlier row; a more varied text calibrates better"
    unknown = tokenizer.unk_token_id
    fraction = 0.0 if unknown is None else (tokens_T == unknown).double().mean().item()
    if fraction >= UNKNOWN_FRACTION:
        yield f"{fraction:.0%} of the tokens are {tokenizer.unk_token}: the tokenizer has no tokens for this script"
    if (ratio := len(tokens_T) / rows.num_characters) >= TOKENS_PER_CHARACTER:
        yield f"{ratio:.1f} tokens per character: the tokenizer has few tokens for this script, or this is not text"


def _load(source: str) -> tuple[TextRows, tuple[str, ...]]:
    """Return the rows of a source, and its fallback if "auto" cannot read its preset."""
    if source != AUTO_SOURCE:
        return load_rows(source, split="train"), ()
    try:
        return load_rows(AUTO_PRESET, split="train"), ()
    except UserError as error:
        return load_rows(PYTHON_DOCS), (
            f"calibrated on {PYTHON_DOCS}, because {AUTO_PRESET} cannot be read from the Hugging Face hub "
            f"({one_line(error.__cause__ or error)}); for a better fit, give "
            f"--calibration a text that is similar to the intended input",
        )
