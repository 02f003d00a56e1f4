"""Attention on x86 processors: softmax(scaling * Q @ K.T) @ V, written in LLVM assembly.

torch's CPU attention spends most of its time on calls of small matrix products. This module has two programs that make
no such calls: `attend_one` for one new token of each sequence, and `attend_causal` for whole texts, from their first
token on. Several query heads may share one head of K and V (grouped-query attention).

In `attend_one`, a task is one head of one sequence. It computes the scores in float32, their maximum, the powers
2**(score - maximum) by a polynomial, and the weighted sum of the values, in vectors of 16 along the head dimension. It
reads K and V in place, from the cache of keys and values.

`attend_causal` needs bfloat16 and a processor with a dot product of bfloat16 pairs. A task is six rows of Q of one
head. K and V are first rearranged into pairs, so that a vector holds 16 tokens of K or 16 features of V. Each thread
has a buffer for the scores of its six rows over all visible tokens. The powers, rounded to bfloat16 as in torch, then
replace the scores. The bits of a row do not depend on the other rows, as long as V is finite.

Letters: S sequences, H heads, G heads of K and V, L tokens, D head dimension.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from llmquant.kernels import jit
from llmquant.kernels.assembly import DECLARATIONS, FLOATS, LANES, WORDS, Function, floats, ints

PRODUCTS_PER_THREAD = 1 << 18
"""Products of Q @ K.T that make one more thread worthwhile; in `attend_one`, they take about twenty microseconds."""

QUERY_ROWS = 6
"""Rows of Q (tokens) that one task of `attend_causal` processes together."""
CAUSAL_MIN_TOKENS = 40
"""Tokens from which `attend_causal` is faster than torch. For shorter texts, rearranging K and V costs more than it
saves: 98 us were measured for 48 tokens (torch 126 us), and 84 us for 32 (torch 63 us)."""
KEY_TOKENS = 64
"""Tokens of K whose scores `attend_causal` computes together."""
MAX_HEAD_DIM = 256
"""Largest head dimension. The sums of wider heads would not fit into registers."""

ARGUMENTS = (
    dict.fromkeys(("q", "k", "v", "mask", "scores", "y"), "ptr")
    | dict.fromkeys(("num_tasks", "num_heads", "heads_per_group", "length", "padded"), "i64")
    | dict.fromkeys((f"{name}_stride_{axis}" for name in "qkv" for axis in ("sequence", "head", "token")), "i64")
    | {"mask_stride": "i64", "scaling": "double", "num_threads": "i64"}
)
"""Fields of the struct that both programs take: name -> LLVM type. Strides count elements; the stride of the mask
counts bytes. `padded` is the stride of the rows of `scores`: the length with padding."""

_INTRINSICS = """
declare float @llvm.vector.reduce.fadd.v16f32(float, <16 x float>)
declare float @llvm.vector.reduce.fmax.v16f32(<16 x float>)
declare <16 x float> @llvm.maxnum.v16f32(<16 x float>, <16 x float>)
declare <16 x float> @llvm.rint.v16f32(<16 x float>)
"""
"""Declarations of the LLVM functions that these programs call beyond `assembly.DECLARATIONS`."""
_LOG2_E = 1 / math.log(2)
_POWERS_OF_TWO = tuple(math.log(2) ** i / math.factorial(i) for i in range(7))
"""Coefficients of the Taylor series of 2**x, which is exact to one part in eight million for |x| <= 1/2."""

_pack = struct.Struct("".join("d" if kind == "double" else "q" for kind in ARGUMENTS.values())).pack


def refuses_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str | None:
    """Return why `attend_one` cannot take these arguments, or None if it can. Shapes are those of `attend_one`."""
    if q.shape[2] != 1:
        return f"{q.shape[2]} new tokens instead of one"
    if q.dtype not in jit.LLVM_TYPE or not q.dtype == k.dtype == v.dtype:
        return f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}"
    if not k.shape[2]:
        return "the cache of keys and values is empty"
    if not q.stride(3) == k.stride(3) == v.stride(3) == 1:
        return "not contiguous along the head dimension"
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (q.shape[0], 1, 1, k.shape[2])):
        return f"a mask of {mask.dtype} {tuple(mask.shape)}"
    return _refuses(q, k, v)


def _refuses(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Return why neither program can take these arguments, or None. Both programs share these conditions."""
    if q.device.type != "cpu":
        return f"runs on the CPU, not on {q.device.type}"
    if q.shape[3] % LANES or q.shape[3] > MAX_HEAD_DIM or q.shape[3] != v.shape[3]:
        return f"head dimensions {q.shape[3]} and {v.shape[3]}"
    if not q.shape[0] == k.shape[0] == v.shape[0] or k.shape[:3] != v.shape[:3]:
        return f"q, k and v are {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
    if q.shape[1] % k.shape[1]:
        return f"{q.shape[1]} heads share {k.shape[1]} of K and V"
    return jit.unavailable_reason()


