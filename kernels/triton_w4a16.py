"""Two Triton kernels on one layout: y = x @ W.T straight from 4-bit codes, and W itself.

The layout is the operand a Hopper tensor core reads from registers. The product is taken as y.T = W @ x.T, so that
the out_features fill the 64 rows of a `wgmma` and the tokens its width. Thread t of a quad (t % 4 = l) needs, in each
row of a 64 x 128 tile, the columns 8m + 2l + {0, 1} for m = 0 … 15: thirty-two codes, sixteen bytes, one load:

    word[n, 4l + i], nibble p + 4e   is   W[n, 8(4i + p) + 2l + e]      l, i, p in 0 … 3; e in 0, 1

Nibbles p and p + 4 are two neighbours in K and lie sixteen bits apart, so `(word >> 4p) & 0x000F000F | MAGIC` is a
finished register: MAGIC has the bits of 128 (bfloat16) or 1024 (float16), and the code falls into its lowest mantissa
bits. Nothing is shuffled and no dequantized weight goes through shared memory. On other GPUs the same program is
correct, and slower.

Word i of a thread covers the columns 32i … 32i + 31, which is why groups of 32, 64 and 128 differ only in how often a
scale is repeated.

Scale and zero travel in one 32-bit word, because asynchronous copies move at least four bytes: the low half has the
bits of the scale, the high half those of -(128 + zero) or -(1024 + zero). The subtraction is exact.

Letters: T tiles of 128 slots along K, NP out_features rounded up to 64, B blocks (scales) per tile, P planes (2 for
8-bit codes: high and low nibbles as two weights over the same x).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _magic(word, shift: tl.constexpr, MAGIC: tl.constexpr, INTERPRET: tl.constexpr):
    """Two codes of each word as two floats MAGIC + code. One three-input logic operation, which the compiler misses."""
    shifted = word >> shift
    if INTERPRET:
        return (shifted & 0x000F000F) | MAGIC
    else:
        return tl.inline_asm_elementwise(
            f"lop3.b32 $0, $1, 0x000F000F, {MAGIC}, 0xea;", "=r,r", [shifted], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def _round_bits(value, BF16: tl.constexpr):
    """float32 -> the bits of bfloat16 or float16, to nearest even, in an int32. Only the interpreter, whose own cast to
    bfloat16 cuts off, comes here."""
    if BF16:
        bits = value.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF
    else:
        return value.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def _half(word, BF16: tl.constexpr):
    """The low half of each word as bfloat16 or float16."""
    return (word & 0xFFFF).to(tl.int16).to(tl.bfloat16 if BF16 else tl.float16, bitcast=True)


@triton.jit
def _fma2(a, b, c, BF16: tl.constexpr, INTERPRET: tl.constexpr):
    """a * b + c on both halves of int32 words. On whole words: once they are split, the compiler joins them again with
    one permutation per operation. fma, because it is the one form that every GPU from sm_80 has in bfloat16."""
    a, b = tl.broadcast(a, b)
    a, c = tl.broadcast(a, c)
    if INTERPRET:
        low = _half(a, BF16).to(tl.float32) * _half(b, BF16).to(tl.float32) + _half(c, BF16).to(tl.float32)
        high = _half(a >> 16, BF16).to(tl.float32) * _half(b >> 16, BF16).to(tl.float32)
        high += _half(c >> 16, BF16).to(tl.float32)
        return _round_bits(low, BF16) | (_round_bits(high, BF16) << 16)
    else:
        TYPE: tl.constexpr = "bf16x2" if BF16 else "f16x2"
        return tl.inline_asm_elementwise(
            f"fma.rn.{TYPE} $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def _twice(half):
    """The low half of each word in both halves."""
    return (half & 0xFFFF) | (half << 16)


@triton.jit
def _over_words(block, BN: tl.constexpr, B: tl.constexpr):
    """[BN, B] -> [BN, 16]: what belongs to each word of a row (word 4l + i covers 32 columns from 32i)."""
    if B == 1:
        return block
    else:
        block = tl.broadcast_to(tl.reshape(block, (BN, 1, B, 1)), (BN, 4, B, 4 // B))
        return tl.reshape(block, (BN, 16))


@triton.jit
def _unpack(
    word, meta, BN: tl.constexpr, B: tl.constexpr, SCALE: tl.constexpr, BF16: tl.constexpr, INTERPRET: tl.constexpr
):
    """word int32 [BN, 16], meta int32 [BN, B] -> [BN, 128] in columns' order: code - zero, times the scale if SCALE."""
    MAGIC: tl.constexpr = 0x43004300 if BF16 else 0x64006400
    ONE: tl.constexpr = 0x3F803F80 if BF16 else 0x3C003C00
    MINUS_ZERO: tl.constexpr = -0x7FFF8000  # 0x80008000; the sum with it keeps the sign of a zero
    one = tl.full((1, 1), ONE, tl.int32)
    minus_zero = tl.full((1, 1), MINUS_ZERO, tl.int32)
    negative_zero_point = _over_words(_twice(meta >> 16), BN, B)
    scale = _over_words(_twice(meta), BN, B)
    t0 = _fma2(_magic(word, 0, MAGIC, INTERPRET), one, negative_zero_point, BF16, INTERPRET)
    t1 = _fma2(_magic(word, 4, MAGIC, INTERPRET), one, negative_zero_point, BF16, INTERPRET)
    t2 = _fma2(_magic(word, 8, MAGIC, INTERPRET), one, negative_zero_point, BF16, INTERPRET)
    t3 = _fma2(_magic(word, 12, MAGIC, INTERPRET), one, negative_zero_point, BF16, INTERPRET)
    if SCALE:
        t0 = _fma2(t0, scale, minus_zero, BF16, INTERPRET)
        t1 = _fma2(t1, scale, minus_zero, BF16, INTERPRET)
        t2 = _fma2(t2, scale, minus_zero, BF16, INTERPRET)
        t3 = _fma2(t3, scale, minus_zero, BF16, INTERPRET)
    pairs = tl.join(tl.join(t0, t2), tl.join(t1, t3))  # [BN, 16, p % 2, p // 2] after the joins: p = 2 * axis2 + axis3
    value = tl.join(_half(pairs, BF16), _half(pairs >> 16, BF16)).reshape(BN, 4, 4, 2, 2, 2)  # n, l, i, p1, p0, e
    return value.permute(0, 2, 3, 4, 1, 5).reshape(BN, 128)


