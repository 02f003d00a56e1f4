"""Triton kernels for the small operations of a decode step, each of which replaces several of PyTorch's.

A decode step of an 8B model reads its weights in a millisecond, so even two microseconds for each of a thousand small
kernels would dominate. The kernels round to the dtype of their inputs where the modules of transformers round, so their
results differ from those modules only by the order of sums.

    rms_norm     root mean square norm; add_rms_norm: of a sum, which is returned too
    rotate       rotary position embedding of queries and keys
    silu_product silu(gate) * up
    store        write the newest key and value into a cache
    attend       attention of one query per sequence over the used places of a cache, split along the places

Letters: S sequences, H query heads, G key and value heads, R = H / G, T places of the cache, D head dimension, P parts
into which the places are split, W width of a norm, I width of a feed-forward layer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_PLACES = 64
"""Places of the cache that one iteration of `attend` reads."""
MAX_PARTS = 32
"""Largest number of parts into which `attend` splits the places."""
WANTED_PROGRAMS = 264
"""Number of programs that `attend` starts if the cache is long enough: two for each multiprocessor of an H100."""
NORM_KINDS = (0, 1, 2)
"""Kinds of `rms_norm`: weight * round(x / rms); round(x / rms * (1 + weight)); round(x / rms * weight)."""


@triton.jit
def _rms_norm_kernel(
    x, added, total, weight, out, width, row_stride, eps, KIND: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr
):
    """x: [rows, W] with row_stride. weight: [W]. added, total, out: [rows, W] contiguous.

    ADD: whether the norm is that of total = x + added, which is written too; without it, the two are not used.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(x + row * row_stride + columns, mask=inside, other=0.0)
    if ADD:
        more = tl.load(added + row * width + columns, mask=inside, other=0.0)
        values = (values.to(tl.float32) + more.to(tl.float32)).to(values.dtype)
        tl.store(total + row * width + columns, values, mask=inside)
    weights = tl.load(weight + columns, mask=inside, other=0.0)
    floats = values.to(tl.float32)
    normed = floats * tl.math.rsqrt(tl.sum(floats * floats, axis=0) / width + eps)
    if KIND == 0:
        result = weights.to(tl.float32) * normed.to(values.dtype).to(tl.float32)
    elif KIND == 1:
        result = normed * (1.0 + weights.to(tl.float32))
    else:
        result = normed * weights.to(tl.float32)
    tl.store(out + row * width + columns, result.to(values.dtype), mask=inside)


def rms_norm(x: Tensor, weight_W: Tensor, eps: float, kind: int) -> Tensor:
    """Return the norm of the rows of x [..., W] in the dtype of x. kind: one of `NORM_KINDS`."""
    return _launch_norm(x, None, weight_W, eps, kind)[1]


def add_rms_norm(x: Tensor, added: Tensor, weight_W: Tensor, eps: float, kind: int) -> tuple[Tensor, Tensor]:
    """Return (x + added, the norm of that) for two tensors [..., W] of one dtype. kind: one of `NORM_KINDS`."""
    return _launch_norm(x, added.contiguous(), weight_W, eps, kind)


