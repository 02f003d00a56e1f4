"""Text to windows: what an evaluation runs on.

The whole text is tokenized once, as one string, and cut into windows that do not overlap; what is left at the end is
not used. So does the GPTQ paper.

Letters: W windows, L tokens of a window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmquant.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def text_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """int64 [T]: the tokens of a text of any length, with what the tokenizer puts at the start of a text (a BOS)."""
    # verbose=False: a text longer than the model's context is meant; the tokenizer would warn of it.
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def token_windows(
    tokenizer: PreTrainedTokenizerBase, text: str, seq_len: int, num_windows: int | None = None, source: str = "text"
) -> Tensor:
    """int64 [W, L]: the first `num_windows` windows (None: all that the text fills) of `seq_len` tokens.

    Raises UserError where the text is too short; `source` names it in the message.
    """
    if seq_len < 2:
        raise UserError(f"seq_len {seq_len}: at least 2 tokens are needed to predict one; use --seq-len 2048")
    if num_windows is not None and num_windows < 1:
        raise UserError(f"windows {num_windows}: at least 1 is needed; leave --windows out to use the whole text")
    tokens_T = text_tokens(tokenizer, text)
    available = len(tokens_T) // seq_len
    wanted = num_windows or max(available, 1)
    if available < wanted:
        raise UserError(
            f"{source}: {len(tokens_T)} tokens make {available} windows of {seq_len}, and {wanted} are asked for; "
            f"use fewer --windows, a shorter --seq-len, or more text"
        )
    return tokens_T[: wanted * seq_len].view(wanted, seq_len)
