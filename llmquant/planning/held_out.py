"""Held-out texts: the texts on which the quantized model is compared with the original model.

Calibration uses neither of the two texts. The fixed text, `verification_text.txt`, is part of this package and was
written for this purpose: prose, dialogue, code, mathematics, tables, several languages. Its windows are spaced evenly
and depend only on the tokenizer and the context length, so that two recipes for a model are measured on the same
tokens. The second text consists of the held-out windows of the calibration text, if there are any. These windows are
closer to the intended use, but there are few.

Letters: W windows, L tokens of a window, T tokens of a text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from llmquant.data.calibration import CalibrationTokens
from llmquant.data.tokens import special_ids, token_ids
from llmquant.errors import UserError
from llmquant.hub import load_tokenizer
from llmquant.humanize import format_percentage
from llmquant.models.skeleton import context_length
from llmquant.planning.plan import Plan, check_tokens

FIXED_TEXT = "verification_text.txt"
"""File of the fixed text in this package."""
FIXED_SOURCE = "llmquant's held-out text"
"""Name of the fixed text in reports."""
MIN_TOKENS = 4096
"""Smallest number of predicted tokens of the fixed text."""
WINDOW_TOKENS = 512
"""Length of a window of the fixed text, unless the context of the model is shorter."""
SPARE_POSITIONS = 8
"""Positions of the context that windows leave free: in some models the first position comes after the id of the
padding token, and ProphetNet predicts two tokens at a time."""
WINDOW_MULTIPLE = 64
"""Windows of at least this length are rounded down to a multiple of it, because block-sparse attention, as in BigBird,
pads other lengths."""
NOTED_UNKNOWN_FRACTION = 0.01
"""Fraction of unknown tokens above which the verdict has a note."""
MAX_UNKNOWN_FRACTION = 0.5
"""Fraction of unknown tokens above which the fixed text is not used."""
MIN_WINDOWS = 2
"""Smallest number of windows of each text that are measured, even if this takes long."""
OPENING_TOKENS, OPENING_CHARACTERS = 24, 40
"""Tokens that are decoded for the quotation from a window, and its length in characters."""


@dataclass(frozen=True, kw_only=True)
class HeldOutText:
    """A text on which models are compared, as windows of tokens."""

    tokens_WL: Tensor
    """Token ids of the windows, int64 [W, L]."""
    source: str
    """FIXED_SOURCE, or the preset or path of the calibration text."""
    openings: tuple[str, ...] = ()
    """First words of each window of the fixed text. The user's text is not quoted, because reports must not contain
    it."""
    note: str = ""
    """Note for the report about fewer windows than intended or about unknown tokens; else empty."""

    def with_fewer_windows(self, num_windows: int, note: str) -> HeldOutText:
        """Return the text with `num_windows` evenly spaced windows, and with the note added."""
        indices = evenly_spaced(len(self.tokens_WL), num_windows)
        openings = tuple(self.openings[index] for index in indices) if self.openings else ()
        notes = "; ".join(filter(None, (self.note, note)))
        return replace(self, tokens_WL=self.tokens_WL[indices], openings=openings, note=notes)


def held_out_texts(plan: Plan, tokens: CalibrationTokens | None) -> tuple[HeldOutText, ...]:
    """Return the fixed text, and the held-out windows of the calibration text if there are any.

    Raises UserError if there is no tokenizer, or if the tokenizer does not fit the model.
    """
    texts = [fixed_text(plan)]
    if tokens is not None and len(tokens.held_out_WL) and tokens.held_out_WL.shape[1] > 1:
        texts.append(HeldOutText(tokens_WL=tokens.held_out_WL, source=tokens.source))
    return tuple(texts)


def fixed_text(plan: Plan) -> HeldOutText:
    """Return the windows of the fixed text for a model and its tokenizer.

    Raises UserError if the context is too short for a window, or if most tokens are unknown to the tokenizer.
    """
    tokenizer, seq_len = load_tokenizer(plan.path, plan.options.trust_remote_code), window_length(plan.config)
    prefix = torch.tensor(special_ids(tokenizer)[0], dtype=torch.int64)
    room = seq_len - len(prefix)
    tokens_T = token_ids(tokenizer, read_fixed_text())
    available = len(tokens_T) // room if room > 0 else 0
    if available == 0:
        raise UserError(
            f"{plan.path}: a context of {context_length(plan.config)} tokens, and a tokenizer that gives "
            f"{len(tokens_T)} tokens for {FIXED_SOURCE}, leave no window to measure on"
        )
    indices = evenly_spaced(available, num_windows(seq_len))
    windows = tokens_T[: available * room].view(available, room)[indices]
    check_tokens(plan, windows)
    unknown = (windows == tokenizer.unk_token_id).double().mean().item() if tokenizer.unk_token_id is not None else 0.0
    if unknown > MAX_UNKNOWN_FRACTION:
        raise UserError(
            f"{plan.path}: its tokenizer has no tokens for {format_percentage(unknown)} of {FIXED_SOURCE}, "
            "so it cannot measure the model; check that the tokenizer belongs to it"
        )
    decoded = (tokenizer.decode(window[:OPENING_TOKENS], skip_special_tokens=True) for window in windows)
    return HeldOutText(
        tokens_WL=torch.cat([prefix.expand(len(windows), -1), windows], dim=1),
        source=FIXED_SOURCE,
        openings=tuple(_first_words(str(text)) for text in decoded),
        note=f"{format_percentage(unknown)} of them unknown to the tokenizer"
        if unknown > NOTED_UNKNOWN_FRACTION
        else "",
    )


def _first_words(text: str) -> str:
    """Return the beginning of a window, without the rest of a character or word that the window's start cuts in two."""
    text = text.lstrip("\ufffd")
    whole = text if text[:1].isspace() else text.partition(" ")[2] or text
    return " ".join(whole.split())[:OPENING_CHARACTERS].rstrip()


def read_fixed_text() -> str:
    """Return the fixed text of this package."""
    return files("llmquant.planning").joinpath(FIXED_TEXT).read_text(encoding="utf-8")


def window_length(config: Any) -> int:
    """Return the length of a window of the fixed text in tokens.

    It is WINDOW_TOKENS, or a shorter context less SPARE_POSITIONS, rounded down to a multiple of WINDOW_MULTIPLE.
    """
    length = int(max(min(WINDOW_TOKENS, context_length(config) - SPARE_POSITIONS), 2))
    return length if length < WINDOW_MULTIPLE else length - length % WINDOW_MULTIPLE


def num_windows(seq_len: int) -> int:
    """Return the number of windows of seq_len tokens in which at least MIN_TOKENS tokens are predicted."""
    return -(-MIN_TOKENS // (seq_len - 1))


def evenly_spaced(available: int, requested: int) -> list[int]:
    """Return evenly spaced indices of `requested` out of `available` windows, or all indices if there are too few."""
    count = min(available, requested)
    return [index * available // count for index in range(count)]
