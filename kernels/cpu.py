"""Backend `cpu`: quantized linears on x86 processors with AVX2 or AVX-512, by torch's own operators.

It serves processors on which backend `llvm` cannot run. `prepare` makes two layouts of the same codes. The number of
rows of x decides which of them a call reads:

- `packed`, for few rows, is the layout of `aten::_weight_int4pack_mm_for_cpu`. That operator sums in float32 and never
  rounds a weight to bfloat16. It unpacks the codes again for every four rows of x. It is therefore the fastest operator
  for decoding, but half as fast as a dense matmul for many rows. Only its bfloat16 form is vectorised (float16 and
  float32 take a hundred times longer). The byte order of the layout depends on the processor, so it is never saved.
- `rows`, for many rows and for every x that is not bfloat16, holds the codes in the row format of torch's quantized
  embedding tables, whose unpacking is vectorised. The weights are unpacked exactly in float32 and rounded once to
  the dtype of x. The dense matmul takes them piece by piece while they are in the cache.

At 4 bits and group size 64, both layouts together take 1.2 bytes per weight. A packed checkpoint takes 0.55, and
bfloat16 takes 2.

The packed kernel computes (code - 8) * scale + offset, with scale and offset rounded to bfloat16. Rounding a float16
scale loses three bits, and the mean of x is seldom zero. The offset is therefore not (8 - zero) * scale, but the value
that keeps the mean weight of each block exact. Codes of 2 and 3 bits become 4-bit codes with zero-point 8, so that
their offset is 0. Codes of 8 bits become two 4-bit weights that read the same x, code = 16 * high + low, in twice the
slots.

Prepared tensors, in order; S slots and B = S/block blocks along K (`layout.arrange_slots`), P planes (2 for 8 bits,
else 1), N16 = N rounded up to 16; tensors that are not needed are empty:
packed uint8 [N16, P*S/2]; scale_offset bfloat16 [P*B, N16, 2]; rows uint8 [N*B, row bytes]; scale float32 [N*B, 1],
empty if the rows hold it; column int64 [S], empty if the columns keep their order; zero uint8 [N, B], for `restore`,
only if 2- and 3-bit codes with differing zero-points were shifted.
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
"""Group sizes that the packed kernel supports. The largest comes first, because it has the fewest scales to read."""

MIN_GROUP_SIZE = 16
"""Smallest group size. Padding a smaller group to the smallest block would more than double its width."""

PACKED_BELOW_ROWS = 40
"""Rows of x from which `rows` is faster than `packed` at 4 bits (half as many at 8), by `scripts/bench/linear.py`."""

DENSE_PIECE_WEIGHTS = 1 << 20
"""Weights of one piece of a dense matmul: two MB in bfloat16, and enough output features to be efficient."""

UNPACK_WEIGHTS = 1 << 18
"""Weights that are unpacked at a time: one MB in float32, about the size of a second-level cache."""

_int4pack_mm = torch.ops.aten._weight_int4pack_mm_for_cpu.default
_torch_unpack_4bit = torch.ops.quantized.embedding_bag_4bit_unpack.default
_torch_unpack_8bit = torch.ops.quantized.embedding_bag_byte_unpack.default
_NO_TENSOR = torch.empty(0)


def refuses(shape: LinearShape, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why this backend cannot run the linear, or None if it can."""
    if device.type != "cpu":
        return f"runs on the CPU, not on {device.type}"
    if shape.num_groups > 1 and shape.group_size < MIN_GROUP_SIZE:
        return f"group_size {shape.group_size} is below {MIN_GROUP_SIZE}"
    capability = torch.backends.cpu.get_cpu_capability()
    if not capability.startswith("AVX") or sys.platform == "win32":
        return f"torch has no vectorised 4-bit kernel here (CPU capability {capability} on {sys.platform})"
    return None


