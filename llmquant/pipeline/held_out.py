"""The texts on which a finished model is compared with its original; calibration has seen neither.

The fixed text, `verification_text.txt`, comes with this package and is written for this purpose: prose, dialogue,
code, mathematics, tables, several languages. Its windows are spread evenly over it and depend on the tokenizer and the
context alone, so that two recipes for a model are measured on the same tokens. Beside it come the windows of the
calibration text that were not drawn, where there are some: they are closer to the model's use, but few.

Letters: W windows, L tokens of a window, T tokens of a text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from llmquant.errors import UserError
from llmquant.hub import load_tokenizer
from llmquant.models.skeleton import context_length
from llmquant.pipeline.calibration import CalibrationTokens
from llmquant.pipeline.plan import Plan, check_tokens
from llmquant.tokens import special_ids, token_ids
from llmquant.words import percentage

FIXED_TEXT = "verification_text.txt"
"""The file in this package."""
FIXED_SOURCE = "the fixed text"
"""The name of the fixed text in reports."""
MIN_TOKENS, WINDOW_TOKENS = 4096, 512
"""Predicted tokens of the fixed text, at least; and the length of its windows, where the context is not shorter."""
SPARE_POSITIONS = 8
"""Positions of a context that no window takes: some models number positions from behind the padding token, and
ProphetNet predicts two tokens at a time."""
WINDOW_MULTIPLE = 64
"""Windows of at least this length are rounded down to a multiple of it: block-sparse attention, as in BigBird, pads
others."""
FEW_UNKNOWN, MOST_UNKNOWN = 0.01, 0.5
"""Shares of unknown tokens: above the first the verdict names it, above the second nothing is measured."""
MIN_WINDOWS = 2
"""Windows of each text that are measured even if they take long."""
OPENING_TOKENS, OPENING_CHARACTERS = 24, 40
"""Size of the quotation that names a window."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """A text to measure on."""

    tokens_WL: Tensor
    """int64 [W, L]."""
    source: str
    """FIXED_SOURCE, or the preset or path of the calibration text."""
    openings: tuple[str, ...] = ()
    """The first words of each window. Only the fixed text is quoted: reports must not carry the user's text."""
    note: str = ""
    """What is unusual: fewer windows than intended, or tokens that the tokenizer does not know; else empty."""

    def thinned(self, num_windows: int, note: str) -> HeldOut:
        """That many of the windows, spread evenly."""
        kept = spread(len(self.tokens_WL), num_windows)
        openings = tuple(self.openings[index] for index in kept) if self.openings else ()
        notes = "; ".join(filter(None, (self.note, note)))
        return replace(self, tokens_WL=self.tokens_WL[kept], openings=openings, note=notes)


def held_out(plan: Plan, tokens: CalibrationTokens | None) -> tuple[HeldOut, ...]:
    """The fixed text, and the windows that calibration left over, if any.

    Raises UserError where there is no tokenizer, or one that does not fit the model.
    """
    texts = [fixed_text(plan)]
    if tokens is not None and len(tokens.held_out_WL) and tokens.held_out_WL.shape[1] > 1:
        texts.append(HeldOut(tokens_WL=tokens.held_out_WL, source=tokens.source))
    return tuple(texts)


def fixed_text(plan: Plan) -> HeldOut:
    """The windows of the fixed text for a model and its tokenizer."""
    tokenizer, seq_len = load_tokenizer(plan.path, plan.options.trust_remote_code), window_length(plan.config)
    prefix = torch.tensor(special_ids(tokenizer)[0], dtype=torch.int64)
    room = seq_len - len(prefix)
    tokens_T = token_ids(tokenizer, read_fixed_text())
    available = len(tokens_T) // room if room > 0 else 0
    if available == 0:
        raise UserError(
            f"{plan.path}: a context of {context_length(plan.config)} tokens and a tokenizer that makes "
            f"{len(tokens_T)} of the fixed text leave no window to measure on"
        )
    kept = spread(available, num_windows(seq_len))
    windows = tokens_T[: available * room].view(available, room)[kept]
    check_tokens(plan, windows)
    unknown = (windows == tokenizer.unk_token_id).double().mean().item() if tokenizer.unk_token_id is not None else 0.0
    if unknown > MOST_UNKNOWN:
        raise UserError(
            f"{plan.path}: its tokenizer does not know {percentage(unknown)} of the fixed text, which then says "
            "nothing about the model; check that the tokenizer belongs to it"
        )
    decoded = (tokenizer.decode(window[:OPENING_TOKENS], skip_special_tokens=True) for window in windows)
    return HeldOut(
        tokens_WL=torch.cat([prefix.expand(len(windows), -1), windows], dim=1),
        source=FIXED_SOURCE,
        openings=tuple(_first_words(str(text)) for text in decoded),
        note=f"{percentage(unknown)} of them unknown to the tokenizer" if unknown > FEW_UNKNOWN else "",
    )


def _first_words(text: str) -> str:
    """The beginning of a window, without the rest of the character or word that its start cuts in two."""
    text = text.lstrip("\ufffd")
    whole = text if text[:1].isspace() else text.partition(" ")[2] or text
    return " ".join(whole.split())[:OPENING_CHARACTERS].rstrip()


def read_fixed_text() -> str:
    """The fixed text, as it comes with the package."""
    return files("llmquant.pipeline").joinpath(FIXED_TEXT).read_text(encoding="utf-8")


def window_length(config: Any) -> int:
    """Tokens of a window of the fixed text: WINDOW_TOKENS, or what a shorter context has beside SPARE_POSITIONS, in
    multiples of WINDOW_MULTIPLE."""
    length = int(max(min(WINDOW_TOKENS, context_length(config) - SPARE_POSITIONS), 2))
    return length if length < WINDOW_MULTIPLE else length - length % WINDOW_MULTIPLE


def num_windows(seq_len: int) -> int:
    """Windows of that length in which MIN_TOKENS are predicted."""
    return -(-MIN_TOKENS // (seq_len - 1))


def spread(available: int, wanted: int) -> list[int]:
    """Indices of that many of the available windows, at equal distances; all of them if there are too few."""
    count = min(available, wanted)
    return [index * available // count for index in range(count)]