def _launch_norm(x: Tensor, added: Tensor | None, weight_W: Tensor, eps: float, kind: int) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    rows = x.reshape(-1, width)
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    total = rows if added is None else torch.empty_like(out)
    block = triton.next_power_of_2(width)
    _rms_norm_kernel[(rows.shape[0],)](
        rows, rows if added is None else added, total, weight_W, out, width, rows.stride(0), eps, KIND=kind,
        BLOCK=block, ADD=added is not None, num_warps=min(max(block // 512, 1), 8),
    )  # fmt: skip
    return total.view(x.shape), out.view(x.shape)


@triton.jit
def _rotate_kernel(
    q, k, cos, sin, q_out, k_out, num_heads, num_kv_heads, q_strides, k_strides, q_head, k_head, angle_stride,
    HALF: tl.constexpr,
):  # fmt: skip
    """q: [S, H, D] with strides (q_strides, q_head, 1); k: [S, G, D] likewise. cos, sin: [S, D] with angle_stride.

    q_out, k_out: contiguous.
    """
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, HALF)
    if head < num_heads:
        source = q + sequence * q_strides + head * q_head
        target = q_out + (sequence * num_heads + head) * 2 * HALF
    else:
        head -= num_heads
        source = k + sequence * k_strides + head * k_head
        target = k_out + (sequence * num_kv_heads + head) * 2 * HALF
    first = tl.load(source + columns)
    second = tl.load(source + HALF + columns)
    dtype = first.dtype
    first, second = first.to(tl.float32), second.to(tl.float32)
    angles = sequence * angle_stride + columns
    cos_1, cos_2 = tl.load(cos + angles).to(tl.float32), tl.load(cos + angles + HALF).to(tl.float32)
    sin_1, sin_2 = tl.load(sin + angles).to(tl.float32), tl.load(sin + angles + HALF).to(tl.float32)
    # PyTorch rounds both products before it adds them.
    turned_1 = (first * cos_1).to(dtype).to(tl.float32) + (-second * sin_1).to(dtype).to(tl.float32)
    turned_2 = (second * cos_2).to(dtype).to(tl.float32) + (first * sin_2).to(dtype).to(tl.float32)
    tl.store(target + columns, turned_1.to(dtype))
    tl.store(target + HALF + columns, turned_2.to(dtype))


def can_rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Return whether `rotate` supports these tensors."""
    head_dim = q.shape[-1]
    return (
        q.ndim == k.ndim == 4
        and cos.ndim == sin.ndim == 3
        and q.shape[2] == k.shape[2] == cos.shape[1] == 1
        and k.shape[-1] == cos.shape[-1] == sin.shape[-1] == head_dim
        and cos.shape[0] in (1, q.shape[0])
        and cos.shape == sin.shape
        and q.dtype == k.dtype == cos.dtype == sin.dtype
        and q.stride(-1) == k.stride(-1) == cos.stride(-1) == sin.stride(-1) == 1
        and cos.stride(0) == sin.stride(0)
        and head_dim == triton.next_power_of_2(head_dim)
        and head_dim >= 32
    )


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rotary position embedding of q [S, H, 1, D] and k [S, G, 1, D], as transformers computes it.

    cos, sin: [S, 1, D] or [1, 1, D]; both halves of D have the same angles.
    """
    num_sequences, num_heads, _, head_dim = q.shape
    num_kv_heads = k.shape[1]
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    _rotate_kernel[(num_sequences, num_heads + num_kv_heads)](
        q, k, cos, sin, q_out, k_out, num_heads, num_kv_heads, q.stride(0), k.stride(0), q.stride(1), k.stride(1),
        cos.stride(0) if cos.shape[0] > 1 else 0, HALF=head_dim // 2, num_warps=1,
    )  # fmt: skip
    return q_out, k_out


@triton.jit
def _silu_product_kernel(gate, up, out, count, BLOCK: tl.constexpr):
    """All three: `count` values, contiguous."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    gates = tl.load(gate + index, mask=inside, other=0.0)
    ups = tl.load(up + index, mask=inside, other=0.0)
    floats = gates.to(tl.float32)
    activated = (floats / (1.0 + tl.exp(-floats))).to(gates.dtype).to(tl.float32)
    tl.store(out + index, (activated * ups.to(tl.float32)).to(gates.dtype), mask=inside)


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up for two tensors [..., I] of one dtype."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    _silu_product_kernel[(triton.cdiv(gate.numel(), 512),)](gate, up, out, gate.numel(), BLOCK=512, num_warps=4)
    return out


@triton.jit
def _store_kernel(
    key, value, keys, values, length, num_places, num_heads, k_seq, k_head, v_seq, v_head, D: tl.constexpr
):
    """key, value: [S, G, D] with strides (k_seq, k_head, 1). keys, values: [S, G, T, D] contiguous.

    length: int64 [1], the place to write.
    """
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, D)
    target = ((sequence * num_heads + head) * num_places + tl.load(length)) * D + columns
    tl.store(keys + target, tl.load(key + sequence * k_seq + head * k_head + columns))
    tl.store(values + target, tl.load(value + sequence * v_seq + head * v_head + columns))


def can_store(key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Return whether `store` supports these tensors."""
    head_dim = key.shape[-1]
    return (
        key.shape == value.shape
        and key.shape[2] == 1
        and keys.is_contiguous()
        and values.is_contiguous()
        and keys.shape == values.shape
        and key.dtype == value.dtype == keys.dtype == values.dtype
        and key.stride(-1) == value.stride(-1) == 1
        and head_dim == triton.next_power_of_2(head_dim)
    )


def store(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, length: Tensor) -> None:
    """Write the key and the value [S, G, 1, D] of one token into place `length` (int64 [1]) of caches [S, G, T, D]."""
    num_sequences, num_heads, num_places, head_dim = keys.shape
    _store_kernel[(num_sequences, num_heads)](
        key, value, keys, values, length, num_places, num_heads, key.stride(0), key.stride(1), value.stride(0),
        value.stride(1), D=head_dim, num_warps=1,
    )  # fmt: skip


@triton.jit
def _attend_kernel(
    q, keys, values, mask, length, sums, maxima, totals, num_kv_heads, num_places, places_per_part, mask_stride,
    scale, R: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program reads one part of the places of one key head, for the R query heads that share it.

    q: [S, G, R, D] contiguous. keys, values: [S, G, T, D] contiguous. mask: bool [S, T] with mask_stride. length: int64
    [1], the place of the newest token. sums: float32 [S, G, P, R, D]. maxima, totals: float32 [S, G, P, R].
    """
    pair = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    rows, columns, steps = tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, BLOCK)
    row_inside = rows[:, None] < R
    query = tl.load(q + (pair * R + rows[:, None]) * D + columns[None, :], mask=row_inside, other=0.0)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    summed = tl.zeros((ROWS, D), tl.float32)
    start = part * places_per_part
    end = tl.minimum(start + places_per_part, tl.load(length).to(tl.int32) + 1)
    for first in range(start, end, BLOCK):
        places = first + steps
        inside = places < end
        address = (pair * num_places + places[:, None]) * D + columns[None, :]
        key = tl.load(keys + address, mask=inside[:, None], other=0.0)
        visible = tl.load(mask + (pair // num_kv_heads) * mask_stride + places, mask=inside, other=0) != 0
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        scores = tl.where(visible[None, :], scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        reference = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        shrink = tl.exp(largest - reference)
        weights = tl.exp(scores - reference[:, None])
        value = tl.load(values + address, mask=inside[:, None], other=0.0)
        total = total * shrink + tl.sum(weights, axis=1)
        summed = summed * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        largest = new_largest
    index = (pair * tl.num_programs(1) + part) * R + rows
    tl.store(sums + index[:, None] * D + columns[None, :], summed, mask=row_inside)
    tl.store(maxima + index, largest, mask=rows < R)
    tl.store(totals + index, total, mask=rows < R)


@triton.jit
def _combine_kernel(sums, maxima, totals, out, num_parts, R: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr):
    """Add up the parts of one query head. sums, maxima, totals: as `_attend_kernel` writes. out: [S, G, R, D]."""
    pair, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    parts, columns = tl.arange(0, PARTS), tl.arange(0, D)
    inside = parts < num_parts
    index = (pair * num_parts + parts) * R + row
    largest = tl.load(maxima + index, mask=inside, other=float("-inf"))
    share = tl.exp(largest - tl.max(largest, axis=0))
    total = tl.sum(tl.load(totals + index, mask=inside, other=0.0) * share, axis=0)
    summed = tl.load(sums + index[:, None] * D + columns[None, :], mask=inside[:, None], other=0.0)
    result = tl.sum(summed * share[:, None], axis=0) / total
    tl.store(out + (pair * R + row) * D + columns, result.to(out.dtype.element_ty))


def can_attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> bool:
    """Return whether `attend` supports these tensors."""
    head_dim = q.shape[-1]
    return (
        mask is not None
        and mask.dtype == torch.bool
        and mask.shape == (q.shape[0], 1, 1, keys.shape[2])
        and mask.stride(-1) == 1
        and q.shape[2] == 1
        and keys.shape == values.shape
        and keys.shape[-1] == head_dim
        and q.shape[1] % keys.shape[1] == 0
        and q.dtype == keys.dtype == values.dtype
        and keys.is_contiguous()
        and values.is_contiguous()
        and head_dim in (32, 64, 128, 256)
    )


def attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, length: Tensor, scale: float) -> Tensor:
    """Return the attention [S, 1, H, D] of q [S, H, 1, D] over the first `length + 1` places of a cache [S, G, T, D].

    mask: bool [S, 1, 1, T], True where a place is seen; each sequence must see at least one. length: int64 [1].
    """
    num_sequences, num_heads, _, head_dim = q.shape
    num_kv_heads, num_places = keys.shape[1], keys.shape[2]
    per_head = num_heads // num_kv_heads
    num_pairs = num_sequences * num_kv_heads
    most = min(triton.cdiv(num_places, BLOCK_PLACES), MAX_PARTS)
    blocks_per_part = triton.cdiv(
        triton.cdiv(num_places, BLOCK_PLACES), min(most, max(WANTED_PROGRAMS // num_pairs, 1))
    )
    places_per_part = blocks_per_part * BLOCK_PLACES
    num_parts = triton.cdiv(num_places, places_per_part)
    sums = q.new_empty((num_pairs, num_parts, per_head, head_dim), dtype=torch.float32)
    maxima = q.new_empty((2, num_pairs, num_parts, per_head), dtype=torch.float32)
    out = q.new_empty((num_sequences, 1, num_heads, head_dim))
    q = q.contiguous()
    _attend_kernel[(num_pairs, num_parts)](
        q, keys, values, mask, length, sums, maxima[0], maxima[1], num_kv_heads, num_places, places_per_part,
        mask.stride(0), scale, R=per_head, ROWS=max(16, triton.next_power_of_2(per_head)), D=head_dim,
        BLOCK=BLOCK_PLACES, num_warps=4, num_stages=2,
    )  # fmt: skip
    _combine_kernel[(num_pairs, per_head)](
        sums, maxima[0], maxima[1], out, num_parts, R=per_head, PARTS=triton.next_power_of_2(num_parts), D=head_dim,
        num_warps=2,
    )  # fmt: skip
    return out
