"""Attention of one new token per sequence on x86 processors: softmax(scaling * q @ K.T) @ V, in LLVM's assembly.

While text is generated, torch's CPU attention spends ten times longer on calls for small matrix products than on the
arithmetic. Here a task is one head of one sequence: scores in float32, their maximum, 2**x by a polynomial, and the
weighted sum of the values, all in vectors of 16 along the head dimension. K and V are read where the cache has them,
in the dtype they have; several heads may share one of them (grouped-query attention).

Letters: S sequences, H heads, G heads of K and V, L tokens in the cache, D head dimension.
"""

from __future__ import annotations

import math
import struct
from functools import cache

import torch
from torch import Tensor

from llmquant.kernels import jit
from llmquant.kernels.assembly import DECLARATIONS, FLOATS, LANES, WORDS, Function, floats, ints

GRAIN = 1 << 18
"""Elements of K that are worth another thread: some twenty microseconds."""

MAX_HEAD_DIM = 256
"""Wider heads would not keep their sums in registers."""

ARGUMENTS = (
    dict.fromkeys(("q", "k", "v", "mask", "scores", "y"), "ptr")
    | dict.fromkeys(("num_tasks", "num_heads", "heads_per_group", "length", "padded"), "i64")
    | dict.fromkeys((f"{name}_stride_{axis}" for name in "qkv" for axis in ("sequence", "head", "token")), "i64")
    | {"mask_stride": "i64", "scaling": "double", "num_threads": "i64"}
)
"""Strides in elements, in bytes for the mask; `padded` is the length rounded up to 16, the stride of `scores`."""

_LLVM_TYPE = {torch.float16: "half", torch.bfloat16: "bfloat", torch.float32: "float"}
_MORE_DECLARATIONS = """
declare float @llvm.vector.reduce.fadd.v16f32(float, <16 x float>)
declare float @llvm.vector.reduce.fmax.v16f32(<16 x float>)
declare <16 x float> @llvm.maxnum.v16f32(<16 x float>, <16 x float>)
declare <16 x float> @llvm.rint.v16f32(<16 x float>)
"""
_LOG2_E = 1 / math.log(2)
_POWERS_OF_TWO = tuple(math.log(2) ** i / math.factorial(i) for i in range(7))
"""2**x for |x| <= 1/2 to one part in eight million: its Taylor series."""

_pack = struct.Struct("".join("d" if kind == "double" else "q" for kind in ARGUMENTS.values())).pack


