"""Backend `llvm`: quantized linears on x86 processors, by machine code that LLVM generates at load.

`llvm_w4a16.py` generates the program. The codes stay packed for any number of rows of x, at 0.55 bytes per weight for 4
bits and group size 64. On processors with a dot product of bfloat16 pairs (Zen 4, Cooper Lake, Sapphire Rapids and
newer), the program multiplies bfloat16 inputs directly. On every other processor, and for every other dtype, it
computes in float32, and y is rounded to the dtype of x. Codes of 2 and 3 bits are stored in 4 bits.

Processors with matrix units (AMX) multiply a dense bfloat16 weight many times faster than with vector instructions. On
them, a call with many rows unpacks the weight, and oneDNN computes the product. The number of rows from which this is
faster is an estimate, because no such processor was available.

Prepared tensors, in order; T tiles of 64 features, S slots and B = S/block blocks along K (`layout.arrange_slots`),
P planes (2 for 8 bits, else 1): words uint8 [T, P*S/8, 64, 4]; scale [T, P*B, 64], in a 16-bit dtype if one holds it
exactly, else in float32; zero uint8 [T, P*B, 64]; column int64 [S], empty if the columns keep their order.
"""

from __future__ import annotations

import struct
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from llmquant.kernels import jit
from llmquant.kernels.layout import (
    LinearShape,
    arrange_slots,
    check_width,
    gather_columns,
    gather_groups,
    join_planes,
    ungather_columns,
)
from llmquant.kernels.llvm_w4a16 import (
    ARGUMENTS,
    COLUMNS_PER_WORD,
    ENTRY_POINTS,
    FUSED_BELOW_ROWS,
    MAX_BLOCK,
    MAX_CHUNK,
    TILE_FEATURES,
    Program,
)
from llmquant.weight import QuantizedWeight

BLOCKS = (MAX_BLOCK, 64, 32, 16, COLUMNS_PER_WORD)
"""Widths of a block, the columns that share a scale. A wider group consists of several blocks."""

MATRIX_UNITS_FROM_ROWS = 64
"""Rows of x from which unpacking the weight and multiplying with AMX is faster. The number is an estimate."""

PRODUCTS_PER_THREAD = 1 << 18
"""Products that make one more thread worthwhile; they take about ten microseconds."""

_DENSE_SCALE_DTYPE = torch.float16
"""Scale dtype of the program that multiplies by a dense weight. That program reads no scales. With float16, it is
the program that is already compiled for most models."""
_COLUMN_OF_NIBBLE = [0, 2, 4, 6, 1, 3, 5, 7]
"""For each nibble of a word, from the lowest on: which of the word's eight columns it holds."""
_NO_COLUMNS = torch.empty(0, dtype=torch.int64, device="cpu")
_pack = struct.Struct(f"{len(ARGUMENTS)}q").pack


