"""Quantized linears on x86 processors, by machine code that LLVM makes at load (`llvm_w4a16.py` is the program).

The codes stay packed: 0.55 bytes per weight at 4 bits and group size 64, for any number of rows of x. In bfloat16 on
processors that multiply it (Zen 4, Sapphire Rapids and newer) pairs go straight to the dot product; every other
processor and dtype takes float32 and, where x was not, rounds y once more. Codes of 2 and 3 bits are stored in 4.

Prepared tensors, in order; T tiles of 64 features, S slots and B = S/block blocks along K (`layout.arrange_slots`),
P planes (2 for 8 bits, else 1): words uint8 [T, P*S/8, 64, 4]; scale [T, P*B, 64], in the 16-bit dtype that holds it
exactly, else in float32; zero uint8 [T, P*B, 64]; column int64 [S], empty where columns keep their place.
"""

from __future__ import annotations

import struct
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from llmquant.kernels import jit
from llmquant.kernels.layout import LinearShape, arrange_slots, gather_columns, ungather_columns
from llmquant.kernels.llvm_w4a16 import ARGUMENTS, ENTRY_POINTS, FUSED_BELOW_ROWS, MAX_BLOCK, MAX_CHUNK, STEP, TILE, Program
from llmquant.weight import QuantizedWeight

BLOCKS = (MAX_BLOCK, 64, 32, 16, 8)
"""Columns that share a scale in the program; a wider group is several of them."""

_pack = struct.Struct(f"{len(ARGUMENTS)}q").pack
_LLVM_TYPE = {torch.float16: "half", torch.bfloat16: "bfloat", torch.float32: "float"}
_NO_TENSOR = torch.empty(0)
_COLUMN_OF_NIBBLE = [0, 2, 4, 6, 1, 3, 5, 7]
_NIBBLE_OF_COLUMN = [0, 4, 1, 5, 2, 6, 3, 7]