def refuses(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str | None:
    """Why `attend` cannot take these (shapes as there), or None."""
    if q.shape[2] != 1:
        return f"{q.shape[2]} tokens, not one"
    if q.device.type != "cpu":
        return f"runs on the CPU, not on {q.device.type}"
    if q.dtype not in _LLVM_TYPE or not q.dtype == k.dtype == v.dtype:
        return f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}"
    if q.shape[3] % LANES or q.shape[3] > MAX_HEAD_DIM or q.shape[3] != v.shape[3]:
        return f"head dimensions {q.shape[3]} and {v.shape[3]}"
    if q.shape[1] % k.shape[1]:
        return f"{q.shape[1]} heads share {k.shape[1]} of K and V"
    if not q.stride(3) == k.stride(3) == v.stride(3) == 1 or not k.shape[2]:
        return "not contiguous along the head dimension"
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (q.shape[0], 1, 1, k.shape[2])):
        return f"a mask of {mask.dtype} {tuple(mask.shape)}"
    return jit.why_not()


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """q [S, H, 1, D], k and v [S, G, L, D], mask bool [S, 1, 1, L] (true: is seen) -> y [S, 1, H, D] in q's dtype."""
    num_sequences, num_heads, _, head_dim = q.shape
    length, tasks = k.shape[2], num_sequences * num_heads
    padded = -(-length // LANES) * LANES
    scores = torch.empty(tasks, padded)
    y = torch.empty(num_sequences, 1, num_heads, head_dim)
    if mask is not None and mask.stride(3) != 1:
        mask = mask.contiguous()
    threads = min(torch.get_num_threads(), tasks, 1 + tasks * length * head_dim // GRAIN)
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
    _compiled(_LLVM_TYPE[q.dtype], head_dim).run("attend", arguments, threads)
    return y.to(q.dtype)


@cache
def _compiled(kind: str, head_dim: int) -> jit.Compiled:
    return jit.Compiled(DECLARATIONS + _MORE_DECLARATIONS + _attend(kind, head_dim).text(), ("attend",))


def _attend(kind: str, head_dim: int) -> Function:
    """This thread's share of the heads."""
    f = Function("attend", ARGUMENTS, entry=True)
    vectors = range(head_dim // LANES)
    first, stop = f.share(f.argument("num_tasks"))
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
        # The scores in units of log 2, and their maximum.
        q_parts = [f(f"fmul {FLOATS} {_load(f, q, kind, i)}, {scaling}") for i in vectors]
        with f.loop(0, length) as token:
            k_row = f.at(k, f.mul(token, f.argument("k_stride_token")), kind)
            product = f(f"fmul {FLOATS} {q_parts[0]}, {_load(f, k_row, kind, 0)}")
            for i in vectors[1:]:
                product = f.fma(q_parts[i], _load(f, k_row, kind, i), product)
            score = f(f"call reassoc float @llvm.vector.reduce.fadd.v16f32(float 0.0, {FLOATS} {product})")
            f.set(f.at(scores, token, "float"), "float", score)
        with f.when(has_mask):
            seen = f.at(mask, f.mul(sequence, f.argument("mask_stride")), "i8")
            with f.loop(0, length) as token:
                hidden = f(f"icmp eq i8 {f.get(f.at(seen, token, 'i8'), 'i8')}, 0")
                with f.when(hidden):
                    f.set(f.at(scores, token, "float"), "float", _MINUS_INFINITY)
        with f.loop(length, padded) as token:
            f.set(f.at(scores, token, "float"), "float", _MINUS_INFINITY)
        highest = f.slot(FLOATS, f.splat(_MINUS_INFINITY, "float"))
        with f.loop(0, padded, LANES) as token:
            some = f.get(f.at(scores, token, "float"), FLOATS, 4)
            pair = f"{FLOATS} {f.get(highest, FLOATS)}, {FLOATS} {some}"
            f.set(highest, FLOATS, f(f"call {FLOATS} @llvm.maxnum.v16f32({pair})"))
        highest = f(f"call float @llvm.vector.reduce.fmax.v16f32({FLOATS} {f.get(highest, FLOATS)})")
        highest = f.splat(highest, "float")
        # Probabilities, not yet divided by their sum.
        sums = f.slot(FLOATS, "zeroinitializer")
        with f.loop(0, padded, LANES) as token:
            address = f.at(scores, token, "float")
            power = _power_of_two(f, f(f"fsub {FLOATS} {f.get(address, FLOATS, 4)}, {highest}"))
            f.do(f"store {FLOATS} {power}, ptr {address}, align 4")
            f.set(sums, FLOATS, f(f"fadd {FLOATS} {f.get(sums, FLOATS)}, {power}"))
        total = f(f"call reassoc float @llvm.vector.reduce.fadd.v16f32(float 0.0, {FLOATS} {f.get(sums, FLOATS)})")
        inverse = f.splat(f(f"fdiv float 1.0, {total}"), "float")
        mixed = [f.slot(FLOATS, "zeroinitializer") for _ in vectors]
        with f.loop(0, length) as token:
            v_row = f.at(v, f.mul(token, f.argument("v_stride_token")), kind)
            probability = f.splat(f.get(f.at(scores, token, "float"), "float"), "float")
            for i in vectors:
                f.set(mixed[i], FLOATS, f.fma(probability, _load(f, v_row, kind, i), f.get(mixed[i], FLOATS)))
        y = f.at(f.argument("y"), f.mul(task, head_dim), "float")
        for i in vectors:
            value = f(f"fmul {FLOATS} {f.get(mixed[i], FLOATS)}, {inverse}")
            f.do(f"store {FLOATS} {value}, ptr {f.at(y, LANES * i, 'float')}, align 4")
    return f


_MINUS_INFINITY = "0xFFF0000000000000"


def _load(f: Function, row: str, kind: str, vector: int) -> str:
    """16 elements in float32."""
    value = f.get(f.at(row, LANES * vector, kind), f"<16 x {kind}>", 4 if kind == "float" else 2)
    return value if kind == "float" else f(f"fpext <16 x {kind}> {value} to {FLOATS}")


def _power_of_two(f: Function, x: str) -> str:
    """2**x for x <= 0; 0 below the smallest normal float32."""
    nearest = f(f"call {FLOATS} @llvm.rint.v16f32({FLOATS} {x})")
    rest = f(f"fsub {FLOATS} {x}, {nearest}")
    power = floats(_POWERS_OF_TWO[-1])
    for coefficient in _POWERS_OF_TWO[-2::-1]:
        power = f.fma(power, rest, floats(coefficient))
    is_normal = f(f"fcmp oge {FLOATS} {x}, {floats(-126)}")
    # NaN (a row that sees nothing) stays what it is.
    is_tiny = f(f"fcmp olt {FLOATS} {x}, {floats(-126)}")
    exponent = f(f"select <16 x i1> {is_normal}, {FLOATS} {nearest}, {FLOATS} zeroinitializer")
    shift = f(f"shl {WORDS} {f(f'fptosi {FLOATS} {exponent} to {WORDS}')}, {ints(23)}")
    scaled = f(f"add {WORDS} {f(f'bitcast {FLOATS} {power} to {WORDS}')}, {shift}")
    scaled = f(f"bitcast {WORDS} {scaled} to {FLOATS}")
    return f(f"select <16 x i1> {is_tiny}, {FLOATS} zeroinitializer, {FLOATS} {scaled}")
