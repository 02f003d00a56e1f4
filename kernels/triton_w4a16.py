"""Two Triton kernels that share one layout: one computes y = x @ W.T from 4-bit codes, the other the dense W.

The layout matches the operand that a Hopper tensor core reads from registers. The kernel computes y.T = W @ x.T, so
that the out_features fill the 64 rows of a `wgmma`, and the tokens fill its columns. In each row of a 64 x 128 tile,
thread t of a quad (t % 4 = l) needs the columns 8m + 2l + {0, 1} for m = 0 … 15. These are thirty-two codes, or sixteen
bytes, which take one load:

    word[n, 4l + i], nibble p + 4e   is   W[n, 8(4i + p) + 2l + e]      l, i, p in 0 … 3; e in 0, 1

Nibbles p and p + 4 are neighbours in K and lie sixteen bits apart, so `(word >> 4p) & 0x000F000F | MAGIC` is a pair of
floats MAGIC + code, ready in one register. MAGIC has the bits of 128 (bfloat16) or 1024 (float16), and the code fills
its lowest mantissa bits. This needs no shuffles, and no dequantized weight goes through shared memory. On other GPUs
the same program is correct but slower.

The words i of the four threads together cover the columns 32i … 32i + 31. Groups of 32, 64 and 128 therefore differ
only in how often a scale is repeated.

The scale and the zero-point of a block share one 32-bit word, because asynchronous copies move at least four bytes. The
low half has the bits of the scale, the high half those of -(128 + zero) or -(1024 + zero). Adding the latter to
MAGIC + code gives code - zero exactly.

Letters: T tiles of 128 slots along K, NP out_features rounded up to 64, B blocks (scales) per tile, P planes (2 for
8-bit codes: the high and the low nibbles, as two weights over the same x).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _codes_as_floats(word, shift: tl.constexpr, MAGIC: tl.constexpr, INTERPRET: tl.constexpr):
    """Return two codes of each word as two floats MAGIC + code, by one three-input logic operation (`lop3`).

    The compiler does not find that operation by itself.
    """
    shifted = word >> shift
    if INTERPRET:
        return (shifted & 0x000F000F) | MAGIC
    else:
        return tl.inline_asm_elementwise(
            f"lop3.b32 $0, $1, 0x000F000F, {MAGIC}, 0xea;", "=r,r", [shifted], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def _rounded_bits(value, BF16: tl.constexpr):
    """Round float32 to bfloat16 or float16, to nearest even, and return the bits in an int32.

    Only the interpreter needs it, because its own cast to bfloat16 truncates.
    """
    if BF16:
        bits = value.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF
    else:
        return value.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def _low_half_as_float(word, BF16: tl.constexpr):
    """Return the low 16 bits of each word as bfloat16 or float16."""
    return (word & 0xFFFF).to(tl.int16).to(tl.bfloat16 if BF16 else tl.float16, bitcast=True)


@triton.jit
def _fma2(a, b, c, BF16: tl.constexpr, INTERPRET: tl.constexpr):
    """Return a * b + c for both 16-bit halves of int32 words.

    It works on whole words, because the compiler would join split halves again with one permutation per operation. It
    uses fma, the only form of bfloat16 arithmetic that every GPU from sm_80 on has.
    """
    a, b = tl.broadcast(a, b)
    a, c = tl.broadcast(a, c)
    if INTERPRET:
        low = _low_half_as_float(a, BF16).to(tl.float32) * _low_half_as_float(b, BF16).to(
            tl.float32
        ) + _low_half_as_float(c, BF16).to(tl.float32)
        high = _low_half_as_float(a >> 16, BF16).to(tl.float32) * _low_half_as_float(b >> 16, BF16).to(tl.float32)
        high += _low_half_as_float(c >> 16, BF16).to(tl.float32)
        return _rounded_bits(low, BF16) | (_rounded_bits(high, BF16) << 16)
    else:
        TYPE: tl.constexpr = "bf16x2" if BF16 else "f16x2"
        return tl.inline_asm_elementwise(
            f"fma.rn.{TYPE} $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def _duplicate_low_half(word):
    """Return words with the low 16 bits of each word in both halves."""
    return (word & 0xFFFF) | (word << 16)


@triton.jit
def _add(sums, product, INTERPRET: tl.constexpr):
    """Return sums + product in float32, by an instruction that Triton does not fold into the product.

    A product that starts from the sums makes ptxas wait for every `wgmma` before it starts the next one (warning
    C7515). A product that starts from zero has all of its `wgmma` in flight at once. With more rows, the addition costs
    more than the waits, during which other programs use the matrix unit.
    """
    if INTERPRET:
        return sums + product
    else:
        return tl.inline_asm_elementwise(
            "add.f32 $0, $1, $2;", "=f,f,f", [sums, product], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _per_word(block, BN: tl.constexpr, B: tl.constexpr):
    """[BN, B] -> [BN, 16]: repeat each block's value for its words (word 4l + i lies in columns 32i … 32i + 31)."""
    if B == 1:
        return block
    else:
        block = tl.broadcast_to(tl.reshape(block, (BN, 1, B, 1)), (BN, 4, B, 4 // B))
        return tl.reshape(block, (BN, 16))


@triton.jit
def _unpack(
    word, meta, BN: tl.constexpr, B: tl.constexpr, SCALE: tl.constexpr, BF16: tl.constexpr, INTERPRET: tl.constexpr
):
    """word int32 [BN, 16], meta int32 [BN, B] -> code - zero [BN, 128] in column order, times the scale if SCALE."""
    MAGIC: tl.constexpr = 0x43004300 if BF16 else 0x64006400
    ONE: tl.constexpr = 0x3F803F80 if BF16 else 0x3C003C00
    MINUS_ZERO: tl.constexpr = -0x7FFF8000  # 0x80008000; adding -0 keeps the sign of a zero
    one = tl.full((1, 1), ONE, tl.int32)
    minus_zero = tl.full((1, 1), MINUS_ZERO, tl.int32)
    negative_zero_point = _per_word(_duplicate_low_half(meta >> 16), BN, B)
    scale = _per_word(_duplicate_low_half(meta), BN, B)
    t0 = _fma2(_codes_as_floats(word, 0, MAGIC, INTERPRET), one, negative_zero_point, BF16, INTERPRET)
    t1 = _fma2(_codes_as_floats(word, 4, MAGIC, INTERPRET), one, negative_zero_point, BF16, INTERPRET)
    t2 = _fma2(_codes_as_floats(word, 8, MAGIC, INTERPRET), one, negative_zero_point, BF16, INTERPRET)
    t3 = _fma2(_codes_as_floats(word, 12, MAGIC, INTERPRET), one, negative_zero_point, BF16, INTERPRET)
    if SCALE:
        t0 = _fma2(t0, scale, minus_zero, BF16, INTERPRET)
        t1 = _fma2(t1, scale, minus_zero, BF16, INTERPRET)
        t2 = _fma2(t2, scale, minus_zero, BF16, INTERPRET)
        t3 = _fma2(t3, scale, minus_zero, BF16, INTERPRET)
    pairs = tl.join(tl.join(t0, t2), tl.join(t1, t3))  # [BN, 16, p // 2, p % 2] after the joins: p = 2 * axis2 + axis3
    value = tl.join(_low_half_as_float(pairs, BF16), _low_half_as_float(pairs >> 16, BF16)).reshape(
        BN, 4, 4, 2, 2, 2
    )  # n, l, i, p1, p0, e
    return value.permute(0, 2, 3, 4, 1, 5).reshape(BN, 128)


@triton.jit(do_not_specialize=["M"])
def w4a16_kernel(
    x_ptr,  # bf16/fp16 [M, K], contiguous
    w_ptr,  # int32 [NP/64, P*T, 64, 16], contiguous
    meta_ptr,  # int32 [P*T, at least N, B]; its tiles are NP * B words apart
    bias_ptr,  # bf16/fp16 [N]; not read if HAS_BIAS is false
    y_ptr,  # bf16/fp16 [M, N], contiguous
    partial_ptr,  # fp32 [splits of K, M, N]; not used if SPLIT_K is false
    done_ptr,  # int32, one counter per tile of y; 0 before and after the kernel
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
    SPLIT_K: tl.constexpr,  # whether several programs share a tile of y along K
    POST: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BF16: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Compute one tile of y, of BM tokens and BN out_features, or its sum over one split of K.

    Grid: (tiles of M, tiles of N, splits of K). Sizes are not compiled in, so one compilation serves all linears of a
    model that share a quantization grid and a tile configuration.

    With POST, the kernel scales the float32 product of each tile of 128 slots. This keeps the weights exact, needs B =
    1 and suits few tokens. Without POST, it scales the weights before the product, which rounds them as a dense weight
    would be.
    """
    tile_m = tl.program_id(0)
    tile_n = tl.program_id(1)
    split = tl.program_id(2)
    rows_n = tile_n * BN + tl.arange(0, BN)
    rows_m = tile_m * BM + tl.arange(0, BM)
    slot = tl.arange(0, 128)
    num_splits = tl.num_programs(2)
    tiles_per_split = tl.cdiv(P * T, num_splits)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, P * T)
    valid_m = rows_m < M
    w_ptrs = w_ptr + ((rows_n // 64) * (P * T * 1024) + (rows_n % 64) * 16)[:, None] + tl.arange(0, 16)[None, :]
    meta_ptrs = meta_ptr + rows_n[:, None] * B + tl.arange(0, B)[None, :]
    x_ptrs = x_ptr + rows_m.to(tl.int64)[None, :] * K + slot[:, None]
    sums = tl.zeros((BN, BM), tl.float32)
    for tile in tl.range(first, last, num_stages=STAGES):
        tile_x = tile
        if P > 1:  # the second plane reads x again; `%` would be a division
            tile_x = tl.where(tile >= T, tile - T, tile)
        valid_x = valid_m[None, :]
        if RAGGED_K:
            valid_x = valid_x & (tile_x * 128 + slot < K)[:, None]
        # Each weight is read only once, so evict the words from the cache before x.
        word = tl.load(w_ptrs + tile * 1024, eviction_policy="evict_first")
        meta = tl.load(meta_ptrs + tile * (NP * B))
        x = tl.load(x_ptrs + tile_x * 128, mask=valid_x, other=0.0)
        weight = _unpack(word, meta, BN, B, not POST, BF16, INTERPRET)
        if INTERPRET:  # the interpreter has no bfloat16 arithmetic
            weight = weight.to(tl.float32)
            x = x.to(tl.float32)
        if POST:
            sums += tl.dot(weight, x) * _low_half_as_float(meta, BF16).to(tl.float32)
        elif BM <= 32:
            sums = _add(sums, tl.dot(weight, x), INTERPRET)
        else:
            sums = tl.dot(weight, x, sums)
    valid = valid_m[None, :] & (rows_n < N)[:, None]
    offsets = rows_m.to(tl.int64)[None, :] * N + rows_n[:, None]
    if SPLIT_K:
        # Every program stores its sums. The last one to finish adds all of them in the order of the splits, without
        # float atomics, so that two runs agree to the bit. The sums go through the second-level cache (.cg), because
        # the first-level cache is not coherent between processors.
        plane = M * N  # split-K is used for few rows, so there are fewer than 2**31 sums
        tl.store(partial_ptr + split * plane + offsets, sums, mask=valid, cache_modifier=".cg")
        tl.debug_barrier()
        tile_y = tile_n * tl.num_programs(0) + tile_m
        num_done_before = tl.atomic_add(done_ptr + tile_y, 1, sem="acq_rel", scope="gpu")
        if num_done_before == num_splits - 1:
            total = tl.zeros((BN, BM), tl.float32)
            for other in tl.range(0, num_splits):
                total += tl.load(partial_ptr + other * plane + offsets, mask=valid, other=0.0, cache_modifier=".cg")
            _store(y_ptr, bias_ptr, offsets, total, rows_n, valid, N, HAS_BIAS, BF16, INTERPRET)
            tl.store(done_ptr + tile_y, 0)
    else:
        _store(y_ptr, bias_ptr, offsets, sums, rows_n, valid, N, HAS_BIAS, BF16, INTERPRET)


@triton.jit
def _store(
    y_ptr, bias_ptr, offsets, sums, rows_n, valid, N, HAS_BIAS: tl.constexpr, BF16: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Add the bias in float32, round once, and store."""
    if HAS_BIAS:
        sums += tl.load(bias_ptr + rows_n, mask=rows_n < N, other=0.0).to(tl.float32)[:, None]
    if INTERPRET:
        tl.store(y_ptr + offsets, _low_half_as_float(_rounded_bits(sums, BF16), BF16), mask=valid)
    else:
        tl.store(y_ptr + offsets, sums.to(y_ptr.dtype.element_ty), mask=valid)


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
    """Write one 64 x 128 tile of the dense weight, computed in float32 and rounded once."""
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
        q = _unpack(word, meta, 64, B, False, BF16, INTERPRET).to(tl.float32)
        scale = tl.broadcast_to(_low_half_as_float(meta, BF16).to(tl.float32)[:, :, None], (64, B, 128 // B))
        dense += q * tl.reshape(scale, (64, 128))
    offsets = rows_n.to(tl.int64)[:, None] * K + columns[None, :]
    valid = (rows_n < N)[:, None] & (columns < K)[None, :]
    if INTERPRET:
        tl.store(out_ptr + offsets, _low_half_as_float(_rounded_bits(dense, BF16), BF16), mask=valid)
    else:
        tl.store(out_ptr + offsets, dense.to(out_ptr.dtype.element_ty), mask=valid)


INTERPRETED = not isinstance(w4a16_kernel, triton.JITFunction)
"""Whether TRITON_INTERPRET was set when this file was imported. The kernels then run on CPU tensors."""
