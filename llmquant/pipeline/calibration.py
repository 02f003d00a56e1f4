"""The tokens that a quantization looks at: windows drawn from a text, and an account of what was used and what was not.

The text is tokenized (`tokens.token_ids`) and cut into windows that do not overlap; `num_samples` of them are drawn at
random, by a seed, and the next few of the draw are held out: the finished model is measured on text that it was not
fitted to. Where the tokenizer starts a text with special tokens (a BOS), so does every window: the first token's large
activations are part of what a model sees in use.

Letters: S samples, L tokens of a sample, W held-out windows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmquant.errors import UserError, first_words
from llmquant.textdata import PRESETS, PYTHON_DOCS, TextRows, check_preset, load_rows
from llmquant.tokens import special_ids, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AUTO = "auto"
"""The default source: a broad one from the hub, or, where the hub cannot be reached, the one that is always there."""
AUTO_PRESET = "c4"
MIN_HELD_OUT, MAX_HELD_OUT, SAMPLES_PER_HELD_OUT = 2, 8, 32
"""Windows held out: one for so many samples, so that measuring on them costs a few percent of the run; at least two."""
MANY_REPEATED, MANY_UNKNOWN, MANY_TOKENS = 0.5, 0.01, 1.5
"""From which share of repeated characters, share of unknown tokens, and tokens of a character on a text is remarked on.
English and Chinese take 0.2 to 0.8 tokens a character where a tokenizer knows them, and 1 to 3 where it does not."""


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
    remarks: tuple[str, ...] = ()
    """What is worth knowing about the text, in words."""

    def audit(self) -> dict[str, object]:
        """Everything but the tokens, as plain values."""
        tokens = ("tokens_SL", "held_out_WL")
        counts = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in tokens}
        num_samples, seq_len = self.tokens_SL.shape
        words = {"incidents": list(self.incidents), "remarks": list(self.remarks)}
        return counts | words | {"num_samples": num_samples, "seq_len": seq_len}


def calibration_tokens(
    tokenizer: PreTrainedTokenizerBase, source: str = AUTO, num_samples: int = 128, seq_len: int = 512, seed: int = 0
) -> CalibrationTokens:
    """Draw `num_samples` windows of `seq_len` tokens; the same arguments and text give the same tokens.

    source: what `textdata.load_rows` takes, its train split, or "auto".
    Raises UserError for a source that cannot be read or is too short.
    """
    if num_samples < 1:
        raise UserError(f"samples {num_samples}: at least 1 is needed; use --samples 128")
    prefix, _ = special_ids(tokenizer)
    window = seq_len - len(prefix)
    if window < 1:
        raise UserError(f"seq_len {seq_len}: no room for text after {len(prefix)} special tokens; use --seq-len 512")
    text_rows, incidents = _load(source)
    tokens_T = token_ids(tokenizer, text_rows.parts())
    available = len(tokens_T) // window
    if available < num_samples:
        fewer = f", or use --samples {available}" if available else ""
        name = text_rows.source + (f" (in place of {AUTO_PRESET}, which cannot be read)" if incidents else "")
        raise UserError(
            f"{name}: {len(tokens_T)} tokens make {available} samples of {seq_len}, and {num_samples} are "
            f"asked for; give a longer text{fewer} or a shorter --seq-len"
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
        incidents=incidents,
        remarks=(*text_rows.remarks, *_remarks(tokenizer, tokens_T, rows)),
    )


def preview(
    tokenizer: PreTrainedTokenizerBase, source: str = AUTO, num_samples: int = 128, seq_len: int = 512, seed: int = 0
) -> tuple[dict[str, Any], Tensor | None]:
    """The account of what `calibration_tokens` would draw (`CalibrationTokens.audit`), and its tokens_SL.

    A local text is drawn. Of a text of the hub only the first row is fetched: the account is then without counts, and
    there are no tokens. Raises UserError as `calibration_tokens` does.
    """
    preset = AUTO_PRESET if source == AUTO else source
    if preset in PRESETS:
        try:
            check_preset(preset, split="train")
            return {"source": preset, "num_samples": num_samples, "seq_len": seq_len}, None
        except UserError:
            if source != AUTO:
                raise
    drawn = calibration_tokens(tokenizer, source, num_samples, seq_len, seed)
    return drawn.audit(), drawn.tokens_SL


@dataclass(frozen=True)
class RowCounts:
    """What the rows of a text are."""

    num_blank: int
    """Rows without text."""
    num_repeated: int
    """Rows that repeat an earlier one, word for word."""
    num_characters: int
    """Characters of all rows."""
    num_repeated_characters: int
    """Characters of those that repeat an earlier one."""


def count_rows(text_rows: TextRows) -> RowCounts:
    """Count what is blank and what is repeated."""
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
    """Windows to hold out beside so many samples."""
    return min(max(num_samples // SAMPLES_PER_HELD_OUT, MIN_HELD_OUT), MAX_HELD_OUT)


def _remarks(tokenizer: PreTrainedTokenizerBase, tokens_T: Tensor, rows: RowCounts) -> Iterator[str]:
    """What makes a text a poor sample of the language that the model will see."""
    repeated = rows.num_repeated_characters / rows.num_characters
    if repeated >= MANY_REPEATED:
        yield f"{repeated:.0%} of the text are rows that repeat an earlier one; a more varied text calibrates better"
    unknown = tokenizer.unk_token_id
    share = 0.0 if unknown is None else (tokens_T == unknown).double().mean().item()
    if share >= MANY_UNKNOWN:
        yield f"{share:.0%} of the tokens are {tokenizer.unk_token}: the tokenizer does not know this script"
    if (ratio := len(tokens_T) / rows.num_characters) >= MANY_TOKENS:
        yield f"{ratio:.1f} tokens per character: the tokenizer hardly knows this script, or this is not text"


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
