"""Packed words are a bit stream: bit i of the stream is bit i % 32 of word i // 32. Unpacking inverts packing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmquant.formats.bitpack import num_words, pack_bits, unpack_bits
from llmquant.spec import SUPPORTED_BITS


def words_by_hand(codes: list[int], bits: int) -> list[int]:
    """Pack by the definition: all codes in one big integer, cut into 32-bit words."""
    stream = sum(code << (bits * i) for i, code in enumerate(codes))
    words = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(codes) * bits // 32))]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@pytest.mark.slow
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@given(data=st.data())
def test_packed_words_are_the_bit_stream(bits, data):
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=100))
    packed = pack_bits(torch.tensor(codes, dtype=torch.uint8), bits, dim=0)
    assert packed.tolist() == words_by_hand(codes, bits)
    assert unpack_bits(packed, bits, 0, len(codes)).tolist() == codes


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_packing_along_either_dimension_is_the_same_stream(bits, dim):
    codes = torch.randint(0, 2**bits, (37, 41), dtype=torch.uint8)
    packed = pack_bits(codes, bits, dim)
    length = codes.shape[dim]
    assert packed.shape[dim] == num_words(length, bits)
    for line, words in zip(codes.movedim(dim, -1), packed.movedim(dim, -1), strict=True):
        assert words.tolist() == words_by_hand(line.tolist(), bits)
    assert torch.equal(unpack_bits(packed, bits, dim, length), codes)


def test_codes_that_straddle_words_keep_all_bits():
    codes = torch.zeros(32, dtype=torch.uint8)
    codes[10] = codes[21] = 7
    assert [word & 0xFFFFFFFF for word in pack_bits(codes, 3, 0).tolist()] == [3 << 30, 1 | (1 << 31), 3]
    assert torch.equal(unpack_bits(pack_bits(codes, 3, 0), 3, 0, 32), codes)
