"""Quantized linears on x86 processors with AVX2 or AVX-512 by torch's own operators, where backend `llvm` cannot run.

Two layouts of the same codes, made at load; which of them a call reads depends on the rows of x:

- `packed`, for few rows: what `aten::_weight_int4pack_mm_for_cpu` reads. It sums in float32 and never rounds a weight
  to bfloat16, but its arithmetic is float32 and it unpacks again for every four rows of x: the fastest there is for
  decoding, and half the speed of a dense matmul for many rows. Only its bfloat16 form is vectorised (float16 and
  float32 take a hundred times longer), and the order of its bytes depends on the processor: it is never saved.
- `rows`, for many rows and for every x that is not bfloat16: the codes in the row format of torch's quantized
  embedding tables, whose unpacking is vectorised. Weights come back exact in float32, are rounded once to the dtype of
  x, and go to the dense matmul piece by piece while they are in the cache.

Bytes per weight for 4 bits and group size 64: 1.2; a packed checkpoint has 0.55, bfloat16 2.

The packed kernel computes (code - 8) * scale + offset, scale and offset rounded to bfloat16. The offset is not
(8 - zero) * scale but what makes the mean weight of each block come out right after the scale was rounded: a scale that
is stored in float16 loses three bits here, and x is seldom of mean zero. Codes of 2 and 3 bits become 4-bit codes with
zero 8, so that their offset is nothing. Codes of 8 bits are two 4-bit weights that read the same x,
code = 16 * high + low, in twice the slots.

Prepared tensors, in order; S slots and B = S/block blocks along K (`layout.arrange_slots`), P planes (2 for 8 bits,
else 1), N16 = N rounded up to 16; those that are not needed are empty:
packed uint8 [N16, P*S/2]; scale_offset bfloat16 [P*B, N16, 2]; rows uint8 [N*B, row bytes]; scale float32 [N*B, 1],
empty where the rows hold it; column int64 [S], empty where columns keep their place; zero uint8 [N, B], for `restore`,
only where 2- and 3-bit codes were moved by zero-points that differ.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from llmquant.kernels.layout import (
    LinearShape,
    Slots,
    arrange_slots,
    gather_columns,
    gather_groups,
    ungather_columns,
)
from llmquant.weight import QuantizedWeight

BLOCKS = (256, 128, 64, 32)
"""Group sizes the packed kernel knows, largest first: fewer scales are less to read."""

MIN_GROUP_SIZE = 16
"""Smaller groups would more than double in width when they are padded to the smallest block."""

PACKED_BELOW_ROWS = 40
"""Rows of x from which the other layout beats the packed one (4 bits; half of it for 8), by `scripts/bench_linear`."""

PIECE = 1 << 20
"""Weights of one dense matmul: two MB in bfloat16, and enough output features for it to be efficient."""

UNPACK = 1 << 18
"""Weights unpacked at a time: one MB in float32, about a second-level cache."""

_int4pack_mm = torch.ops.aten._weight_int4pack_mm_for_cpu.default
_unpack_4bit_rows = torch.ops.quantized.embedding_bag_4bit_unpack.default
_unpack_8bit_rows = torch.ops.quantized.embedding_bag_byte_unpack.default
_NO_TENSOR = torch.empty(0)


def refuses(layer: LinearShape, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run the linear, or None."""
    if device.type != "cpu":
        return f"runs on the CPU, not on {device.type}"
    if layer.num_groups > 1 and layer.group_size < MIN_GROUP_SIZE:
        return f"group_size {layer.group_size} is below {MIN_GROUP_SIZE}"
    capability = torch.backends.cpu.get_cpu_capability()
    if not capability.startswith("AVX") or sys.platform == "win32":
        return f"torch has no vectorised 4-bit kernel here (CPU capability {capability} on {sys.platform})"
    return None


