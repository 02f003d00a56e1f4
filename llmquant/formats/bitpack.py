"""Pack codes of b bits into int32 words and unpack them, as a little-endian bit stream along one dimension.

Code i of the stream occupies bits b*i … b*i + b-1, where bit 0 is the least significant bit of word 0. With b = 2, 4, 8
a word holds 32/b whole codes; with b = 3, 32 codes fill 3 words, and codes 10 and 21 straddle two of them. GPTQ and
compressed-tensors both use this stream: codes along in_features, zero-points along out_features.

A period is the shortest run of codes that ends on a word boundary. The loop runs over the codes of one period. Each
iteration is a strided operation on the whole tensor, and its temporaries have the size of the slice. So the peak memory
is close to input plus output.

Letters: L codes along the packed dimension, W = ceil(L*b/32) words; other dimensions pass through.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WORD_BITS = 32


def num_words(length: int, bits: int) -> int:
    """Return the number of words that hold `length` codes: ceil(length * bits / 32)."""
    return -(-length * bits // WORD_BITS)


def _period(bits: int) -> tuple[int, int]:
    """Return (codes, words) of the shortest run of codes that fills whole words: (8, 1) for 4 bits, (32, 3) for 3."""
    common = math.gcd(bits, WORD_BITS)
    return WORD_BITS // common, bits // common


def pack_bits(codes: Tensor, bits: int, dim: int) -> Tensor:
    """Pack codes (uint8, L along dim, values 0 … 2**bits - 1) into int32 words, W along dim. Unused bits are 0."""
    assert codes.dtype == torch.uint8, codes.dtype
    shape = list(codes.shape)
    length = shape[dim]
    shape[dim] = num_words(length, bits)
    words = torch.zeros(shape, dtype=torch.int32, device=codes.device)
    codes_L, words_W = codes.movedim(dim, -1), words.movedim(dim, -1)
    period_codes, period_words = _period(bits)
    for i in range(min(period_codes, length)):
        code = codes_L[..., i::period_codes].int()
        word, shift = divmod(i * bits, WORD_BITS)
        # A shift into bit 31 makes the word negative, which is the correct bit pattern.
        words_W[..., word::period_words][..., : code.shape[-1]] |= code << shift
        if shift + bits > WORD_BITS:
            words_W[..., word + 1 :: period_words][..., : code.shape[-1]] |= code >> (WORD_BITS - shift)
    return words


def unpack_bits(words: Tensor, bits: int, dim: int, length: int) -> Tensor:
    """Unpack the first `length` codes (uint8) of int32 words; the inverse of `pack_bits`."""
    assert words.dtype == torch.int32, words.dtype
    assert words.shape[dim] == num_words(length, bits), (tuple(words.shape), dim, length, bits)
    shape = list(words.shape)
    shape[dim] = length
    codes = torch.empty(shape, dtype=torch.uint8, device=words.device)
    codes_L, words_W = codes.movedim(dim, -1), words.movedim(dim, -1)
    period_codes, period_words = _period(bits)
    for i in range(min(period_codes, length)):
        out = codes_L[..., i::period_codes]
        word, shift = divmod(i * bits, WORD_BITS)
        low_bits = min(bits, WORD_BITS - shift)
        # The right shift copies the sign bit downwards; the mask removes those copies.
        code = (words_W[..., word::period_words][..., : out.shape[-1]] >> shift) & (2**low_bits - 1)
        if low_bits < bits:
            high = words_W[..., word + 1 :: period_words][..., : out.shape[-1]] & (2 ** (bits - low_bits) - 1)
            code |= high << low_bits
        out.copy_(code)
    return codes
