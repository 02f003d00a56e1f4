"""Quantized linears on x86 processors, by machine code that LLVM makes at load (`llvm_w4a16.py` is the program).

The codes stay packed: 0.55 bytes per weight at 4 bits and group size 64, for any number of rows of x. In bfloat16 on
processors that multiply it (Zen 4, Cooper Lake, Sapphire Rapids and newer) pairs go straight to the dot product; every
other processor and dtype takes float32, and rounds y once more where x was not. Codes of 2 and 3 bits are stored in 4.

Processors with matrix units (AMX) multiply a dense bfloat16 weight many times faster than vectors can. There, many
rows unpack the weight and leave the product to oneDNN; from how many on is an estimate, none was at hand.

Prepared tensors, in order; T tiles of 64 features, S slots and B = S/block blocks along K (`layout.arrange_slots`),
P planes (2 for 8 bits, else 1): words uint8 [T, P*S/8, 64, 4]; scale [T, P*B, 64], in the 16-bit dtype that holds it
exactly, else in float32; zero uint8 [T, P*B, 64]; column int64 [S], empty where columns keep their place.
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
    ENTRY_POINTS,
    FUSED_BELOW_ROWS,
    MAX_BLOCK,
    MAX_CHUNK,
    STEP,
    TILE,
    Program,
)
from llmquant.weight import QuantizedWeight

BLOCKS = (MAX_BLOCK, 64, 32, 16, STEP)
"""Columns that share a scale in the program; a wider group is several of them."""

MATRIX_UNITS_FROM_ROWS = 64
"""Rows of x from which AMX pays for unpacking the weight. An estimate."""

GRAIN = 1 << 18
"""Products that are worth another thread: some ten microseconds."""

_ANY_SCALE = torch.float16
"""Of the program that multiplies dense weights: the one that is likely there for the others."""
_COLUMN_OF_NIBBLE = [0, 2, 4, 6, 1, 3, 5, 7]
_NO_COLUMNS = torch.empty(0, dtype=torch.int64, device="cpu")
_pack = struct.Struct(f"{len(ARGUMENTS)}q").pack


def refuses(layer: LinearShape, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run the linear, or None."""
    if device.type != "cpu":
        return f"runs on the CPU, not on {device.type}"
    if dtype not in jit.LLVM_TYPE:
        return f"x would be {str(dtype).removeprefix('torch.')}"
    return jit.why_not()


