"""The Triton kernels of `decode.py`: the small operations of a decode step.

Letters: S sequences, H query heads, G key and value heads, R = H / G, T places of the cache, D head dimension, P parts
into which the places are split, W width of a norm, I width of a feed-forward layer.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rms_norm_kernel(
    x, added, total, weight, out, width, inner, outer_stride, inner_stride, eps, KIND: tl.constexpr,
    BLOCK: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """x: [rows / inner, inner, W] with strides (outer_stride, inner_stride, 1). weight: [W]. added, total, out: [rows,
    W] contiguous.

    ADD: whether the norm is that of total = x + added, which is written too; without it, the two are not used.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    source = x + row // inner * outer_stride + row % inner * inner_stride
    values = tl.load(source + columns, mask=inside, other=0.0)
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


@triton.jit
def rotate_kernel(
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


@triton.jit
def silu_product_kernel(gate, up, out, width, gate_stride, up_stride, BLOCK: tl.constexpr):
    """gate, up: [rows, I] with strides (gate_stride, 1) and (up_stride, 1). out: [rows, I] contiguous."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gates = tl.load(gate + row * gate_stride + columns, mask=inside, other=0.0)
    ups = tl.load(up + row * up_stride + columns, mask=inside, other=0.0)
    floats = gates.to(tl.float32)
    activated = (floats / (1.0 + tl.exp(-floats))).to(gates.dtype).to(tl.float32)
    tl.store(out + row * width + columns, (activated * ups.to(tl.float32)).to(gates.dtype), mask=inside)


@triton.jit
def store_kernel(
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


@triton.jit
def attend_kernel(
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
def combine_kernel(sums, maxima, totals, out, num_parts, R: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr):
    """Add up the parts of one query head. sums, maxima, totals: as `attend_kernel` writes. out: [S, G, R, D]."""
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
