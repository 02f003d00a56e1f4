"""Windows of tokens for an evaluation, cut from a text.

The whole text is tokenized as one string (`tokens.token_ids`) and cut into windows. Tokens at the end that do not fill
a window are not used. Windows do not overlap in the GPTQ paper. With a stride shorter than the window they overlap, and
each window scores only the tokens that no earlier window has scored. Except in the first window, at least
`seq_len - stride` tokens precede each scored token.

Letters: W windows, L tokens of a window, T tokens of the text.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmquant.data.tokens import special_ids, token_ids
from llmquant.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def text_tokens(tokenizer: PreTrainedTokenizerBase, text: str | Iterable[str], add_special: bool = True) -> Tensor:
    """Return the tokens of a text of any length, int64 [T].

    text: one string, or its parts in order. add_special: put the tokenizer's special tokens (such as BOS) around the
    text; False for a text that contains them, such as the output of a chat template.
    """
    tokens_T = token_ids(tokenizer, text)
    if not add_special:
        return tokens_T
    start, end = (torch.tensor(ids, dtype=torch.int64) for ids in special_ids(tokenizer))
    return torch.cat([start, tokens_T, end])


def token_windows(
    tokenizer: PreTrainedTokenizerBase, text: str, seq_len: int, num_windows: int | None = None, source: str = "text"
) -> Tensor:
    """Return the windows of a text, int64 [W, L]. The windows do not overlap.

    num_windows: number of windows, from the start of the text; None for all that the text fills. source: name of the
    text in messages. Raises UserError if the text is too short.
    """
    return cut_windows(text_tokens(tokenizer, text), seq_len, num_windows=num_windows, source=source)


def cut_windows(
    tokens_T: Tensor, seq_len: int, stride: int | None = None, num_windows: int | None = None, source: str = "text"
) -> Tensor:
    """Cut int64 tokens [T] into windows of `seq_len` tokens, int64 [W, L].

    stride: tokens from the start of a window to the start of the next; None for seq_len. num_windows: number of
    windows, from the start; None for all that the tokens fill. source: name of the text in messages.
    Raises UserError if there are too few tokens, or if an option is out of range.
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
    requested = num_windows or max(available, 1)
    if available < requested:
        raise UserError(
            f"{source}: {len(tokens_T)} tokens make {available} windows of {seq_len}, but {requested} are requested; "
            f"use fewer --windows, a shorter --seq-len, or more text"
        )
    return tokens_T.unfold(0, seq_len, stride)[:requested]


def first_scored_token(index: int, seq_len: int, stride: int) -> int:
    """Return the position of the first token that window `index` scores.

    It is the first token that has a token before it in the window and that no earlier window has scored.
    """
    return 1 if index == 0 else max(1, seq_len - stride)