def prepare(weight: QuantizedWeight, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Return the prepared tensors (see above); `packed` is empty unless dtype is bfloat16."""
    slots, codes_NS, scale_NB, zero_NB = _arrange(weight)
    zeros_shifted = weight.spec.bits < 4 and not weight.spec.symmetric
    for_restore = _column_of_slot(slots), weight.zero_NG.cpu()[:, slots.group_B] if zeros_shifted else _NO_TENSOR.byte()
    rows, scale = _pack_rows(codes_NS, scale_NB, zero_NB, weight.spec.bits)
    if dtype != torch.bfloat16:
        return _NO_TENSOR, _NO_TENSOR, rows, scale, *for_restore
    return *_pack_int4(codes_NS, scale_NB, zero_NB, weight.spec.bits), rows, scale, *for_restore


def onednn_multiplies_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 itself on this processor, rather than converting it to float32."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def pack_dense(weight_NK: Tensor) -> Tensor:
    """Rearrange a bfloat16 weight [N, K] into oneDNN's blocked layout, an opaque tensor."""
    return torch.ops.mkldnn._reorder_linear_weight(weight_NK.contiguous(), None)


def unpack_dense(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    """Return the weight, bfloat16 [N, K], from the layout of `pack_dense`."""
    return packed.to_dense()


def multiply_dense(x: Tensor, packed: Tensor, bias_N: Tensor | None, out_features: int) -> Tensor:
    """x [..., K] bfloat16 -> y [..., N], with the bits of `F.linear` but without a gradient."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias_N, "none", [], "")


def matmul(x: Tensor, prepared: tuple[Tensor, ...], bias_N: Tensor | None, shape: LinearShape) -> Tensor:
    """x [..., K] of any floating dtype -> y [..., N] in the same dtype."""
    packed, scale_offset, rows, scale, column_S, _ = prepared
    num_planes = 2 if shape.bits == 8 else 1
    x_MS = gather_columns(x.reshape(-1, shape.in_features), column_S, _slots_of_rows(rows, shape))
    limit = PACKED_BELOW_ROWS // num_planes
    if x.dtype == torch.bfloat16 and x_MS.shape[0] < limit and packed.numel():
        y_MN = _multiply_int4(x_MS, packed, scale_offset, bias_N, shape.out_features, num_planes)
    else:
        y_MN = _unpack_and_multiply(x_MS, rows, scale, bias_N, shape).to(x.dtype)
    return y_MN.view(*x.shape[:-1], shape.out_features)


def dequantize(prepared: tuple[Tensor, ...], shape: LinearShape, dtype: torch.dtype) -> Tensor:
    """Return the dense weight [N, K], computed in float32 and rounded once to dtype."""
    _, _, rows, scale, column_S, _ = prepared
    weight_NS = _unpack_rows(rows, scale, shape, dtype)
    return ungather_columns(weight_NS, column_S, shape.in_features)


def restore(prepared: tuple[Tensor, ...], shape: LinearShape, group_K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the codes_NK, scale_NG (in float32) and zero_NG that `prepare` got, from the exact layout `rows`."""
    _, _, rows, scale, column_S, zero_NB = prepared
    if shape.bits == 8:
        codes, pair = rows[:, :-8], rows[:, -8:].contiguous().view(torch.float32)
    else:
        code_pairs, pair = rows[:, :-4], rows[:, -4:].contiguous().view(torch.float16).float()
        codes = torch.stack([code_pairs & 15, code_pairs >> 4], dim=-1).flatten(1)
    block = codes.shape[1]
    codes_NS = codes.reshape(shape.out_features, -1)
    scale_NB = (scale if scale.numel() else pair[:, :1]).view(shape.out_features, -1)
    stored_zero_NB = (-pair[:, 1] / pair[:, 0]).round().to(torch.uint8).view(shape.out_features, -1)
    if shape.bits < 4:
        if not zero_NB.numel():
            zero_NB = torch.full_like(stored_zero_NB, 2 ** (shape.bits - 1))
        codes_NS = codes_NS - (stored_zero_NB - zero_NB).repeat_interleave(block, dim=1)
    else:
        zero_NB = stored_zero_NB
    codes_NK = ungather_columns(codes_NS, column_S, shape.in_features)
    return codes_NK, *gather_groups(scale_NB, zero_NB, group_K, shape, block)


def _arrange(weight: QuantizedWeight) -> tuple[Slots, Tensor, Tensor, Tensor]:
    """Return slots, codes_NS uint8, scale_NB float32 and zero_NB uint8, on the CPU. Padding holds the middle code."""
    shape = LinearShape.of(weight)
    group_size = shape.in_features if shape.num_groups == 1 else shape.group_size
    fitting = (block for block in BLOCKS if group_size % block == 0 and shape.in_features % block == 0)
    block = next(fitting, BLOCKS[-1])
    slots = arrange_slots(weight, block, block)
    codes_NS = slots.spread(weight.codes_NK.cpu(), weight.spec.mid_code)
    scale_NB = weight.scale_NG.cpu().float()[:, slots.group_B]
    zero_NB = weight.zero_NG.cpu()[:, slots.group_B]
    if weight.spec.bits < 4:
        codes_NS = codes_NS + (8 - zero_NB).repeat_interleave(block, dim=1)
        zero_NB = torch.full_like(zero_NB, 8)
    return slots, codes_NS, scale_NB, zero_NB


def _column_of_slot(slots: Slots) -> Tensor:
    """Return the column of each slot, int64 [S]; empty if the columns keep their order."""
    return _NO_TENSOR.long() if slots.keeps_order else slots.column_S


def _pack_int4(codes_NS: Tensor, scale_NB: Tensor, zero_NB: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return packed uint8 [N16, P*S/2] and scale_offset bfloat16 [P*B, N16, 2] for `_weight_int4pack_mm_for_cpu`."""
    num_rows, num_slots = codes_NS.shape
    code_NBb = codes_NS.view(*zero_NB.shape, -1)
    scale_bf16_NB = scale_NB.bfloat16()
    mean_code_NB = code_NBb.sum(dim=-1, dtype=torch.int32) / code_NBb.shape[-1]
    if bits == 8:
        nibbles_NS = torch.cat([codes_NS >> 4, codes_NS & 15], dim=1)
        high_offset_NB = ((128.0 - zero_NB) * scale_NB).bfloat16()
        high_NB2 = torch.stack([scale_bf16_NB * 16, high_offset_NB], dim=-1)
        kernel_mean_NB = (mean_code_NB - 136.0) * scale_bf16_NB + high_offset_NB
    else:
        nibbles_NS, high_NB2 = codes_NS, None
        kernel_mean_NB = (mean_code_NB - 8.0) * scale_bf16_NB
    offset_NB = (mean_code_NB - zero_NB) * scale_NB - kernel_mean_NB
    pair_NB2 = torch.stack([scale_bf16_NB, offset_NB.bfloat16()], dim=-1)
    if high_NB2 is not None:
        pair_NB2 = torch.cat([high_NB2, pair_NB2], dim=1)
    pair_NB2 = F.pad(pair_NB2, (0, 0, 0, 0, 0, -num_rows % 16))
    # Pack in pieces of whole blocks of 64 rows, because the operator takes int32, eight times the packed size.
    pieces = F.pad(nibbles_NS, (0, 0, 0, -num_rows % 16)).split(max(64, DENSE_PIECE_WEIGHTS // num_slots // 64 * 64))
    packed = torch.cat([torch.ops.aten._convert_weight_to_int4pack_for_cpu(piece.int(), 1) for piece in pieces])
    return packed, pair_NB2.transpose(0, 1).contiguous()


def _multiply_int4(
    x_MS: Tensor, packed: Tensor, scale_offset: Tensor, bias_N: Tensor | None, out_features: int, num_planes: int
) -> Tensor:
    """x_MS bfloat16 -> y_MN bfloat16, by the packed kernel."""
    if num_planes == 2:
        x_MS = torch.cat([x_MS, x_MS], dim=1)
    y_MN = _int4pack_mm(x_MS.contiguous(), packed, x_MS.shape[1] // scale_offset.shape[0], scale_offset)
    if y_MN.shape[1] != out_features:
        y_MN = y_MN[:, :out_features].contiguous()
    return y_MN if bias_N is None else y_MN.add_(bias_N)


def _pack_rows(codes_NS: Tensor, scale_NB: Tensor, zero_NB: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return rows uint8 [N*B, bytes] and scale float32 [N*B, 1]; scale is empty if the rows hold it.

    A row consists of the codes of a block, its scale and its offset -zero * scale. At 4 bits, a byte holds two codes,
    the even column in its low nibble, and scale and offset are float16. At 8 bits, a byte holds one code, and scale and
    offset are float32. If the stored dtype would round one of the two, all rows hold 1 and -zero instead, and the scale
    is a separate tensor. Applying it takes another pass over the weights.
    """
    scale, zero = scale_NB.reshape(-1), zero_NB.reshape(-1).float()
    pair = torch.stack([scale, -zero * scale], dim=1)
    stored_dtypes = (torch.float16,) if bits != 8 else (torch.float16, torch.bfloat16)
    exact = pair if bits != 8 else scale
    fits = any(torch.equal(exact.to(dtype).float(), exact) for dtype in stored_dtypes)
    if not fits:
        pair = torch.stack([torch.ones_like(scale), -zero], dim=1)
    codes = codes_NS.reshape(len(scale), -1)
    if bits == 8:
        rows = torch.cat([codes, pair.view(torch.uint8)], dim=1)
    else:
        rows = torch.cat([codes[:, 0::2] | (codes[:, 1::2] << 4), pair.half().view(torch.uint8)], dim=1)
    return rows, _NO_TENSOR if fits else scale[:, None]


def _slots_of_rows(rows: Tensor, shape: LinearShape) -> int:
    """Return S, the number of slots, computed from the size of `rows`."""
    num_blocks, num_bytes = rows.shape[0] // shape.out_features, rows.shape[1]
    return num_blocks * (num_bytes - 8 if shape.bits == 8 else (num_bytes - 4) * 2)


def _unpack_rows(
    rows: Tensor, scale: Tensor, shape: LinearShape, dtype: torch.dtype, features: slice = slice(None)
) -> Tensor:
    """Return the dense weight [n, S] of some output features, computed in float32 and rounded once to dtype."""
    num_blocks = rows.shape[0] // shape.out_features
    first, last, _ = features.indices(shape.out_features)
    unpack_rows = _torch_unpack_8bit if shape.bits == 8 else _torch_unpack_4bit
    weight_NS = torch.empty(last - first, _slots_of_rows(rows, shape), dtype=dtype)
    rows_at_once = max(1, UNPACK_WEIGHTS // weight_NS.shape[1])
    for start in range(first, last, rows_at_once):
        stop = min(start + rows_at_once, last)
        span = slice(start * num_blocks, stop * num_blocks)
        weight = unpack_rows(rows[span])
        if scale.numel():
            weight.mul_(scale[span])
        weight_NS[start - first : stop - first].view(weight.shape).copy_(weight)
    return weight_NS


def _unpack_and_multiply(
    x_MS: Tensor, rows: Tensor, scale: Tensor, bias_N: Tensor | None, shape: LinearShape
) -> Tensor:
    """Multiply by pieces of the dense weight, in bfloat16 if x and the processor allow it, else in float32."""
    compute = torch.bfloat16 if x_MS.dtype == torch.bfloat16 and onednn_multiplies_bfloat16() else torch.float32
    x_MS = x_MS.to(compute)
    bias_N = None if bias_N is None else bias_N.to(compute)
    rows_at_once = max(1, DENSE_PIECE_WEIGHTS // x_MS.shape[1])
    pieces = []
    for first in range(0, shape.out_features, rows_at_once):
        features = slice(first, first + rows_at_once)
        weight_NS = _unpack_rows(rows, scale, shape, compute, features)
        pieces.append(F.linear(x_MS, weight_NS, None if bias_N is None else bias_N[features]))
    return torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]