def prepare(weight: QuantizedWeight, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """`packed` and `rows`; only `rows` where x will not be bfloat16."""
    slots, codes_NS, scale_NB, zero_NB = _arranged(weight)
    moved = weight.spec.bits < 4 and not weight.spec.symmetric
    kept = _column(slots), weight.zero_NG.cpu()[:, slots.group_B] if moved else _NO_TENSOR.byte()
    rows, scale = _rows(codes_NS, scale_NB, zero_NB, weight.spec.bits)
    if dtype != torch.bfloat16:
        return _NO_TENSOR, _NO_TENSOR, rows, scale, *kept
    return *_packed(codes_NS, scale_NB, zero_NB, weight.spec.bits), rows, scale, *kept


def multiplies_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 on this processor, rather than float32 in disguise."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def pack_dense(weight_NK: Tensor) -> Tensor:
    """A bfloat16 weight in oneDNN's blocks: an opaque tensor."""
    return torch.ops.mkldnn._reorder_linear_weight(weight_NK.contiguous(), None)


def unpack_dense(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    """The way back: bfloat16 [N, K]."""
    return packed.to_dense()


def multiply_dense(x: Tensor, packed: Tensor, bias_N: Tensor | None, out_features: int) -> Tensor:
    """x [..., K] bfloat16 -> y [..., N], the bits of `F.linear`; there is no gradient."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias_N, "none", [], "")


def matmul(x: Tensor, prepared: tuple[Tensor, ...], bias_N: Tensor | None, layer: LinearShape) -> Tensor:
    """x [..., K] of any floating dtype -> y [..., N] in the same dtype."""
    packed, scale_offset, rows, scale, column_S, _ = prepared
    num_planes = 2 if layer.bits == 8 else 1
    x_MS = gather_columns(x.reshape(-1, layer.in_features), column_S, _slots_of_rows(rows, layer))
    limit = PACKED_BELOW_ROWS // num_planes
    if x.dtype == torch.bfloat16 and x_MS.shape[0] < limit and packed.numel():
        y_MN = _multiply_packed(x_MS, packed, scale_offset, bias_N, layer.out_features, num_planes)
    else:
        y_MN = _unpack_and_multiply(x_MS, rows, scale, bias_N, layer).to(x.dtype)
    return y_MN.view(*x.shape[:-1], layer.out_features)


def dequantize(prepared: tuple[Tensor, ...], layer: LinearShape, dtype: torch.dtype) -> Tensor:
    """The dense weight [N, K]: computed in float32 and rounded once to dtype."""
    _, _, rows, scale, column_S, _ = prepared
    weight_NS = _unpack(rows, scale, layer, dtype)
    return ungather_columns(weight_NS, column_S, layer.in_features)


def restore(prepared: tuple[Tensor, ...], layer: LinearShape, group_K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """codes_NK, scale_NG float32 and zero_NG as they were before `prepare`, from the exact layout `rows`."""
    _, _, rows, scale, column_S, zero_NB = prepared
    if layer.bits == 8:
        codes, pair = rows[:, :-8], rows[:, -8:].contiguous().view(torch.float32)
    else:
        halves, pair = rows[:, :-4], rows[:, -4:].contiguous().view(torch.float16).float()
        codes = torch.stack([halves & 15, halves >> 4], dim=-1).flatten(1)
    block = codes.shape[1]
    codes_NS = codes.reshape(layer.out_features, -1)
    scale_NB = (scale if scale.numel() else pair[:, :1]).view(layer.out_features, -1)
    stored_zero_NB = (-pair[:, 1] / pair[:, 0]).round().to(torch.uint8).view(layer.out_features, -1)
    if layer.bits < 4:
        if not zero_NB.numel():
            zero_NB = torch.full_like(stored_zero_NB, 2 ** (layer.bits - 1))
        codes_NS = codes_NS - (stored_zero_NB - zero_NB).repeat_interleave(block, dim=1)
    else:
        zero_NB = stored_zero_NB
    codes_NK = ungather_columns(codes_NS, column_S, layer.in_features)
    return codes_NK, *gather_groups(scale_NB, zero_NB, group_K, layer, block)


def _arranged(weight: QuantizedWeight) -> tuple[Slots, Tensor, Tensor, Tensor]:
    """The slots, codes_NS uint8, scale_NB float32 and zero_NB uint8, on the CPU. Empty slots hold a middling code."""
    layer = LinearShape.of(weight)
    group_size = layer.in_features if layer.num_groups == 1 else layer.group_size
    fitting = (block for block in BLOCKS if group_size % block == 0 and layer.in_features % block == 0)
    block = next(fitting, BLOCKS[-1])
    slots = arrange_slots(weight, block, block)
    codes_NS = slots.spread(weight.codes_NK.cpu(), weight.spec.mid_code)
    scale_NB = weight.scale_NG.cpu().float()[:, slots.group_B]
    zero_NB = weight.zero_NG.cpu()[:, slots.group_B]
    if weight.spec.bits < 4:
        codes_NS = codes_NS + (8 - zero_NB).repeat_interleave(block, dim=1)
        zero_NB = torch.full_like(zero_NB, 8)
    return slots, codes_NS, scale_NB, zero_NB


def _column(slots: Slots) -> Tensor:
    return _NO_TENSOR.long() if slots.is_prefix else slots.column_S


def _packed(codes_NS: Tensor, scale_NB: Tensor, zero_NB: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """What `_weight_int4pack_mm_for_cpu` reads: packed uint8 [N16, P*S/2], scale_offset bfloat16 [P*B, N16, 2]."""
    num_rows, num_slots = codes_NS.shape
    code_NBb = codes_NS.view(*zero_NB.shape, -1)
    scale_bf16_NB = scale_NB.bfloat16()
    mean_code_NB = code_NBb.sum(dim=-1, dtype=torch.int32) / code_NBb.shape[-1]
    if bits == 8:
        nibbles_NS = torch.cat([codes_NS >> 4, codes_NS & 15], dim=1)
        high_offset_NB = ((128.0 - zero_NB) * scale_NB).bfloat16()
        high_NB2 = torch.stack([scale_bf16_NB * 16, high_offset_NB], dim=-1)
        covered_NB = (mean_code_NB - 136.0) * scale_bf16_NB + high_offset_NB
    else:
        nibbles_NS, high_NB2 = codes_NS, None
        covered_NB = (mean_code_NB - 8.0) * scale_bf16_NB
    offset_NB = (mean_code_NB - zero_NB) * scale_NB - covered_NB
    pair_NB2 = torch.stack([scale_bf16_NB, offset_NB.bfloat16()], dim=-1)
    if high_NB2 is not None:
        pair_NB2 = torch.cat([high_NB2, pair_NB2], dim=1)
    pair_NB2 = F.pad(pair_NB2, (0, 0, 0, 0, 0, -num_rows % 16))
    # The layout is blocked by at most 64 rows, so it can be made in pieces: packing wants int32, eight times as much.
    pieces = F.pad(nibbles_NS, (0, 0, 0, -num_rows % 16)).split(max(64, PIECE // num_slots // 64 * 64))
    packed = torch.cat([torch.ops.aten._convert_weight_to_int4pack_for_cpu(piece.int(), 1) for piece in pieces])
    return packed, pair_NB2.transpose(0, 1).contiguous()


def _multiply_packed(
    x_MS: Tensor, packed: Tensor, scale_offset: Tensor, bias_N: Tensor | None, out_features: int, num_planes: int
) -> Tensor:
    if num_planes == 2:
        x_MS = torch.cat([x_MS, x_MS], dim=1)
    y_MN = _int4pack_mm(x_MS.contiguous(), packed, x_MS.shape[1] // scale_offset.shape[0], scale_offset)
    if y_MN.shape[1] != out_features:
        y_MN = y_MN[:, :out_features].contiguous()
    return y_MN if bias_N is None else y_MN.add_(bias_N)


def _rows(codes_NS: Tensor, scale_NB: Tensor, zero_NB: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """rows uint8 [N*B, bytes] and scale [N*B, 1]. A row is the codes of a block, then its scale and its offset
    -zero * scale. 4 bits: the even code in the low half of a byte, scale and offset in float16; 8 bits: a byte per
    code, scale and offset in float32. Where float16 would round one of the two, all rows hold 1 and -zero instead, and
    the scale stands beside them, for another pass over the weights."""
    scale, zero = scale_NB.reshape(-1), zero_NB.reshape(-1).float()
    pair = torch.stack([scale, -zero * scale], dim=1)
    narrow = (torch.float16,) if bits != 8 else (torch.float16, torch.bfloat16)
    exact = pair if bits != 8 else scale
    fits = any(torch.equal(exact.to(dtype).float(), exact) for dtype in narrow)
    if not fits:
        pair = torch.stack([torch.ones_like(scale), -zero], dim=1)
    codes = codes_NS.reshape(len(scale), -1)
    if bits == 8:
        rows = torch.cat([codes, pair.view(torch.uint8)], dim=1)
    else:
        rows = torch.cat([codes[:, 0::2] | (codes[:, 1::2] << 4), pair.half().view(torch.uint8)], dim=1)
    return rows, _NO_TENSOR if fits else scale[:, None]


def _slots_of_rows(rows: Tensor, layer: LinearShape) -> int:
    num_blocks, num_bytes = rows.shape[0] // layer.out_features, rows.shape[1]
    return num_blocks * (num_bytes - 8 if layer.bits == 8 else (num_bytes - 4) * 2)


def _unpack(
    rows: Tensor, scale: Tensor, layer: LinearShape, dtype: torch.dtype, features: slice = slice(None)
) -> Tensor:
    """Some output features -> their dense weight [n, S] in dtype, exact but for the one rounding."""
    num_blocks = rows.shape[0] // layer.out_features
    first, last, _ = features.indices(layer.out_features)
    unpack_rows = _unpack_8bit_rows if layer.bits == 8 else _unpack_4bit_rows
    weight_NS = torch.empty(last - first, _slots_of_rows(rows, layer), dtype=dtype)
    step = max(1, UNPACK // weight_NS.shape[1])
    for start in range(first, last, step):
        stop = min(start + step, last)
        span = slice(start * num_blocks, stop * num_blocks)
        weight = unpack_rows(rows[span])
        if scale.numel():
            weight.mul_(scale[span])
        weight_NS[start - first : stop - first].view(weight.shape).copy_(weight)
    return weight_NS


def _unpack_and_multiply(
    x_MS: Tensor, rows: Tensor, scale: Tensor, bias_N: Tensor | None, layer: LinearShape
) -> Tensor:
    """Dense matmul over pieces of the weight, in bfloat16 where the processor has it and x is, else in float32."""
    compute = torch.bfloat16 if x_MS.dtype == torch.bfloat16 and multiplies_bfloat16() else torch.float32
    x_MS = x_MS.to(compute)
    bias_N = None if bias_N is None else bias_N.to(compute)
    step = max(1, PIECE // x_MS.shape[1])
    pieces = []
    for first in range(0, layer.out_features, step):
        features = slice(first, first + step)
        weight_NS = _unpack(rows, scale, layer, compute, features)
        pieces.append(F.linear(x_MS, weight_NS, None if bias_N is None else bias_N[features]))
    return torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]
