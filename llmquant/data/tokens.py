"""Tokenization of a long text in pieces, so that the tokenizer's memory does not grow with the text.

A tokenizer needs up to 200 bytes for each byte of text, so a text is tokenized in pieces of about PIECE_CHARACTERS. A
piece ends before the space between two words of any script. Text without spaces is cut before a line end or a wide
punctuation mark. Tokenizers split text at these places too, so the tokens equal those of the whole text. A text without
such a place within SEARCHED_CHARACTERS is cut inside a word.

Letters: T tokens of the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

Tokenizer = Callable[..., "dict[str, list[int]]"]
"""The part of the tokenizer interface of transformers that this module uses."""
PIECE_CHARACTERS = 2**16
"""Number of characters of a piece before the search for the end of a word."""
SEARCHED_CHARACTERS = 2**12
"""Number of characters after PIECE_CHARACTERS that are searched for the end of a word."""
_LETTER = r"[^\W_]"
_BETWEEN_WORDS = re.compile(rf"(?<={_LETTER})(?= {_LETTER})")
_AFTER_WORD = re.compile(rf"(?<={_LETTER})(?=[\s\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f])")
# A combining mark is not a word character, so it is not separated from its letter.
_INSIDE_WORD = re.compile(r"(?<=\w)(?=\w)")


def token_ids(tokenizer: Tokenizer, text: str | Iterable[str]) -> Tensor:
    """Return the tokens of a text without special tokens, int64 [T].

    text: the whole text, or consecutive segments of any length.
    """
    tokens, last = [torch.empty(0, dtype=torch.int64)], ""
    for piece in pieces([text] if isinstance(text, str) else text):
        tokens.append(torch.tensor(_continuation_ids(tokenizer, last, piece), dtype=torch.int64))
        last = piece[-1:]
    return torch.cat(tokens)


def special_ids(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the special tokens that a tokenizer adds before a text and after it."""
    bare, whole = _ids(tokenizer, "a"), list(tokenizer("a", verbose=False)["input_ids"])
    starts = range(len(whole) - len(bare) + 1) if bare else ()
    start = next((start for start in starts if whole[start : start + len(bare)] == bare), len(whole))
    return whole[:start], whole[start + len(bare) :]


def pieces(segments: Iterable[str]) -> Iterator[str]:
    """Yield non-empty pieces of a text that can be tokenized separately. segments: consecutive segments of the text."""
    waiting: list[str] = []
    num_waiting = 0
    for segment in segments:
        for start in range(0, len(segment), PIECE_CHARACTERS):
            waiting.append(segment[start : start + PIECE_CHARACTERS])
            num_waiting += len(waiting[-1])
            if num_waiting > PIECE_CHARACTERS + SEARCHED_CHARACTERS:
                *complete, rest = _split("".join(waiting), SEARCHED_CHARACTERS)
                yield from complete
                waiting, num_waiting = [rest], len(rest)
    yield from filter(None, _split("".join(waiting), 0))


def _split(text: str, searched: int) -> list[str]:
    """Split a text into complete pieces, followed by a rest of at most PIECE_CHARACTERS + searched characters."""
    complete, start = [], 0
    while len(text) - start > PIECE_CHARACTERS + searched:
        stop = _piece_end(text, start + PIECE_CHARACTERS)
        complete.append(text[start:stop])
        start = stop
    return [*complete, text[start:]]


def _piece_end(text: str, earliest: int) -> int:
    """Return the first position from `earliest` on at which a text can be cut."""
    for pattern in (_BETWEEN_WORDS, _AFTER_WORD):
        if cut := pattern.search(text, earliest):
            return cut.start()
    is_long = len(text) - earliest > SEARCHED_CHARACTERS
    cut = _INSIDE_WORD.search(text, earliest) if is_long else None
    return cut.start() if cut else len(text)


def _continuation_ids(tokenizer: Tokenizer, last: str, piece: str) -> list[int]:
    """Return the tokens of a piece that follows the character `last`.

    SentencePiece tokenizers add a space before a text. The piece is tokenized together with `last`, which receives this
    space, and the tokens of `last` are removed. If `last` forms a token with the start of the piece, the piece is
    tokenized alone.
    """
    if not last:
        return _ids(tokenizer, piece)
    before, both = _ids(tokenizer, last), _ids(tokenizer, last + piece)
    return both[len(before) :] if both[: len(before)] == before else _ids(tokenizer, piece)


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the tokens of a text without special tokens."""
    # verbose=False suppresses the warning about a text that is longer than the model's context.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