def prepare(weight: QuantizedWeight, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """The layout. The program is made here too, so that the first call does not wait for it."""
    layer = LinearShape.of(weight)
    group_size = layer.in_features if layer.num_groups == 1 else layer.group_size
    fitting = (block for block in BLOCKS if group_size % block == 0 and layer.in_features % block == 0)
    block = next(fitting, 32 if group_size > 32 else STEP)
    slots = arrange_slots(weight, block, block)
    codes_NS = slots.spread(weight.codes_NK.cpu(), weight.spec.mid_code)
    scale_NB = _narrowest(weight.scale_NG.cpu())[:, slots.group_B]
    zero_NB = weight.zero_NG.cpu()[:, slots.group_B]
    if layer.bits == 8:
        # code - zero = 16 * (difference of the high halves) + difference of the low halves
        words = torch.cat([_words(codes_NS >> 4), _words(codes_NS & 15)], dim=1)
        scale_NB = _narrowest(torch.cat([scale_NB.float() * 16, scale_NB.float()], dim=1))
        zero_NB = torch.cat([zero_NB >> 4, zero_NB & 15], dim=1)
    else:
        words = _words(codes_NS)
    scale = _tiles(scale_NB)
    _compiled(dtype, scale.dtype)
    return words, scale, _tiles(zero_NB), _NO_COLUMNS if slots.is_prefix else slots.column_S


def matmul(x: Tensor, prepared: tuple[Tensor, ...], bias_N: Tensor | None, layer: LinearShape) -> Tensor:
    """x [..., K] of any floating dtype -> y [..., N] in the same dtype; a row has the same bits in any batch (but for
    processors with matrix units). Raises RuntimeError for an x of another width."""
    words, scale, zero, column_S = prepared
    check_width(x, layer.in_features)
    compiled, inner = _compiled(x.dtype, scale.dtype)
    num_blocks = zero.shape[1] // (2 if layer.bits == 8 else 1)
    steps = words.shape[1] // zero.shape[1]
    num_rows, num_slots = x.numel() // layer.in_features, num_blocks * steps * STEP
    if num_rows >= MATRIX_UNITS_FROM_ROWS and inner == torch.bfloat16 and jit.has_matrix_units():
        return F.linear(x, dequantize(prepared, layer, x.dtype), bias_N)
    y = torch.empty(*x.shape[:-1], layer.out_features, dtype=inner, device="cpu")
    if num_rows:
        # Every operator costs as much as a small matmul's tenth: none that changes nothing.
        if num_slots != layer.in_features or column_S.numel():
            x = gather_columns(x.reshape(-1, layer.in_features), column_S, num_slots)
        threads, chunk = _share(num_rows, words.shape[0], num_slots)
        sums_MB = torch.empty(num_rows, num_blocks, dtype=torch.float32, device="cpu")
        tensors = _ready(x, inner), words, scale, zero, _float(bias_N), sums_MB, y
        sizes = num_rows, layer.out_features, num_blocks, steps, zero.shape[1] // num_blocks, chunk
        if threads > 1:
            _call(compiled, "sums", tensors, sizes, threads)
        _call(compiled, "matmul", tensors, sizes, threads)
    return y if x.dtype == inner else y.to(x.dtype)


def dequantize(prepared: tuple[Tensor, ...], layer: LinearShape, dtype: torch.dtype) -> Tensor:
    """The dense weight [N, K]: computed in float32 and rounded once to dtype."""
    words, scale, zero, column_S = prepared
    compiled, inner = _compiled(dtype, scale.dtype)
    num_blocks = zero.shape[1] // (2 if layer.bits == 8 else 1)
    steps = words.shape[1] // zero.shape[1]
    weight_SN = torch.empty(num_blocks * steps * STEP, layer.out_features, dtype=inner, device="cpu")
    sizes = 0, layer.out_features, num_blocks, steps, zero.shape[1] // num_blocks, 0
    threads = min(torch.get_num_threads(), words.shape[0])
    _call(compiled, "unpack", (None, words, scale, zero, None, None, weight_SN), sizes, threads)
    return ungather_columns(weight_SN.T.to(dtype), column_S, layer.in_features)


def restore(prepared: tuple[Tensor, ...], layer: LinearShape, group_K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """codes_NK, scale_NG and zero_NG as they were before `prepare`; scales in the narrowest dtype that is exact."""
    words, scale, zero, column_S = prepared
    codes_NS, scale_NB, zero_NB = _codes(words), _untiled(scale), _untiled(zero)
    if layer.bits == 8:
        codes_NS, scale_NB, zero_NB = join_planes(codes_NS, scale_NB, zero_NB)
    codes_NS, scale_NB, zero_NB = (values[: layer.out_features] for values in (codes_NS, scale_NB, zero_NB))
    block = codes_NS.shape[1] // scale_NB.shape[1]
    codes_NK = ungather_columns(codes_NS, column_S, layer.in_features)
    return codes_NK, *gather_groups(scale_NB, zero_NB, group_K, layer, block)


def multiplies_dense() -> bool:
    """Whether `multiply_dense` is the fastest there is here for a head in bfloat16."""
    return jit.why_not() is None and jit.multiplies_bfloat16() and not jit.has_matrix_units()


def pack_dense(weight_NK: Tensor) -> Tensor:
    """A bfloat16 weight -> [T, S/2, 64, 2]; features and columns beyond the last are zeros."""
    out_features, in_features = weight_NK.shape
    _compiled(torch.bfloat16, _ANY_SCALE)
    padded = F.pad(weight_NK, (0, -in_features % STEP, 0, -out_features % TILE))
    return padded.unflatten(1, (-1, 2)).unflatten(0, (-1, TILE)).transpose(1, 2).contiguous()


def unpack_dense(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    """The way back: bfloat16 [N, K]."""
    return packed.transpose(1, 2).flatten(0, 1).flatten(1)[:out_features, :in_features].contiguous()


def multiply_dense(x: Tensor, packed: Tensor, bias_N: Tensor | None, out_features: int) -> Tensor:
    """x [..., K] bfloat16, K that of the weight -> y [..., N]; a row has the same bits in any batch. No gradient."""
    compiled, inner = _compiled(x.dtype, _ANY_SCALE)
    num_tiles, num_pairs, _, _ = packed.shape
    if x.shape[-1] != 2 * num_pairs:
        x = F.pad(x, (0, 2 * num_pairs - x.shape[-1]))
    y = torch.empty(*x.shape[:-1], out_features, dtype=inner, device="cpu")
    sizes = x.numel() // (2 * num_pairs), out_features, 1, 2 * num_pairs // STEP, 1, 0
    tensors = _ready(x, inner), packed, None, None, _float(bias_N), None, y
    _call(compiled, "dense", tensors, sizes, _share(sizes[0], num_tiles, 2 * num_pairs)[0])
    return y if x.dtype == inner else y.to(x.dtype)


def _ready(x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.dtype != dtype:
        x = x.to(dtype)
    x = x.resolve_neg()
    return x if x.is_contiguous() else x.contiguous()


def _call(
    compiled: jit.Compiled, name: str, tensors: tuple[Tensor | None, ...], sizes: tuple[int, ...], num_threads: int
) -> None:
    """`tensors` and `sizes`: the ARGUMENTS in their order, but for the number of threads."""
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    compiled.run(name, _pack(*addresses, *sizes, num_threads), num_threads)


def _share(num_rows: int, num_tiles: int, num_slots: int) -> tuple[int, int]:
    """Threads, and rows of x in a task: few enough that every thread has something to do."""
    threads = min(torch.get_num_threads(), 1 + num_rows * num_tiles * TILE * num_slots // GRAIN)
    if threads == 1:
        return 1, min(num_rows, MAX_CHUNK)
    chunks = max(-(-num_rows // MAX_CHUNK), min(-(-4 * threads // num_tiles), num_rows // FUSED_BELOW_ROWS, threads))
    chunk = -(-num_rows // max(chunks, 1))
    return min(threads, num_tiles * -(-num_rows // chunk)), chunk


def _float(bias_N: Tensor | None) -> Tensor | None:
    return None if bias_N is None else bias_N.float().contiguous()


def _narrowest(scale: Tensor) -> Tensor:
    """The same numbers in 16 bits, where one of the two dtypes holds them."""
    fitting = (dtype for dtype in (torch.float16, torch.bfloat16) if torch.equal(scale.to(dtype).to(scale), scale))
    return scale.to(next(fitting, torch.float32))


def _tiles(value_NB: Tensor) -> Tensor:
    """[N, B] -> [T, B, 64]; features beyond the last get zeros."""
    return F.pad(value_NB, (0, 0, 0, -value_NB.shape[0] % TILE)).unflatten(0, (-1, TILE)).transpose(1, 2).contiguous()


def _untiled(value_TB: Tensor) -> Tensor:
    """[T, B, 64] -> [64 T, B], the inverse of `_tiles`."""
    return value_TB.transpose(1, 2).flatten(0, 1)


def _codes(words: Tensor) -> Tensor:
    """words uint8 [T, S/8, 64, 4] -> uint8 [64 T, S], the inverse of `_words`."""
    codes = words.new_empty(*words.shape[:3], STEP)
    codes[..., _COLUMN_OF_NIBBLE[0::2]], codes[..., _COLUMN_OF_NIBBLE[1::2]] = words & 15, words >> 4
    return codes.transpose(1, 2).flatten(2).flatten(0, 1)


def _words(codes_NS: Tensor) -> Tensor:
    """uint8 [N, S] -> words uint8 [T, S/8, 64, 4], little-endian."""
    codes = F.pad(codes_NS, (0, 0, 0, -codes_NS.shape[0] % TILE)).unflatten(1, (-1, STEP)).unflatten(0, (-1, TILE))
    low, high = codes[..., _COLUMN_OF_NIBBLE[0::2]], codes[..., _COLUMN_OF_NIBBLE[1::2]]
    return (low | (high << 4)).transpose(1, 2).contiguous()


@cache
def _compiled(x: torch.dtype, scale: torch.dtype) -> tuple[jit.Compiled, torch.dtype]:
    """The functions for x and scales of these dtypes on this processor, and the dtype they want x in."""
    inner = torch.bfloat16 if x == torch.bfloat16 and jit.multiplies_bfloat16() else torch.float32
    wide = {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= jit.processor_features()
    program = Program(x=jit.LLVM_TYPE[inner], scale=jit.LLVM_TYPE[scale], wide=wide)
    return jit.Compiled(program.text(), ENTRY_POINTS), inner