def attend_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """q [S, H, 1, D], k and v [S, G, L, D], mask bool [S, 1, 1, L] (true: visible) -> y [S, 1, H, D] in q's dtype."""
    num_sequences, num_heads, _, head_dim = q.shape
    length, tasks = k.shape[2], num_sequences * num_heads
    padded = -(-length // LANES) * LANES
    scores = torch.empty(tasks, padded, dtype=torch.float32, device="cpu")
    y = torch.empty(num_sequences, 1, num_heads, head_dim, dtype=torch.float32, device="cpu")
    if mask is not None and mask.stride(3) != 1:
        mask = mask.contiguous()
    threads = min(torch.get_num_threads(), max(tasks, 1), 1 + tasks * length * head_dim // PRODUCTS_PER_THREAD)
    arguments = _pack(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        scores.data_ptr(),
        y.data_ptr(),
        tasks,
        num_heads,
        num_heads // k.shape[1],
        length,
        padded,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        0 if mask is None else mask.stride(0),
        scaling * _LOG2_E,
        threads,
    )
    _compiled_one(jit.LLVM_TYPE[q.dtype], head_dim).run("attend", arguments, threads)
    return y.to(q.dtype)


def refuses_causal(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str | None:
    """Return why `attend_causal` cannot take these arguments, or None if it can. Shapes are those of `attend_causal`.

    The caller must ensure that the attention is causal.
    """
    if mask is not None:
        return "takes no mask"
    if not q.dtype == k.dtype == v.dtype == torch.bfloat16:
        return f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}"
    if q.shape[2] < CAUSAL_MIN_TOKENS or q.shape[2] != k.shape[2]:
        return f"{q.shape[2]} new tokens over {k.shape[2]} in all"
    if q.stride(3) != 1:
        return "not contiguous along the head dimension"
    if (reason := _refuses(q, k, v)) is not None:
        return reason
    if not jit.has_bfloat16_dot_product():
        return "the processor does not multiply bfloat16"
    return "torch's attention uses the matrix units" if jit.has_matrix_units() else None


def attend_causal(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """q [S, H, L, D], k and v [S, G, L, D] -> y [S, L, H, D], all bfloat16.

    Each token attends to itself and to the tokens before it.
    """
    num_sequences, num_heads, length, head_dim = q.shape
    num_tiles = -(-length // KEY_TOKENS)
    k, v = (F.pad(value, (0, 0, 0, num_tiles * KEY_TOKENS - length)) for value in (k, v))
    k_words = k.unflatten(3, (-1, 2)).unflatten(2, (-1, KEY_TOKENS)).transpose(3, 4).contiguous()
    v_words = v.unflatten(2, (-1, 2)).transpose(3, 4).contiguous()
    y = torch.empty(num_sequences, length, num_heads, head_dim, dtype=q.dtype, device="cpu")
    tasks = num_sequences * num_heads * -(-length // QUERY_ROWS)
    products = num_sequences * num_heads * length * length * head_dim
    threads = min(torch.get_num_threads(), 1 + products // PRODUCTS_PER_THREAD)
    # A further vector of padding makes the rows of scores start at different offsets in a page.
    padded = num_tiles * KEY_TOKENS + LANES
    scores = torch.empty(threads, QUERY_ROWS, padded, dtype=torch.float32, device="cpu")
    arguments = _pack(
        q.data_ptr(),
        k_words.data_ptr(),
        v_words.data_ptr(),
        0,
        scores.data_ptr(),
        y.data_ptr(),
        tasks,
        num_heads,
        num_heads // k.shape[1],
        length,
        padded,
        *q.stride()[:3],
        *(k_words.stride(0), k_words.stride(1), 0),
        *(v_words.stride(0), v_words.stride(1), 0),
        0,
        scaling * _LOG2_E,
        threads,
    )
    _compiled_causal(head_dim).run("attend", arguments, threads)
    return y


def compile_programs(dtype: torch.dtype, head_dim: int) -> None:
    """Compile the programs for this dtype and head dimension, so that the first call does not wait for them.

    If the programs do not support them, nothing is compiled. After the first compilation, LLVM keeps 40 MB of memory.
    """
    if dtype not in jit.LLVM_TYPE or head_dim % LANES or not 0 < head_dim <= MAX_HEAD_DIM:
        return
    _compiled_one(jit.LLVM_TYPE[dtype], head_dim)
    if dtype == torch.bfloat16 and jit.has_bfloat16_dot_product():
        _compiled_causal(head_dim)


def is_compiled() -> bool:
    """Whether this process has compiled a program."""
    return _compiled_one.cache_info().currsize > 0


@cache
def _compiled_causal(head_dim: int) -> jit.Compiled:
    return jit.Compiled(DECLARATIONS + _INTRINSICS + _attend_causal(head_dim).text(), ("attend",))


def _attend_causal(head_dim: int) -> Function:
    """Return the function `attend` of `attend_causal`. Each thread computes a range of blocks of six rows."""
    f = Function("attend", ARGUMENTS, entry=True)
    length, padded, heads = f.argument("length"), f.argument("padded"), f.argument("num_heads")
    scaling = f.splat(f(f"fptrunc double {f.argument('scaling')} to float"), "float")
    row_blocks = f(f"sdiv i64 {f.add(length, QUERY_ROWS - 1)}, {QUERY_ROWS}")
    first, stop = f.task_range(f.argument("num_tasks"))
    scores = f.at(f.argument("scores"), f.mul(f.mul(f.thread_index_and_count()[0], QUERY_ROWS), padded), "float")
    with f.loop(first, stop) as task:
        row_block, head = f(f"srem i64 {task}, {row_blocks}"), f(f"sdiv i64 {task}, {row_blocks}")
        sequence, head = f(f"sdiv i64 {head}, {heads}"), f(f"srem i64 {head}, {heads}")
        group = f(f"sdiv i64 {head}, {f.argument('heads_per_group')}")
        # The last block of rows ends at the last row, so it may compute some rows a second time.
        row = f.minimum(f.mul(row_block, QUERY_ROWS), f(f"sub nsw i64 {length}, {QUERY_ROWS}"))
        num_visible = f(f"sdiv i64 {f.add(row, QUERY_ROWS - 1 + KEY_TOKENS)}, {KEY_TOKENS}")
        num_visible = f.mul(num_visible, KEY_TOKENS)
        q, k, v = (
            f.at(f.argument(name), f.add(f.mul(sequence, f.argument(f"{name}_stride_sequence")), place), "bfloat")
            for name, place in (
                ("q", f.mul(head, f.argument("q_stride_head"))),
                ("k", f.mul(group, f.argument("k_stride_head"))),
                ("v", f.mul(group, f.argument("v_stride_head"))),
            )
        )
        stride = f.argument("q_stride_token")
        q_rows = [f.at(q, f.mul(f.add(row, i), stride), "bfloat") for i in range(QUERY_ROWS)]
        score_rows = [f.at(scores, f.mul(padded, i), "float") for i in range(QUERY_ROWS)]
        with f.loop(0, num_visible, KEY_TOKENS) as token:
            sums = [
                [f.variable(FLOATS, "zeroinitializer") for _ in range(KEY_TOKENS // LANES)] for _ in range(QUERY_ROWS)
            ]
            tile = f.at(k, f.mul(token, head_dim), "bfloat")
            _add_pairs(f, tile, KEY_TOKENS, q_rows, str(head_dim // 2), sums)
            for score_row, row_sums in zip(score_rows, sums, strict=True):
                for i, total in enumerate(row_sums):
                    scaled = f(f"fmul {FLOATS} {f.load(total, FLOATS)}, {scaling}")
                    address = f.at(score_row, f.add(token, LANES * i), "float")
                    f.emit(f"store {FLOATS} {scaled}, ptr {address}, align 4")
        inverses = []
        for i, score_row in enumerate(score_rows):
            _mask_future_tokens(f, score_row, f.add(row, i), num_visible)
            inverses.append(_exponentiate_scores(f, score_row, num_visible, _store_bfloat16))
        rows_at_once = next(rows for rows in (6, 3, 2, 1) if rows * head_dim // LANES <= 24)
        for start in range(0, QUERY_ROWS, rows_at_once):
            rows = range(start, start + rows_at_once)
            outputs = [[f.variable(FLOATS, "zeroinitializer") for _ in range(head_dim // LANES)] for _ in rows]
            pairs = f(f"lshr i64 {num_visible}, 1")
            _add_pairs(f, v, head_dim, [score_rows[i] for i in rows], pairs, outputs)
            for i, row_sums in zip(rows, outputs, strict=True):
                place = f.add(f.mul(f.add(f.mul(sequence, length), f.add(row, i)), heads), head)
                y = f.at(f.argument("y"), f.mul(place, head_dim), "bfloat")
                for vector, total in enumerate(row_sums):
                    value = f(f"fmul {FLOATS} {f.load(total, FLOATS)}, {inverses[i]}")
                    _store_bfloat16(f, value, f.at(y, LANES * vector, "bfloat"))
    return f


def _add_pairs(f: Function, words: str, width: int, rows: list[str], num_pairs: str, sums: list[list[str]]) -> None:
    """Emit sums[row][vector] += rows[row] @ words, in bfloat16: rows [2 * num_pairs], words [num_pairs, width, 2]."""
    with f.loop(0, num_pairs) as pair:
        line = f.at(words, f.mul(pair, width), "i32")
        weights = [f.load(f.at(line, LANES * i, "i32"), WORDS, 4) for i in range(width // LANES)]
        for row, row_sums in zip(rows, sums, strict=True):
            x = f.splat(f.load(f.at(row, pair, "i32"), "i32", 4), "i32")
            for weight, total in zip(weights, row_sums, strict=True):
                f.store(total, FLOATS, f.dot_pairs(weight, x, f.load(total, FLOATS)))


def _mask_future_tokens(f: Function, scores: str, row: str, num_visible: str) -> None:
    """Set the scores of the tokens after `row`, up to `num_visible`, to minus infinity."""
    lanes = "<" + ", ".join(f"i64 {lane}" for lane in range(LANES)) + ">"
    with f.loop(f(f"and i64 {row}, -{LANES}"), num_visible, LANES) as token:
        address = f.at(scores, token, "float")
        before = f.splat(f(f"sub nsw i64 {row}, {token}"), "i64")
        is_visible = f(f"icmp sle <16 x i64> {lanes}, {before}")
        hidden = f.splat(_MINUS_INFINITY, "float")
        value = f(f"select <16 x i1> {is_visible}, {FLOATS} {f.load(address, FLOATS, 4)}, {FLOATS} {hidden}")
        f.emit(f"store {FLOATS} {value}, ptr {address}, align 4")


def _store_bfloat16(f: Function, value: str, address: str) -> None:
    """Round 16 float32 to bfloat16 and store them."""
    f.emit(f"store <16 x bfloat> {f(f'fptrunc {FLOATS} {value} to <16 x bfloat>')}, ptr {address}, align 2")


def _store_float(f: Function, value: str, address: str) -> None:
    """Store 16 float32."""
    f.emit(f"store {FLOATS} {value}, ptr {address}, align 4")


def _exponentiate_scores(f: Function, scores: str, length: str, store: Callable[[Function, str, str], None]) -> str:
    """Replace each score by 2**(score - highest), and return a vector with 1 / (the sum of these powers) in each lane.

    scores: address of `length` float32; `length` is a multiple of 16. store: writes a vector of results.
    """
    highest = f.variable(FLOATS, f.splat(_MINUS_INFINITY, "float"))
    with f.loop(0, length, LANES) as token:
        chunk = f.load(f.at(scores, token, "float"), FLOATS, 4)
        pair = f"{FLOATS} {f.load(highest, FLOATS)}, {FLOATS} {chunk}"
        f.store(highest, FLOATS, f(f"call {FLOATS} @llvm.maxnum.v16f32({pair})"))
    highest = f(f"call float @llvm.vector.reduce.fmax.v16f32({FLOATS} {f.load(highest, FLOATS)})")
    # As in torch, a row that attends to no token becomes zeros, because all its powers are 0.
    pair = f"{FLOATS} {f.splat(highest, 'float')}, {FLOATS} {floats(-1e30)}"
    highest = f(f"call {FLOATS} @llvm.maxnum.v16f32({pair})")
    sums = f.variable(FLOATS, "zeroinitializer")
    kind = "bfloat" if store is _store_bfloat16 else "float"
    with f.loop(0, length, LANES) as token:
        score = f.load(f.at(scores, token, "float"), FLOATS, 4)
        power = _power_of_two(f, f(f"fsub {FLOATS} {score}, {highest}"))
        store(f, power, f.at(scores, token, kind))
        f.store(sums, FLOATS, f(f"fadd {FLOATS} {f.load(sums, FLOATS)}, {power}"))
    total = f(f"call reassoc float @llvm.vector.reduce.fadd.v16f32(float 0.0, {FLOATS} {f.load(sums, FLOATS)})")
    inverse = f(f"select i1 {f(f'fcmp oeq float {total}, 0.0')}, float 0.0, float {f(f'fdiv float 1.0, {total}')}")
    return f.splat(inverse, "float")


@cache
def _compiled_one(kind: str, head_dim: int) -> jit.Compiled:
    return jit.Compiled(DECLARATIONS + _INTRINSICS + _attend_one(kind, head_dim).text(), ("attend",))


def _attend_one(kind: str, head_dim: int) -> Function:
    """Return the function `attend` of `attend_one`. Each thread computes a range of tasks (heads of sequences)."""
    f = Function("attend", ARGUMENTS, entry=True)
    vectors = range(head_dim // LANES)
    first, stop = f.task_range(f.argument("num_tasks"))
    length, padded, mask = f.argument("length"), f.argument("padded"), f.argument("mask")
    has_mask = f(f"icmp ne ptr {mask}, null")
    scaling = f.splat(f(f"fptrunc double {f.argument('scaling')} to float"), "float")
    with f.loop(first, stop) as task:
        sequence = f(f"sdiv i64 {task}, {f.argument('num_heads')}")
        head = f(f"srem i64 {task}, {f.argument('num_heads')}")
        group = f(f"sdiv i64 {head}, {f.argument('heads_per_group')}")
        q, k, v = (
            f.at(f.argument(name), f.add(f.mul(sequence, f.argument(f"{name}_stride_sequence")), place), kind)
            for name, place in (
                ("q", f.mul(head, f.argument("q_stride_head"))),
                ("k", f.mul(group, f.argument("k_stride_head"))),
                ("v", f.mul(group, f.argument("v_stride_head"))),
            )
        )
        scores = f.at(f.argument("scores"), f.mul(task, padded), "float")
        # Compute the scores as exponents of 2.
        q_vectors = [f(f"fmul {FLOATS} {_load(f, q, kind, i)}, {scaling}") for i in vectors]
        with f.loop(0, length) as token:
            k_row = f.at(k, f.mul(token, f.argument("k_stride_token")), kind)
            product = f(f"fmul {FLOATS} {q_vectors[0]}, {_load(f, k_row, kind, 0)}")
            for i in vectors[1:]:
                product = f.fma(q_vectors[i], _load(f, k_row, kind, i), product)
            score = f(f"call reassoc float @llvm.vector.reduce.fadd.v16f32(float 0.0, {FLOATS} {product})")
            f.store(f.at(scores, token, "float"), "float", score)
        with f.when(has_mask):
            mask_row = f.at(mask, f.mul(sequence, f.argument("mask_stride")), "i8")
            with f.loop(0, length) as token:
                hidden = f(f"icmp eq i8 {f.load(f.at(mask_row, token, 'i8'), 'i8')}, 0")
                with f.when(hidden):
                    f.store(f.at(scores, token, "float"), "float", _MINUS_INFINITY)
        with f.loop(length, padded) as token:
            f.store(f.at(scores, token, "float"), "float", _MINUS_INFINITY)
        inverse = _exponentiate_scores(f, scores, padded, _store_float)
        outputs = [f.variable(FLOATS, "zeroinitializer") for _ in vectors]
        with f.loop(0, length) as token:
            v_row = f.at(v, f.mul(token, f.argument("v_stride_token")), kind)
            probability = f.splat(f.load(f.at(scores, token, "float"), "float"), "float")
            for i in vectors:
                f.store(outputs[i], FLOATS, f.fma(probability, _load(f, v_row, kind, i), f.load(outputs[i], FLOATS)))
        y = f.at(f.argument("y"), f.mul(task, head_dim), "float")
        for i in vectors:
            value = f(f"fmul {FLOATS} {f.load(outputs[i], FLOATS)}, {inverse}")
            f.emit(f"store {FLOATS} {value}, ptr {f.at(y, LANES * i, 'float')}, align 4")
    return f


_MINUS_INFINITY = "0xFFF0000000000000"


def _load(f: Function, row: str, kind: str, vector: int) -> str:
    """Load vector `vector` of a row, its elements 16 * vector … 16 * vector + 15, as float32."""
    value = f.load(f.at(row, LANES * vector, kind), f"<16 x {kind}>", 4 if kind == "float" else 2)
    return value if kind == "float" else f(f"fpext <16 x {kind}> {value} to {FLOATS}")


def _power_of_two(f: Function, x: str) -> str:
    """Emit 2**x for x <= 0; 0 below the smallest normal float32."""
    nearest = f(f"call {FLOATS} @llvm.rint.v16f32({FLOATS} {x})")
    rest = f(f"fsub {FLOATS} {x}, {nearest}")
    power = floats(_POWERS_OF_TWO[-1])
    for coefficient in _POWERS_OF_TWO[-2::-1]:
        power = f.fma(power, rest, floats(coefficient))
    is_normal = f(f"fcmp oge {FLOATS} {x}, {floats(-126)}")
    # Both comparisons are false for NaN, which therefore stays NaN.
    is_tiny = f(f"fcmp olt {FLOATS} {x}, {floats(-126)}")
    exponent = f(f"select <16 x i1> {is_normal}, {FLOATS} {nearest}, {FLOATS} zeroinitializer")
    shift = f(f"shl {WORDS} {f(f'fptosi {FLOATS} {exponent} to {WORDS}')}, {ints(23)}")
    scaled = f(f"add {WORDS} {f(f'bitcast {FLOATS} {power} to {WORDS}')}, {shift}")
    scaled = f(f"bitcast {WORDS} {scaled} to {FLOATS}")
    return f(f"select <16 x i1> {is_tiny}, {FLOATS} zeroinitializer, {FLOATS} {scaled}")
