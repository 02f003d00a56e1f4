"""The tokens of a long text, in memory that does not grow with the text.

A tokenizer takes up to 200 bytes for every byte of a text, so it is given a text in pieces of about PIECE_CHARACTERS.
A piece ends in front of the space between two words of any script; text without spaces is cut in front of a line end or
a wide punctuation mark. Tokenizers cut there too, so the tokens are those of the whole text. Only a text that has none
of these for SEARCHED_CHARACTERS is cut inside a word.

Letters: T tokens of the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

Tokenizer = Callable[..., "dict[str, list[int]]"]
"""A tokenizer of transformers, as far as it is needed here."""
PIECE_CHARACTERS = 2**16
"""Text that is tokenized at a time."""
SEARCHED_CHARACTERS = 2**12
"""Text behind those in which the end of a word is searched."""
_LETTER = r"[^\W_]"
_BETWEEN_WORDS = re.compile(rf"(?<={_LETTER})(?= {_LETTER})")
_BEHIND_WORD = re.compile(rf"(?<={_LETTER})(?=[\s\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f])")
# A combining mark is no word character, so it stays with its letter.
_INSIDE_WORD = re.compile(r"(?<=\w)(?=\w)")


def token_ids(tokenizer: Tokenizer, text: str | Iterable[str]) -> Tensor:
    """The tokens of a text without special ones, int64 [T].

    text: whole, or in parts that follow each other; the parts may be of any length.
    """
    tokens, last = [torch.empty(0, dtype=torch.int64)], ""
    for piece in pieces([text] if isinstance(text, str) else text):
        tokens.append(torch.tensor(_continued(tokenizer, last, piece), dtype=torch.int64))
        last = piece[-1:]
    return torch.cat(tokens)


def special_ids(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts in front of a text and behind it."""
    bare, whole = _ids(tokenizer, "a"), list(tokenizer("a", verbose=False)["input_ids"])
    starts = range(len(whole) - len(bare) + 1) if bare else ()
    start = next((start for start in starts if whole[start : start + len(bare)] == bare), len(whole))
    return whole[:start], whole[start + len(bare) :]


def pieces(parts: Iterable[str]) -> Iterator[str]:
    """Cut a text, given in parts, into pieces that can be tokenized by themselves; none is empty."""
    waiting: list[str] = []
    num_waiting = 0
    for part in parts:
        for start in range(0, len(part), PIECE_CHARACTERS):
            waiting.append(part[start : start + PIECE_CHARACTERS])
            num_waiting += len(waiting[-1])
            if num_waiting > PIECE_CHARACTERS + SEARCHED_CHARACTERS:
                *complete, rest = _split("".join(waiting), SEARCHED_CHARACTERS)
                yield from complete
                waiting, num_waiting = [rest], len(rest)
    yield from filter(None, _split("".join(waiting), 0))


def _split(text: str, searched: int) -> list[str]:
    """Pieces, and what is left: at most PIECE_CHARACTERS + searched, the text in which the next piece may end."""
    found, start = [], 0
    while len(text) - start > PIECE_CHARACTERS + searched:
        stop = _piece_end(text, start + PIECE_CHARACTERS)
        found.append(text[start:stop])
        start = stop
    return [*found, text[start:]]


def _piece_end(text: str, earliest: int) -> int:
    for pattern in (_BETWEEN_WORDS, _BEHIND_WORD):
        if cut := pattern.search(text, earliest):
            return cut.start()
    is_long = len(text) - earliest > SEARCHED_CHARACTERS
    cut = _INSIDE_WORD.search(text, earliest) if is_long else None
    return cut.start() if cut else len(text)


def _continued(tokenizer: Tokenizer, last: str, piece: str) -> list[int]:
    """The tokens of a piece that follows the character `last`.

    SentencePiece tokenizers put a space in front of a text. The character takes that space, and its tokens are removed.
    A character that forms a token with the beginning of the piece is left out.
    """
    if not last:
        return _ids(tokenizer, piece)
    before, both = _ids(tokenizer, last), _ids(tokenizer, last + piece)
    return both[len(before) :] if both[: len(before)] == before else _ids(tokenizer, piece)


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    # verbose=False: a text longer than the model's context is meant; the tokenizer would warn of it.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
