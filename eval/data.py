"""Text to windows: what an evaluation runs on.

The whole text is tokenized as one string (`tokens.token_ids`) and cut into windows; what is left at the end is not
used. In the GPTQ paper windows do not overlap. With a stride shorter than the window they do, and each window scores
only the tokens that the one before has not: every token then has at least `seq_len - stride` tokens in front of it.

Letters: W windows, L tokens of a window.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmquant.errors import UserError
from llmquant.tokens import special_ids, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def text_tokens(tokenizer: PreTrainedTokenizerBase, text: str | Iterable[str], special: bool = True) -> Tensor:
    """int64 [T]: the tokens of a text of any length, with the special tokens that the tokenizer puts around it (a BOS).

    text: whole, or in parts that follow each other.
    special: False for a text that holds its special tokens already, as a chat template writes them.
    """
    tokens_T = token_ids(tokenizer, text)
    if not special:
        return tokens_T
    start, end = (torch.tensor(ids, dtype=torch.int64) for ids in special_ids(tokenizer))
    return torch.cat([start, tokens_T, end])


def token_windows(
    tokenizer: PreTrainedTokenizerBase, text: str, seq_len: int, num_windows: int | None = None, source: str = "text"
) -> Tensor:
    """int64 [W, L]: the first `num_windows` windows that do not overlap (None: all that the text fills).

    Raises UserError where the text is too short; `source` names it in the message.
    """
    return cut(text_tokens(tokenizer, text), seq_len, num_windows=num_windows, source=source)


def cut(
    tokens_T: Tensor, seq_len: int, stride: int | None = None, num_windows: int | None = None, source: str = "text"
) -> Tensor:
    """int64 [W, L]: the first `num_windows` windows of `seq_len` tokens, each begun `stride` after the one before.

    stride: None for seq_len. num_windows: None for all that the tokens fill.
    Raises UserError where they do not fill them; `source` names the text in the message.
    """
    stride = seq_len if stride is None else stride
    if seq_len < 2:
        raise UserError(f"seq_len {seq_len}: at least 2 tokens are needed to predict one; use --seq-len 2048")
    if not 1 <= stride <= seq_len:
        raise UserError(
            f"stride {stride}: must lie between 1 and the window's {seq_len} tokens, or text would be left out; "
            f"use --stride {seq_len // 2 or 1}"
        )
    if num_windows is not None and num_windows < 1:
        raise UserError(f"windows {num_windows}: at least 1 is needed; leave --windows out to use the whole text")
    available = max(0, (len(tokens_T) - seq_len) // stride + 1)
    wanted = num_windows or max(available, 1)
    if available < wanted:
        raise UserError(
            f"{source}: {len(tokens_T)} tokens make {available} windows of {seq_len}, and {wanted} are asked for; "
            f"use fewer --windows, a shorter --seq-len, or more text"
        )
    return tokens_T.unfold(0, seq_len, stride)[:wanted]


def first_target(index: int, seq_len: int, stride: int) -> int:
    """The first token of window `index` that it scores: the second one, or the first that no window before has seen."""
    return 1 if index == 0 else max(1, seq_len - stride)
