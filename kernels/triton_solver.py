"""Triton kernels of the quantizer: the column loop of GPTQ and of coordinate descent, and the range search.

In PyTorch, the column loop takes six launches a column. Here one launch rounds all columns of a panel. A program
holds some rows of the weight (out_features) and all columns of the panel in registers. It rounds one column after the
other, and subtracts each column's effect from all columns of the panel by a rank-one update. Rows do not depend on each
other, so the programs need no barriers, and the result does not depend on their order.

One program is one warp. It takes the sum over the columns of its tile within the warp, without shared memory.

The arithmetic is float32 with the same operations as the PyTorch form in `algorithms/`. Sums in another order can
change a value in its last bits, which changes a code only if the value lies at the midpoint of two codes.

Letters: N out_features, B columns of a panel, R rows of a program, S columns of one group, C columns of a chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _round_even(value):
    """Round to the nearest integer, to even at a tie, for numbers below 2^22 in size.

    The sum with 1.5 * 2^23 has a unit in the last place of 1.
    """
    return (value + 12582912.0) - 12582912.0


@triton.jit
def _clamp(value, lowest, highest):
    """Limit values to a range. NaN stays NaN, so that it shows in the errors of the result."""
    value = tl.maximum(value, lowest, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(value, highest, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def round_panel_kernel(
    values,
    old_q,
    matrix,
    groups,
    scales,
    zeros,
    q,
    errors,
    num_rows,
    num_columns,
    matrix_stride,
    max_code,
    DESCEND: tl.constexpr,
    B: tl.constexpr,
    R: tl.constexpr,
):
    """Round the columns of one panel, one after the other.

    values, old_q, q, errors: float32 [num_columns, num_rows]. matrix: float32 [num_columns, num_columns] with row
    stride matrix_stride; row j holds the effect of column j on the columns of the panel. groups: int64 [num_columns],
    group of each column. scales, zeros: float32 [groups, num_rows].

    GPTQ: values are the weights to round, and matrix is the factor U.
        q = round(value / scale), error = (value - scale * q) / U_jj
    Coordinate descent (DESCEND): values are the columns of H (W - Q), and matrix is H.
        q = round(old_q + value / (H_jj * scale)), error = (q - old_q) * scale
    In both, values -= matrix[j] * error.
    """
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    column_B = tl.arange(0, B)
    inside_R = row_R < num_rows
    inside_B = column_B < num_columns
    values_BR = tl.load(
        values + column_B[:, None] * num_rows + row_R[None, :],
        mask=inside_B[:, None] & inside_R[None, :],
        other=0.0,
    )
    # The loads of a column are issued one column ahead, because each column waits for the one before it.
    group = tl.load(groups)
    scale_R = tl.load(scales + group * num_rows + row_R, mask=inside_R, other=1.0)
    zero_R = tl.load(zeros + group * num_rows + row_R, mask=inside_R, other=0.0)
    effect_B = tl.load(matrix + column_B, mask=inside_B, other=0.0)
    divisor = tl.load(matrix)
    old_R = tl.zeros([R], tl.float32)
    if DESCEND:
        old_R = tl.load(old_q + row_R, mask=inside_R, other=0.0)
    for column in range(num_columns):
        following = tl.minimum(column + 1, num_columns - 1)
        group = tl.load(groups + following)
        next_effect_B = tl.load(matrix + following * matrix_stride + column_B, mask=inside_B, other=0.0)
        next_divisor = tl.load(matrix + following * (matrix_stride + 1))
        next_scale_R = tl.load(scales + group * num_rows + row_R, mask=inside_R, other=1.0)
        next_zero_R = tl.load(zeros + group * num_rows + row_R, mask=inside_R, other=0.0)
        next_old_R = old_R
        if DESCEND:
            next_old_R = tl.load(old_q + following * num_rows + row_R, mask=inside_R, other=0.0)
        value_R = tl.sum(tl.where((column_B == column)[:, None], values_BR, 0.0), axis=0)
        if DESCEND:
            unrounded_R = old_R + tl.div_rn(tl.div_rn(value_R, divisor + tl.zeros([R], tl.float32)), scale_R)
        else:
            unrounded_R = tl.div_rn(value_R, scale_R)
        q_R = _round_even(_clamp(unrounded_R, -zero_R, max_code - zero_R))
        if DESCEND:
            error_R = (q_R - old_R) * scale_R
        else:
            error_R = tl.div_rn(value_R - q_R * scale_R, divisor + tl.zeros([R], tl.float32))
        values_BR -= effect_B[:, None] * error_R[None, :]
        tl.store(q + column * num_rows + row_R, q_R, mask=inside_R)
        tl.store(errors + column * num_rows + row_R, error_R, mask=inside_R)
        effect_B, divisor, scale_R, zero_R, old_R = next_effect_B, next_divisor, next_scale_R, next_zero_R, next_old_R


@triton.jit
def _stored_scale(scale, smallest, largest, DTYPE: tl.constexpr):
    """Clamp a scale to the limits of its storage dtype (0 float32, 1 float16, 2 bfloat16) and round it to the dtype."""
    scale = tl.minimum(tl.maximum(scale, smallest), largest)
    if DTYPE == 1:
        scale = scale.to(tl.float16).to(tl.float32)
    if DTYPE == 2:  # by hand, because the cast of Triton's interpreter truncates
        bits = scale.to(tl.int32, bitcast=True)
        scale = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def search_range_kernel(
    weights,
    importance,
    shrinks,
    scales,
    zeros,
    num_rows,
    num_columns,
    group_size,
    num_shrinks,
    max_code,
    min_zero,
    mid_code,
    smallest,
    largest,
    SYMMETRIC: tl.constexpr,
    DTYPE: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
):
    """Search the range of every group (`algorithms/grid.py:search_range`): one program for R rows of one group.

    weights: float32 [num_columns, num_rows]. importance: float32 [num_columns]. shrinks: float32 [num_shrinks]. scales,
    zeros: float32 [groups, num_rows], the result. The first candidate is the range without a shrink factor.
    """
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    group = tl.program_id(1)
    inside_R = row_R < num_rows
    first = group * group_size
    last = tl.minimum(first + group_size, num_columns)
    column_C = tl.arange(0, C)

    low_R = tl.zeros([R], tl.float32)
    high_R = tl.zeros([R], tl.float32)
    for start in range(first, last, C):
        column = start + column_C
        inside_CR = (column < last)[:, None] & inside_R[None, :]
        weight_CR = tl.load(
            weights + column[:, None].to(tl.int64) * num_rows + row_R[None, :], mask=inside_CR, other=0.0
        )
        low_R = tl.minimum(low_R, tl.min(weight_CR, axis=0))
        high_R = tl.maximum(high_R, tl.max(weight_CR, axis=0))
    if SYMMETRIC:
        high_R = tl.maximum(high_R, -low_R)
        low_R = -high_R
    dead_R = high_R <= low_R
    low_R = tl.where(dead_R, -1.0, low_R)
    high_R = tl.where(dead_R, 1.0, high_R)

    best_R = tl.zeros([R], tl.float32)
    best_scale_R = tl.zeros([R], tl.float32)
    best_zero_R = tl.zeros([R], tl.float32)
    divisor_R = max_code + tl.zeros([R], tl.float32)
    for trial in range(-1, num_shrinks):
        shrink = tl.load(shrinks + tl.maximum(trial, 0))
        shrink = tl.where(trial < 0, 1.0, shrink)
        trial_low_R, trial_high_R = shrink * low_R, shrink * high_R
        scale_R = _stored_scale(tl.div_rn(trial_high_R - trial_low_R, divisor_R), smallest, largest, DTYPE)
        if SYMMETRIC:
            zero_R = mid_code + tl.zeros([R], tl.float32)
        else:
            zero_R = tl.minimum(tl.maximum(tl.div_rn(-trial_low_R, scale_R), min_zero), max_code)
            zero_R = _round_even(zero_R)
        loss_R = tl.zeros([R], tl.float32)
        for start in range(first, last, C):
            column = start + column_C
            inside_C = column < last
            weight_CR = tl.load(
                weights + column[:, None].to(tl.int64) * num_rows + row_R[None, :],
                mask=inside_C[:, None] & inside_R[None, :],
                other=0.0,
            )
            importance_C = tl.load(importance + column, mask=inside_C, other=0.0)
            q_CR = tl.div_rn(weight_CR, tl.broadcast_to(scale_R[None, :], (C, R)))
            q_CR = _clamp(q_CR, -zero_R[None, :], max_code - zero_R[None, :])
            error_CR = _round_even(q_CR) * scale_R[None, :] - weight_CR
            loss_R += tl.sum(importance_C[:, None] * error_CR * error_CR, axis=0)
        better_R = (loss_R < best_R) | (trial < 0)
        best_R = tl.where(better_R, loss_R, best_R)
        best_scale_R = tl.where(better_R, scale_R, best_scale_R)
        best_zero_R = tl.where(better_R, zero_R, best_zero_R)
    tl.store(scales + group * num_rows + row_R, best_scale_R, mask=inside_R)
    tl.store(zeros + group * num_rows + row_R, best_zero_R, mask=inside_R)