def refuses(layer: LinearShape, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run the linear, or None."""
    if device.type != "cpu":
        return f"runs on the CPU, not on {device.type}"
    if dtype not in _LLVM_TYPE:
        return f"x would be {str(dtype).removeprefix('torch.')}"
    return jit.why_not()


def prepare(weight: QuantizedWeight, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """The layout; the program is made here too, so that the first call does not wait for it."""
    layer = LinearShape.of(weight)
    group_size = layer.in_features if layer.num_groups == 1 else layer.group_size
    fitting = (block for block in BLOCKS if group_size % block == 0 and layer.in_features % block == 0)
    block = next(fitting, 32 if group_size > 32 else STEP)
    slots = arrange_slots(weight, block, block)
    zero_NB = weight.zero_NG.cpu()[:, slots.group_B]
    codes_NS = slots.spread(weight.codes_NK.cpu(), weight.spec.mid_code)
    scale_NB = _narrowest(weight.scale_NG.cpu())[:, slots.group_B]
    if layer.bits == 8:
        # code - zero = 16 * (high half of both) + (low half of both)
        words = torch.cat([_words(codes_NS >> 4), _words(codes_NS & 15)], dim=1)
        scale_NB = _narrowest(torch.cat([scale_NB.float() * 16, scale_NB.float()], dim=1))
        zero_NB = torch.cat([zero_NB >> 4, zero_NB & 15], dim=1)
    else:
        words = _words(codes_NS)
    prepared = words, _tiles(scale_NB), _tiles(zero_NB), _NO_TENSOR.long() if slots.is_prefix else slots.column_S
    _compiled(dtype, prepared[1].dtype)
    return prepared


def matmul(x: Tensor, prepared: tuple[Tensor, ...], bias_N: Tensor | None, layer: LinearShape) -> Tensor:
    """x [..., K] of any floating dtype -> y [..., N] in the same dtype; a row has the same bits in any batch."""
    words, scale, zero, column_S = prepared
    compiled, inner = _compiled(x.dtype, scale.dtype)
    num_tiles, num_words, _, _ = words.shape
    num_blocks, num_planes = zero.shape[1], 1
    if layer.bits == 8:
        num_blocks, num_planes = num_blocks // 2, 2
    steps = num_words // zero.shape[1]
    x_MS = gather_columns(x.reshape(-1, layer.in_features), column_S, num_blocks * steps * STEP).to(inner).contiguous()
    num_rows = x_MS.shape[0]
    y_MN = torch.empty(num_rows, layer.out_features, dtype=inner)
    if num_rows:
        sums_MB = torch.empty(num_rows, num_blocks)
        bias_N = None if bias_N is None else bias_N.float()
        threads, chunk = _share(num_rows, num_tiles)
        arguments = _pack(
            x_MS.data_ptr(),
            words.data_ptr(),
            scale.data_ptr(),
            zero.data_ptr(),
            0 if bias_N is None else bias_N.data_ptr(),
            sums_MB.data_ptr(),
            y_MN.data_ptr(),
            num_rows,
            layer.out_features,
            num_blocks,
            steps,
            num_planes,
            chunk,
            threads,
        )
        if threads > 1:
            compiled.run("sums", arguments, threads)
        compiled.run("matmul", arguments, threads)
    return y_MN.to(x.dtype).view(*x.shape[:-1], layer.out_features)


def dequantize(prepared: tuple[Tensor, ...], layer: LinearShape, dtype: torch.dtype) -> Tensor:
    """The dense weight [N, K]: computed in float32 and rounded once to dtype."""
    words, scale, zero, column_S = prepared
    nibbles = torch.stack([words & 15, words >> 4], dim=-1).flatten(-2)
    codes_NS = nibbles[..., _NIBBLE_OF_COLUMN].transpose(1, 2).flatten(0, 1).flatten(1)[: layer.out_features]
    scale_NB, zero_NB = (value.transpose(1, 2).flatten(0, 1)[: layer.out_features] for value in (scale, zero))
    if layer.bits == 8:
        (high_NS, codes_NS), (high_NB, zero_NB) = codes_NS.chunk(2, dim=1), zero_NB.chunk(2, dim=1)
        codes_NS, zero_NB, scale_NB = (high_NS << 4) | codes_NS, (high_NB << 4) | zero_NB, scale_NB.chunk(2, dim=1)[1]
    step_NBb = codes_NS.unflatten(1, (zero_NB.shape[1], -1)).float() - zero_NB[..., None].float()
    weight_NS = (scale_NB[..., None].float() * step_NBb).flatten(1).to(dtype)
    return ungather_columns(weight_NS, column_S, layer.in_features)


def _narrowest(scale: Tensor) -> Tensor:
    """The same numbers in 16 bits, where one of the two dtypes holds them."""
    fitting = (dtype for dtype in (torch.float16, torch.bfloat16) if torch.equal(scale.to(dtype).to(scale), scale))
    return scale.to(next(fitting, torch.float32))


def _tiles(value_NB: Tensor) -> Tensor:
    """[N, B] -> [T, B, 64]; features beyond the last get zeros."""
    return F.pad(value_NB, (0, 0, 0, -value_NB.shape[0] % TILE)).unflatten(0, (-1, TILE)).transpose(1, 2).contiguous()


def _words(codes_NS: Tensor) -> Tensor:
    """uint8 [N, S] -> words uint8 [T, S/8, 64, 4], little-endian."""
    codes = F.pad(codes_NS, (0, 0, 0, -codes_NS.shape[0] % TILE)).unflatten(1, (-1, STEP)).unflatten(0, (-1, TILE))
    low, high = codes[..., _COLUMN_OF_NIBBLE[0::2]], codes[..., _COLUMN_OF_NIBBLE[1::2]]
    return (low | (high << 4)).transpose(1, 2).contiguous()


def _share(num_rows: int, num_tiles: int) -> tuple[int, int]:
    """Threads, and rows of x in a task: few enough that every thread has something to do."""
    threads = torch.get_num_threads()
    if threads == 1:
        return 1, min(num_rows, MAX_CHUNK)
    chunks = max(-(-num_rows // MAX_CHUNK), min(-(-4 * threads // num_tiles), num_rows // FUSED_BELOW_ROWS, threads))
    chunk = -(-num_rows // max(chunks, 1))
    return min(threads, num_tiles * -(-num_rows // chunk)), chunk


@lru_cache(maxsize=None)
def _compiled(x: torch.dtype, scale: torch.dtype) -> tuple[jit.Compiled, torch.dtype]:
    """The functions for x and scales of these dtypes on this processor, and the dtype they want x in."""
    features = jit.processor_features()
    multiplies = x == torch.bfloat16 and {"avx512bf16", "avx512vl"} <= features
    wide = {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= features
    program = Program(x="bfloat" if multiplies else "float", scale=_LLVM_TYPE[scale], wide=wide)
    return jit.Compiled(program.text(), ENTRY_POINTS), torch.bfloat16 if multiplies else torch.float32
