"""Backend `triton`: NVIDIA GPUs from compute capability 8.0, 2 to 8 bits, float16 and bfloat16.

The kernels and their layout are in `triton_w4a16.py`. This file brings weights into the layout and launches the
kernels. Up to a few hundred rows of x, the fused kernel multiplies by the codes directly. For more rows, a kernel
writes the dense weight and cuBLAS multiplies by it. Codes of 2 and 3 bits are stored as 4-bit codes. Codes of 8 bits
are stored as two planes of 4-bit codes over the same x: (high - zero_high) * 16 scale + (low - zero_low) * scale.

Backend `triton-invariant` runs every call with the same tiles, so a row of y has the same bits in any batch.

`join_weights` stores linears that read the same input in one tensor, so that one launch multiplies by all of them.

Prepared tensors, in order (letters as in `triton_w4a16.py`): words int32 [NP/64, P*T, 64, 16]; meta int32 [P*T, NP, B],
whose first stride is larger if other linears share its memory; done int32 [tiles], the counters of split-K, which are
zero between calls (one linear must therefore not run on two streams at once); column int64 [128 T], empty if the
columns keep their order; an empty tensor that carries the dtype of x; scale [N, G] as stored, for `restore`, only if
the dtype of x rounds it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from llmquant.kernels.layout import (
    LinearShape,
    arrange_slots,
    gather_columns,
    gather_groups,
    join_planes,
    ungather_columns,
)
from llmquant.kernels.relaunch import POINTER_ALIGNMENT, Relaunch
from llmquant.kernels.tiles import (
    MAX_SPLIT_ROW_TILES,
    Gpu,
    Problem,
    Tiles,
    batch_invariant_tiles,
    choose_tiles,
    dense_from_rows,
)
from llmquant.weight import QuantizedWeight

TILE_SLOTS = 128
"""Slots of a tile along K."""

_DTYPES = (torch.bfloat16, torch.float16)
"""Dtypes of x that the kernels support."""


def refuses(shape: LinearShape, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why this backend cannot run the linear, or None if it can."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not (interpreted and device.type == "cpu"):
        return f"runs on NVIDIA GPUs, not on {device.type}"
    if dtype not in _DTYPES:
        return f"computes in bfloat16 and float16, not in {str(dtype).removeprefix('torch.')}"
    if shape.num_groups > 1 and shape.group_size < 16:
        return f"group_size {shape.group_size} is below 16"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda":
        if torch.version.hip is not None:
            return "its inline assembly is for NVIDIA GPUs, this torch is built for AMD"
        if not torch.cuda.is_available():
            return "torch sees no GPU"
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"needs compute capability 8.0, {torch.cuda.get_device_name(device)} has {major}.{minor}"
        if not _has_c_compiler():
            return "Triton needs a C compiler at its first run; install gcc, or set CC"
    return None


def _has_c_compiler() -> bool:
    """Whether Triton can compile its launcher, the C program that passes the arguments of a kernel to the driver.

    Triton 3.4 to 3.9 take the compiler that CC names, else clang or gcc, unless `triton.knobs.build.impl` replaces it.
    """
    if "CC" in os.environ or shutil.which("gcc") is not None or shutil.which("clang") is not None:
        return True
    from triton import knobs

    return getattr(knobs.build, "impl", None) is not None


def prepare(weight: QuantizedWeight, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Return the prepared tensors (see above), made on the device. The kernels read the scale rounded to dtype."""
    shape = LinearShape.of(weight)
    block = _columns_per_block(shape)
    slots = arrange_slots(weight, block, TILE_SLOTS).to(device)
    column_S, group_B = slots.column_S, slots.group_B
    pad_rows = -shape.out_features % 64
    weight = weight.to(device)
    codes_NS = F.pad(slots.spread(weight.codes_NK, 0), (0, 0, 0, pad_rows))
    zero_NB = F.pad(weight.zero_NG[:, group_B], (0, 0, 0, pad_rows))
    scale_NB = F.pad(weight.scale_NG.float()[:, group_B], (0, 0, 0, pad_rows))
    # Padding holds its zero-point, so that its weight is 0.
    zero_NS = zero_NB.repeat_interleave(block, dim=1)
    codes_NS = torch.where(column_S == shape.in_features, zero_NS, codes_NS)
    if shape.bits == 8:
        codes_NS = torch.cat([codes_NS >> 4, codes_NS & 15], dim=1)
        zero_NB = torch.cat([zero_NB >> 4, zero_NB & 15], dim=1)
        scale_NB = torch.cat([scale_NB * 16, scale_NB], dim=1)
    words, meta = pack_words(codes_NS), pack_meta(scale_NB, zero_NB, dtype, TILE_SLOTS // block)
    done = torch.zeros(len(words) * MAX_SPLIT_ROW_TILES, dtype=torch.int32, device=device)
    column_S = column_S.new_empty(0) if slots.keeps_order else column_S
    rounded = not torch.equal(weight.scale_NG.to(dtype).float(), weight.scale_NG.float())
    scale_NG = weight.scale_NG if rounded else weight.scale_NG.new_empty(0)
    return words, meta, done, column_S, torch.empty(0, dtype=dtype, device=device), scale_NG


def can_join(
    shape: LinearShape, prepared: tuple[Tensor, ...], other: LinearShape, other_prepared: tuple[Tensor, ...]
) -> bool:
    """Return whether `join_weights` supports two weights: they have one width, layout, dtype and order of columns."""
    words, meta, _, column_S, dtype_holder, _ = prepared
    other_words, other_meta, _, other_column_S, other_dtype_holder, _ = other_prepared
    return (
        shape.in_features == other.in_features
        and (shape.bits == 8) == (other.bits == 8)
        and _columns_per_block(shape) == _columns_per_block(other)
        and words.shape[1:] == other_words.shape[1:]
        and meta.shape[::2] == other_meta.shape[::2]
        and dtype_holder.dtype == other_dtype_holder.dtype
        and words.device == other_words.device
        and torch.equal(column_S, other_column_S)
    )


def join_weights(weights: Sequence[tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], list[tuple[Tensor, ...]]]:
    """Store several weights in one, and return (prepared tensors of all, of each).

    weights: prepared tensors, every pair of which `can_join`. The weight of all has their rows one after another, each
    with its padding. The words and meta of each are views into it, so that the weights are stored once.
    """
    words, meta = torch.cat([each[0] for each in weights]), torch.cat([each[1] for each in weights], dim=1)
    done = words.new_zeros(len(words) * MAX_SPLIT_ROW_TILES)
    _, _, _, column_S, dtype_holder, _ = weights[0]
    numbers = [len(each[0]) for each in weights]
    views = zip(words.split(numbers), meta.split([64 * number for number in numbers], dim=1), weights, strict=True)
    single = [(words_i, meta_i, each[2], column_S, *each[4:]) for words_i, meta_i, each in views]
    return (words, meta, done, column_S, dtype_holder, meta.new_empty(0)), single


def pack_words(codes_NS: Tensor) -> Tensor:
    """4-bit codes uint8 [NP, S] -> int32 [NP/64, S/128, 64, 16], the order of `triton_w4a16.py`."""
    num_rows, num_slots = codes_NS.shape
    # k = 8 * (4i + p) + 2l + e inside a tile; the word is 4l + i and the nibble p + 4e.
    codes = codes_NS.view(num_rows // 64, 64, num_slots // TILE_SLOTS, 4, 4, 4, 2)  # n64, n, tile, i, p, l, e
    codes = codes.permute(0, 2, 1, 5, 3, 6, 4).reshape(num_rows // 64, num_slots // TILE_SLOTS, 64, 16, 8)
    low_nibble_first = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return low_nibble_first.contiguous().view(torch.int32).squeeze(-1)


def pack_meta(scale_NB: Tensor, zero_NB: Tensor, dtype: torch.dtype, blocks_per_tile: int) -> Tensor:
    """Return int32 [tiles, NP, blocks_per_tile]: low half the scale, high half -(128 + zero) or -(1024 + zero)."""
    bias = 128 if dtype == torch.bfloat16 else 1024
    scale_zero_pairs = torch.stack([scale_NB.to(dtype), -(zero_NB.float() + bias).to(dtype)], dim=-1)
    meta_NB = scale_zero_pairs.view(torch.int32).squeeze(-1)
    return meta_NB.view(len(meta_NB), -1, blocks_per_tile).transpose(0, 1).contiguous()


def restore(prepared: tuple[Tensor, ...], shape: LinearShape, group_K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the codes_NK, scale_NG and zero_NG that `prepare` got."""
    words, meta, _, column_S, dtype_holder, stored_scale_NG = prepared
    codes_NS, (scale_NB, zero_NB) = unpack_words(words), unpack_meta(meta, dtype_holder.dtype)
    if shape.bits == 8:
        codes_NS, scale_NB, zero_NB = join_planes(codes_NS, scale_NB, zero_NB)
    codes_NS, scale_NB, zero_NB = (values[: shape.out_features] for values in (codes_NS, scale_NB, zero_NB))
    scale_NG, zero_NG = gather_groups(scale_NB, zero_NB, group_K, shape, _columns_per_block(shape))
    codes_NK = ungather_columns(codes_NS, column_S, shape.in_features)
    return codes_NK, stored_scale_NG if stored_scale_NG.numel() else scale_NG, zero_NG


def unpack_words(words: Tensor) -> Tensor:
    """int32 [NP/64, S/128, 64, 16] -> codes uint8 [NP, S], the inverse of `pack_words`."""
    nibbles = torch.stack([(words >> shift & 15).to(torch.uint8) for shift in range(0, 32, 4)], dim=-1)
    codes = nibbles.unflatten(-1, (2, 4)).unflatten(3, (4, 4))  # n64, tile, n, l, i, e, p
    return codes.permute(0, 2, 1, 4, 6, 3, 5).reshape(words.shape[0] * 64, -1)


def unpack_meta(meta: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """int32 [tiles, NP, blocks_per_tile] -> scale_NB in dtype and zero_NB uint8, the inverse of `pack_meta`."""
    bias = 128 if dtype == torch.bfloat16 else 1024
    scale_zero_pairs = meta.transpose(0, 1).flatten(1).contiguous().unsqueeze(-1).view(dtype)
    return scale_zero_pairs[..., 0], (-scale_zero_pairs[..., 1].float() - bias).to(torch.uint8)


def matmul(x: Tensor, prepared: tuple[Tensor, ...], bias_N: Tensor | None, shape: LinearShape) -> Tensor:
    """x [..., K] in the prepared dtype -> y [..., N]. Raises TypeError for another dtype."""
    plan = _plan_of(x, prepared, bias_N, shape, False)
    if plan.relaunch is not None and (y := _relaunch(plan, x, prepared, bias_N, shape)) is not None:
        return y
    x_MK = _input_of_kernel(x, prepared, shape)
    if plan.dense:
        y_MN = matmul_dense(x_MK, prepared, bias_N, shape)
    else:
        y_MN = launch(x_MK, prepared, bias_N, shape, plan.tiles, plan)
    return y_MN.view(*x.shape[:-1], shape.out_features)


def matmul_invariant(x: Tensor, prepared: tuple[Tensor, ...], bias_N: Tensor | None, shape: LinearShape) -> Tensor:
    """Multiply as `matmul` does, but in the same order of additions for any number of rows; slow for many rows."""
    plan = _plan_of(x, prepared, bias_N, shape, True)
    if plan.relaunch is not None and (y := _relaunch(plan, x, prepared, bias_N, shape)) is not None:
        return y
    tiles = plan.tiles
    pieces = _input_of_kernel(x, prepared, shape).split(tiles.rows * MAX_SPLIT_ROW_TILES)
    if len(pieces) == 1:
        y_MN = launch(pieces[0], prepared, bias_N, shape, tiles, plan)
    else:
        y_MN = torch.cat([launch(piece, prepared, bias_N, shape, tiles) for piece in pieces])
    return y_MN.view(*x.shape[:-1], shape.out_features)


def dequantize(prepared: tuple[Tensor, ...], shape: LinearShape, dtype: torch.dtype) -> Tensor:
    """Return the dense weight [N, K], computed in float32 and rounded to the prepared dtype, then to dtype."""
    column_S = prepared[3]
    if not column_S.numel():
        return _dense_weight(prepared, shape, shape.in_features).to(dtype)
    weight_NS = _dense_weight(prepared, shape, column_S.numel())
    weight_NK = weight_NS.new_empty(shape.out_features, shape.in_features + 1)
    weight_NK[:, column_S] = weight_NS
    return weight_NK[:, :-1].to(dtype).contiguous()


def matmul_dense(x_MK: Tensor, prepared: tuple[Tensor, ...], bias_N: Tensor | None, shape: LinearShape) -> Tensor:
    """Write the dense weight and multiply in cuBLAS: x_MK (columns in their own order or in slot order) -> y_MN."""
    return F.linear(x_MK, _dense_weight(prepared, shape, x_MK.shape[1]), bias_N)


def launch(
    x_MK: Tensor,
    prepared: tuple[Tensor, ...],
    bias_N: Tensor | None,
    shape: LinearShape,
    tiles: Tiles,
    plan: Plan | None = None,
) -> Tensor:
    """Run the fused kernel with these tiles: x_MK (columns in their own order or in slot order) -> y_MN.

    plan: the plan of this call; it keeps the compiled kernel, so that later calls start faster.
    """
    words, meta, done, _, dtype_holder, _ = prepared
    num_rows, num_columns = x_MK.shape
    num_row_tiles = -(-num_rows // tiles.rows)
    split_k = tiles.split_k if num_row_tiles <= MAX_SPLIT_ROW_TILES else 1
    planes = 2 if shape.bits == 8 else 1
    num_tiles = words.shape[1] // planes
    y_MN = x_MK.new_empty(num_rows, shape.out_features)
    if num_rows == 0:
        return y_MN
    partial = y_MN if split_k == 1 else y_MN.new_empty(split_k, num_rows, shape.out_features, dtype=torch.float32)
    num_features = words.shape[0] * 64
    kernels = _kernels()
    tensors = (x_MK.contiguous(), words, meta, y_MN if bias_N is None else bias_N, y_MN, partial, done)
    sizes = (num_rows, shape.out_features, _meta_rows(meta), num_columns, num_tiles)
    constants = {
        "RAGGED_K": num_columns != num_tiles * TILE_SLOTS,
        "P": planes,
        "B": meta.shape[2],
        "BM": tiles.rows,
        "BN": tiles.features,
        "SPLIT_K": split_k > 1,
        "POST": tiles.post,
        "STAGES": tiles.stages,
        "HAS_BIAS": bias_N is not None,
        "BF16": dtype_holder.dtype == torch.bfloat16,
        "INTERPRET": kernels.INTERPRETED,
    }  # in the order of the kernel's arguments
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": True}
    grid = (num_row_tiles, num_features // tiles.features, split_k)
    with torch.cuda.device_of(x_MK):  # Triton launches on the current GPU
        compiled = kernels.w4a16_kernel[grid](*tensors, *sizes, **constants, **options)
        if plan is not None and all(tensor.data_ptr() % POINTER_ALIGNMENT == 0 for tensor in tensors):
            plan.split_k = split_k
            plan.relaunch = Relaunch.of(compiled, grid, (*sizes, *constants.values()), x_MK.get_device())
    return y_MN


@dataclass(slots=True)
class Plan:
    """How to multiply a number of rows by the weights of one shape, and the compiled kernel that does it."""

    tiles: Tiles
    """Tiles of the fused kernel."""
    copies_x: bool
    """Whether the kernel reads a copy of x, in slot order or padded."""
    dense: bool
    """Whether to write the dense weight instead."""
    split_k: int = 1
    """Programs that share a tile of y."""
    relaunch: Relaunch | None = None
    """The compiled kernel, after the first launch."""


@lru_cache(maxsize=8192)
def _plan(
    shape: LinearShape,
    ordered_slots: int,
    dtype: torch.dtype,
    device_index: int,
    num_rows: int,
    bias_dtype: torch.dtype | None,
    meta_stride: int,
    invariant: bool,
) -> Plan:
    """Return the plan for calls with these properties. It is made once, since choosing tiles costs as much as a call.

    ordered_slots: slots of the weight, or 0 if its columns keep their order. device_index: -1 for a CPU tensor, in
    Triton's interpreter. bias_dtype: None without a bias. meta_stride: first stride of meta. The last two are not used
    here, but the compiled kernel and its arguments depend on them.
    """
    del bias_dtype, meta_stride
    num_slots = ordered_slots or -(-shape.in_features // TILE_SLOTS) * TILE_SLOTS
    num_features = -(-shape.out_features // 64) * 64
    planes = 2 if shape.bits == 8 else 1
    blocks_per_tile = TILE_SLOTS // _columns_per_block(shape)
    problem = Problem(num_features, planes * num_slots, blocks_per_tile, str(dtype).removeprefix("torch."))
    this_gpu = gpu_of(torch.device("cpu") if device_index < 0 else torch.device("cuda", device_index))
    copies_x = ordered_slots > 0 or shape.in_features % 16 > 0
    if invariant:
        return Plan(batch_invariant_tiles(problem), copies_x, dense=False)
    dense = num_rows >= dense_from_rows(problem, this_gpu)
    return Plan(choose_tiles(problem, max(num_rows, 1), this_gpu), copies_x, dense)


def forget_plans() -> None:
    """Drop the plans of all calls. `tune.tune_tiles` does so, because a new table may change the tiles."""
    _plan.cache_clear()


def _plan_of(
    x: Tensor, prepared: tuple[Tensor, ...], bias_N: Tensor | None, shape: LinearShape, invariant: bool
) -> Plan:
    """Return the plan of a call. Raises TypeError if x has another dtype than the prepared one."""
    _, meta, _, column_S, dtype_holder, _ = prepared
    dtype = x.dtype
    if dtype != dtype_holder.dtype:
        raise TypeError(f"x is {dtype}, but the weight was prepared for {dtype_holder.dtype}")
    bias_dtype = None if bias_N is None else bias_N.dtype
    num_rows = x.numel() // shape.in_features
    return _plan(shape, column_S.numel(), dtype, x.get_device(), num_rows, bias_dtype, meta.stride(0), invariant)


def _relaunch(
    plan: Plan, x: Tensor, prepared: tuple[Tensor, ...], bias_N: Tensor | None, shape: LinearShape
) -> Tensor | None:
    """Multiply with the plan's compiled kernel. Return y [..., N], or None if it does not suit these tensors."""
    words, meta, done = prepared[:3]
    *outer, in_features = x.shape
    if in_features != shape.in_features or x.get_device() != words.get_device():
        return None
    x_MK = _input_of_kernel(x, prepared, shape) if plan.copies_x else x.contiguous()
    y = x.new_empty(*outer, shape.out_features)
    y_address = y.data_ptr()
    partial = y
    if plan.split_k > 1:
        partial = y.new_empty(plan.split_k * y.numel(), dtype=torch.float32)
    assert plan.relaunch is not None
    launched = plan.relaunch(
        x_MK.data_ptr(),
        words.data_ptr(),
        meta.data_ptr(),
        y_address if bias_N is None else bias_N.data_ptr(),
        y_address,
        partial.data_ptr(),
        done.data_ptr(),
    )
    return y if launched else None


@lru_cache(maxsize=64)
def gpu_of(device: torch.device) -> Gpu:
    """Return the properties of the GPU on which the choice of tiles depends."""
    if device.type == "cpu":  # only under Triton's interpreter
        return Gpu("interpreter", 132, 90)
    properties = torch.cuda.get_device_properties(device)
    return Gpu(properties.name, properties.multi_processor_count, 10 * properties.major + properties.minor)


@lru_cache(maxsize=1)
def _kernels():
    """Return the module of the kernels. The first call imports it, because Triton is not installed everywhere."""
    from llmquant.kernels import triton_w4a16

    return triton_w4a16


def problem_of(prepared: tuple[Tensor, ...]) -> Problem:
    """Return the properties of a prepared weight on which the choice of tiles depends."""
    words, meta, _, _, dtype_holder, _ = prepared
    dtype = "bfloat16" if dtype_holder.dtype == torch.bfloat16 else "float16"
    return Problem(words.shape[0] * 64, words.shape[1] * TILE_SLOTS, meta.shape[2], dtype)


def _input_of_kernel(x: Tensor, prepared: tuple[Tensor, ...], shape: LinearShape) -> Tensor:
    """x [..., K] -> x as the kernel reads it: [M, K], or [M, S] with columns in slot order."""
    column_S = prepared[3]
    x_MK = x.reshape(-1, shape.in_features)
    # The kernel masks the end of K. Copying x saves time if K is not a multiple of 16: the copy permits wide loads.
    if column_S.numel() or shape.in_features % 16:
        x_MK = gather_columns(x_MK, column_S, -(-shape.in_features // TILE_SLOTS) * TILE_SLOTS)
    return x_MK


def _dense_weight(prepared: tuple[Tensor, ...], shape: LinearShape, num_columns: int) -> Tensor:
    """Return the dense weight [N, num_columns] in the prepared dtype, with columns in slot order."""
    words, meta, _, _, dtype_holder, _ = prepared
    planes = 2 if shape.bits == 8 else 1
    weight = torch.empty(shape.out_features, num_columns, dtype=dtype_holder.dtype, device=words.device)
    kernels = _kernels()
    with torch.cuda.device_of(words):
        kernels.dequantize_kernel[words.shape[0], words.shape[1] // planes](
            words,
            meta,
            weight,
            shape.out_features,
            _meta_rows(meta),
            num_columns,
            words.shape[1] // planes,
            P=planes,
            B=meta.shape[2],
            BF16=dtype_holder.dtype == torch.bfloat16,
            INTERPRET=kernels.INTERPRETED,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return weight


def _meta_rows(meta: Tensor) -> int:
    """Return the NP of the tensor in which meta lies, which is larger than that of meta if other weights share it."""
    return meta.stride(0) // meta.shape[2] if meta.shape[0] > 1 else meta.shape[1]


def _columns_per_block(shape: LinearShape) -> int:
    """Return slots per scale: the largest of 128, 64, 32 that divides the group size, else 32; 128 for one group."""
    if shape.num_groups == 1:
        return TILE_SLOTS
    return next((block for block in (128, 64, 32) if shape.group_size % block == 0), 32)