def refuses(shape: LinearShape, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why this backend cannot run the linear, or None if it can."""
    if device.type != "cpu":
        return f"runs on the CPU, not on {device.type}"
    if dtype not in jit.LLVM_TYPE:
        return f"computes in float16, bfloat16 and float32, not in {str(dtype).removeprefix('torch.')}"
    return jit.unavailable_reason()


def prepare(weight: QuantizedWeight, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Return the prepared tensors (see above). Compile the program too, so that the first call does not wait for it."""
    shape = LinearShape.of(weight)
    group_size = shape.in_features if shape.num_groups == 1 else shape.group_size
    fitting = (block for block in BLOCKS if group_size % block == 0 and shape.in_features % block == 0)
    block = next(fitting, 32 if group_size > 32 else COLUMNS_PER_WORD)
    slots = arrange_slots(weight, block, block)
    codes_NS = slots.spread(weight.codes_NK.cpu(), weight.spec.mid_code)
    scale_NB = _narrowest_exact(weight.scale_NG.cpu())[:, slots.group_B]
    zero_NB = weight.zero_NG.cpu()[:, slots.group_B]
    if shape.bits == 8:
        # code - zero = 16 * (difference of the high nibbles) + difference of the low nibbles
        words = torch.cat([_pack_words(codes_NS >> 4), _pack_words(codes_NS & 15)], dim=1)
        scale_NB = _narrowest_exact(torch.cat([scale_NB.float() * 16, scale_NB.float()], dim=1))
        zero_NB = torch.cat([zero_NB >> 4, zero_NB & 15], dim=1)
    else:
        words = _pack_words(codes_NS)
    scale = _to_tiles(scale_NB)
    _compiled(dtype, scale.dtype)
    return words, scale, _to_tiles(zero_NB), _NO_COLUMNS if slots.keeps_order else slots.column_S


def matmul(x: Tensor, prepared: tuple[Tensor, ...], bias_N: Tensor | None, shape: LinearShape) -> Tensor:
    """x [..., K] of any floating dtype -> y [..., N] in the same dtype.

    A row of y has the same bits in any batch, except on processors with matrix units. Raises RuntimeError if x has
    another width than K.
    """
    words, scale, zero, column_S = prepared
    check_width(x, shape.in_features)
    compiled, compute_dtype = _compiled(x.dtype, scale.dtype)
    num_blocks = zero.shape[1] // (2 if shape.bits == 8 else 1)
    words_per_block = words.shape[1] // zero.shape[1]
    num_rows, num_slots = x.numel() // shape.in_features, num_blocks * words_per_block * COLUMNS_PER_WORD
    if num_rows >= MATRIX_UNITS_FROM_ROWS and compute_dtype == torch.bfloat16 and jit.has_matrix_units():
        return F.linear(x, dequantize(prepared, shape, x.dtype), bias_N)
    y = torch.empty(*x.shape[:-1], shape.out_features, dtype=compute_dtype, device="cpu")
    if num_rows:
        # Each torch call costs about a tenth of a small matmul, so skip those that would change nothing.
        if num_slots != shape.in_features or column_S.numel():
            x = gather_columns(x.reshape(-1, shape.in_features), column_S, num_slots)
        threads, chunk = _threads_and_chunk(num_rows, words.shape[0], num_slots)
        sums_MB = torch.empty(num_rows, num_blocks, dtype=torch.float32, device="cpu")
        tensors = _contiguous_input(x, compute_dtype), words, scale, zero, _float_bias(bias_N), sums_MB, y
        sizes = num_rows, shape.out_features, num_blocks, words_per_block, zero.shape[1] // num_blocks, chunk
        if threads > 1:
            _call(compiled, "sums", tensors, sizes, threads)
        _call(compiled, "matmul", tensors, sizes, threads)
    return y if x.dtype == compute_dtype else y.to(x.dtype)


def dequantize(prepared: tuple[Tensor, ...], shape: LinearShape, dtype: torch.dtype) -> Tensor:
    """Return the dense weight [N, K], computed in float32 and rounded once to dtype."""
    words, scale, zero, column_S = prepared
    compiled, compute_dtype = _compiled(dtype, scale.dtype)
    num_blocks = zero.shape[1] // (2 if shape.bits == 8 else 1)
    words_per_block = words.shape[1] // zero.shape[1]
    weight_SN = torch.empty(
        num_blocks * words_per_block * COLUMNS_PER_WORD, shape.out_features, dtype=compute_dtype, device="cpu"
    )
    sizes = 0, shape.out_features, num_blocks, words_per_block, zero.shape[1] // num_blocks, 0
    threads = min(torch.get_num_threads(), words.shape[0])
    _call(compiled, "unpack", (None, words, scale, zero, None, None, weight_SN), sizes, threads)
    return ungather_columns(weight_SN.T.to(dtype), column_S, shape.in_features)


def restore(prepared: tuple[Tensor, ...], shape: LinearShape, group_K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the codes_NK, scale_NG and zero_NG that `prepare` got; scales in the narrowest dtype that is exact."""
    words, scale, zero, column_S = prepared
    codes_NS, scale_NB, zero_NB = _unpack_words(words), _from_tiles(scale), _from_tiles(zero)
    if shape.bits == 8:
        codes_NS, scale_NB, zero_NB = join_planes(codes_NS, scale_NB, zero_NB)
    codes_NS, scale_NB, zero_NB = (values[: shape.out_features] for values in (codes_NS, scale_NB, zero_NB))
    block = codes_NS.shape[1] // scale_NB.shape[1]
    codes_NK = ungather_columns(codes_NS, column_S, shape.in_features)
    return codes_NK, *gather_groups(scale_NB, zero_NB, group_K, shape, block)


def multiplies_dense() -> bool:
    """Whether `multiply_dense` is the fastest kernel on this processor for a bfloat16 head."""
    return jit.unavailable_reason() is None and jit.has_bfloat16_dot_product() and not jit.has_matrix_units()


def pack_dense(weight_NK: Tensor) -> Tensor:
    """Rearrange a bfloat16 weight [N, K] into [T, S/2, 64, 2], padded with zeros."""
    out_features, in_features = weight_NK.shape
    _compiled(torch.bfloat16, _DENSE_SCALE_DTYPE)
    padded = F.pad(weight_NK, (0, -in_features % COLUMNS_PER_WORD, 0, -out_features % TILE_FEATURES))
    return padded.unflatten(1, (-1, 2)).unflatten(0, (-1, TILE_FEATURES)).transpose(1, 2).contiguous()


def unpack_dense(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    """Return the weight, bfloat16 [N, K], from the layout of `pack_dense`."""
    return packed.transpose(1, 2).flatten(0, 1).flatten(1)[:out_features, :in_features].contiguous()


def multiply_dense(x: Tensor, packed: Tensor, bias_N: Tensor | None, out_features: int) -> Tensor:
    """x [..., K] bfloat16 -> y [..., N], without a gradient. A row of y has the same bits in any batch."""
    compiled, compute_dtype = _compiled(x.dtype, _DENSE_SCALE_DTYPE)
    num_tiles, num_pairs, _, _ = packed.shape
    if x.shape[-1] != 2 * num_pairs:
        x = F.pad(x, (0, 2 * num_pairs - x.shape[-1]))
    y = torch.empty(*x.shape[:-1], out_features, dtype=compute_dtype, device="cpu")
    sizes = x.numel() // (2 * num_pairs), out_features, 1, 2 * num_pairs // COLUMNS_PER_WORD, 1, 0
    tensors = _contiguous_input(x, compute_dtype), packed, None, None, _float_bias(bias_N), None, y
    _call(compiled, "dense", tensors, sizes, _threads_and_chunk(sizes[0], num_tiles, 2 * num_pairs)[0])
    return y if x.dtype == compute_dtype else y.to(x.dtype)


def _contiguous_input(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in this dtype and in contiguous memory, with a lazy negation resolved."""
    if x.dtype != dtype:
        x = x.to(dtype)
    x = x.resolve_neg()
    return x if x.is_contiguous() else x.contiguous()


def _call(
    compiled: jit.Compiled, name: str, tensors: tuple[Tensor | None, ...], sizes: tuple[int, ...], num_threads: int
) -> None:
    """Call an entry point. `tensors` and `sizes` are the ARGUMENTS in order, without the number of threads."""
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    compiled.run(name, _pack(*addresses, *sizes, num_threads), num_threads)


def _threads_and_chunk(num_rows: int, num_tiles: int, num_slots: int) -> tuple[int, int]:
    """Return the number of threads, and the rows of x in a task, few enough that every thread gets a task."""
    threads = min(torch.get_num_threads(), 1 + num_rows * num_tiles * TILE_FEATURES * num_slots // PRODUCTS_PER_THREAD)
    if threads == 1:
        return 1, min(num_rows, MAX_CHUNK)
    chunks = max(-(-num_rows // MAX_CHUNK), min(-(-4 * threads // num_tiles), num_rows // FUSED_BELOW_ROWS, threads))
    chunk = -(-num_rows // max(chunks, 1))
    return min(threads, num_tiles * -(-num_rows // chunk)), chunk


def _float_bias(bias_N: Tensor | None) -> Tensor | None:
    """Return the bias in contiguous float32, or None."""
    return None if bias_N is None else bias_N.float().contiguous()


def _narrowest_exact(scale: Tensor) -> Tensor:
    """Return the scales in float16 or bfloat16 if one of these holds all of them exactly, else in float32."""
    exact = (dtype for dtype in (torch.float16, torch.bfloat16) if torch.equal(scale.to(dtype).to(scale), scale))
    return scale.to(next(exact, torch.float32))


def _to_tiles(value_NB: Tensor) -> Tensor:
    """[N, B] -> [T, B, 64], padded with zeros."""
    padded_NB = F.pad(value_NB, (0, 0, 0, -value_NB.shape[0] % TILE_FEATURES))
    return padded_NB.unflatten(0, (-1, TILE_FEATURES)).transpose(1, 2).contiguous()


def _from_tiles(value_TB: Tensor) -> Tensor:
    """[T, B, 64] -> [64 T, B], the inverse of `_to_tiles`."""
    return value_TB.transpose(1, 2).flatten(0, 1)


def _unpack_words(words: Tensor) -> Tensor:
    """words uint8 [T, S/8, 64, 4] -> uint8 [64 T, S], the inverse of `_pack_words`."""
    codes = words.new_empty(*words.shape[:3], COLUMNS_PER_WORD)
    codes[..., _COLUMN_OF_NIBBLE[0::2]], codes[..., _COLUMN_OF_NIBBLE[1::2]] = words & 15, words >> 4
    return codes.transpose(1, 2).flatten(2).flatten(0, 1)


def _pack_words(codes_NS: Tensor) -> Tensor:
    """uint8 [N, S] -> words uint8 [T, S/8, 64, 4], little-endian."""
    codes = (
        F.pad(codes_NS, (0, 0, 0, -codes_NS.shape[0] % TILE_FEATURES))
        .unflatten(1, (-1, COLUMNS_PER_WORD))
        .unflatten(0, (-1, TILE_FEATURES))
    )
    low, high = codes[..., _COLUMN_OF_NIBBLE[0::2]], codes[..., _COLUMN_OF_NIBBLE[1::2]]
    return (low | (high << 4)).transpose(1, 2).contiguous()


@cache
def _compiled(x: torch.dtype, scale: torch.dtype) -> tuple[jit.Compiled, torch.dtype]:
    """Return the compiled program for these dtypes of x and scale, and the dtype in which it reads x."""
    compute_dtype = torch.bfloat16 if x == torch.bfloat16 and jit.has_bfloat16_dot_product() else torch.float32
    wide = {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= jit.processor_features()
    program = Program(x=jit.LLVM_TYPE[compute_dtype], scale=jit.LLVM_TYPE[scale], wide=wide)
    return jit.Compiled(program.text(), ENTRY_POINTS), compute_dtype