@triton.jit(do_not_specialize=["M"])
def w4a16_kernel(
    x_ptr,  # bf16/fp16 [M, K], contiguous
    w_ptr,  # int32 [NP/64, P*T, 64, 16], contiguous
    meta_ptr,  # int32 [P*T, NP, B], contiguous
    bias_ptr,  # bf16/fp16 [N], or anything where HAS_BIAS is false
    y_ptr,  # bf16/fp16 [M, N], contiguous
    partial_ptr,  # fp32 [parts, M, N], or anything where there is one part
    done_ptr,  # int32, one zero per tile of y; zero again when the kernel ends
    M,
    N,
    NP,
    K,
    T,
    RAGGED_K: tl.constexpr,  # whether K < 128 T
    P: tl.constexpr,
    B: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLIT_K: tl.constexpr,  # whether there are several parts
    POST: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BF16: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One tile of y: BM tokens, BN out_features, one part of K. Grid: (tiles of M, tiles of N, parts).

    Sizes are not compiled in: one compilation serves every layer of a model that shares a grid and a configuration.

    POST scales the float32 product of each tile of 128 slots (few tokens; exact weights; needs B = 1); otherwise
    the weights are scaled before the product and rounded as a dense weight would be.
    """
    tile_m = tl.program_id(0)
    tile_n = tl.program_id(1)
    part = tl.program_id(2)
    rows_n = tile_n * BN + tl.arange(0, BN)
    rows_m = tile_m * BM + tl.arange(0, BM)
    slot = tl.arange(0, 128)
    num_parts = tl.num_programs(2)
    per_part = tl.cdiv(P * T, num_parts)
    first = part * per_part
    last = tl.minimum(first + per_part, P * T)
    live_m = rows_m < M
    w_ptrs = w_ptr + ((rows_n // 64) * (P * T * 1024) + (rows_n % 64) * 16)[:, None] + tl.arange(0, 16)[None, :]
    meta_ptrs = meta_ptr + rows_n[:, None] * B + tl.arange(0, B)[None, :]
    x_ptrs = x_ptr + rows_m.to(tl.int64)[None, :] * K + slot[:, None]
    sums = tl.zeros((BN, BM), tl.float32)
    for tile in tl.range(first, last, num_stages=STAGES):
        tile_x = tile
        if P > 1:  # the second plane reads x again; no remainder, which would be a division
            tile_x = tl.where(tile >= T, tile - T, tile)
        live_x = live_m[None, :]
        if RAGGED_K:
            live_x = live_x & (tile_x * 128 + slot < K)[:, None]
        # Weights are read once: let them leave the cache first, x stays.
        word = tl.load(w_ptrs + tile * 1024, eviction_policy="evict_first")
        meta = tl.load(meta_ptrs + tile * (NP * B))
        x = tl.load(x_ptrs + tile_x * 128, mask=live_x, other=0.0)
        weight = _unpack(word, meta, BN, B, not POST, BF16, INTERPRET)
        if INTERPRET:  # the interpreter has no bfloat16 arithmetic
            weight = weight.to(tl.float32)
            x = x.to(tl.float32)
        if POST:
            sums += tl.dot(weight, x) * _half(meta, BF16).to(tl.float32)
        else:
            sums = tl.dot(weight, x, sums)
    live = live_m[None, :] & (rows_n < N)[:, None]
    offsets = rows_m.to(tl.int64)[None, :] * N + rows_n[:, None]
    if SPLIT_K:
        # Every part leaves its sums; whoever comes last adds them in the order of the parts. No float atomics: two runs
        # agree to the bit. Through the second-level cache, since the first is not coherent between processors.
        plane = M * N  # split-K serves few rows: the parts together stay below 2**31 sums
        tl.store(partial_ptr + part * plane + offsets, sums, mask=live, cache_modifier=".cg")
        tl.debug_barrier()
        tile_y = tile_n * tl.num_programs(0) + tile_m
        arrived = tl.atomic_add(done_ptr + tile_y, 1, sem="acq_rel", scope="gpu")
        if arrived == num_parts - 1:
            total = tl.zeros((BN, BM), tl.float32)
            for other in tl.range(0, num_parts):
                total += tl.load(partial_ptr + other * plane + offsets, mask=live, other=0.0, cache_modifier=".cg")
            _store(y_ptr, bias_ptr, offsets, total, rows_n, live, N, HAS_BIAS, BF16, INTERPRET)
            tl.store(done_ptr + tile_y, 0)
    else:
        _store(y_ptr, bias_ptr, offsets, sums, rows_n, live, N, HAS_BIAS, BF16, INTERPRET)


@triton.jit
def _store(
    y_ptr, bias_ptr, offsets, sums, rows_n, live, N, HAS_BIAS: tl.constexpr, BF16: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Add the bias in float32, round once, store."""
    if HAS_BIAS:
        sums += tl.load(bias_ptr + rows_n, mask=rows_n < N, other=0.0).to(tl.float32)[:, None]
    if INTERPRET:
        tl.store(y_ptr + offsets, _half(_round_bits(sums, BF16), BF16), mask=live)
    else:
        tl.store(y_ptr + offsets, sums.to(y_ptr.dtype.element_ty), mask=live)


@triton.jit
def dequantize_kernel(
    w_ptr,  # int32 [NP/64, P*T, 64, 16]
    meta_ptr,  # int32 [P*T, NP, B]
    out_ptr,  # bf16/fp16 [N, K]
    N,
    NP,
    K,
    T,
    P: tl.constexpr,
    B: tl.constexpr,
    BF16: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One 64 x 128 tile of the dense weight: computed in float32, rounded once."""
    tile_n = tl.program_id(0)
    tile_k = tl.program_id(1)
    rows_n = tile_n * 64 + tl.arange(0, 64)
    columns = tile_k * 128 + tl.arange(0, 128)
    dense = tl.zeros((64, 128), tl.float32)
    for plane in tl.static_range(P):
        tile = plane * T + tile_k
        base = (tile_n.to(tl.int64) * (P * T) + tile) * 1024
        word = tl.load(w_ptr + base + tl.arange(0, 64)[:, None] * 16 + tl.arange(0, 16)[None, :])
        meta = tl.load(meta_ptr + (tile * NP + rows_n[:, None]) * B + tl.arange(0, B)[None, :])
        step = _unpack(word, meta, 64, B, False, BF16, INTERPRET).to(tl.float32)
        scale = tl.broadcast_to(_half(meta, BF16).to(tl.float32)[:, :, None], (64, B, 128 // B))
        dense += step * tl.reshape(scale, (64, 128))
    offsets = rows_n.to(tl.int64)[:, None] * K + columns[None, :]
    live = (rows_n < N)[:, None] & (columns < K)[None, :]
    if INTERPRET:
        tl.store(out_ptr + offsets, _half(_round_bits(dense, BF16), BF16), mask=live)
    else:
        tl.store(out_ptr + offsets, dense.to(out_ptr.dtype.element_ty), mask=live)


INTERPRETED = not isinstance(w4a16_kernel, triton.JITFunction)
"""Whether TRITON_INTERPRET was set when this file was imported: then the kernels run on tensors of the CPU."""
