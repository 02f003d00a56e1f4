"""Which kernel runs a linear, why, and the one torch operator behind which they all stand.

A backend is a few functions over the tensors it prepared at load; `BACKENDS` lists them from the fastest to the one
that takes everything. `choose_backend` asks them in that order and can tell what each one said.

`llmquant::matmul` is one operator with a fake and a backward, so `torch.compile(fullgraph=True)`, `torch.export` and
CUDA graphs see a single node whatever backend is behind it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmquant.errors import UserError
from llmquant.kernels import cpu, gpu, llvm, reference
from llmquant.kernels.layout import LinearShape
from llmquant.weight import QuantizedWeight

BACKEND_VARIABLE = "LLMQUANT_BACKEND"
"""Environment variable that overrides `backend="auto"`; read at every choice."""

Prepared = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One way to compute y = x @ dequantize(W).T + bias."""

    name: str
    refuses: Callable[[LinearShape, torch.device, torch.dtype], str | None]
    """Why it cannot run this linear there, in words; None if it can."""
    prepare: Callable[[QuantizedWeight, torch.dtype, torch.device], Prepared]
    """The weight in its runtime layout: derived at load, never saved."""
    matmul: Callable[[Tensor, Prepared, Tensor | None, LinearShape], Tensor]
    """(x [..., K], prepared, bias [N] or None, layer) -> y [..., N] in the dtype of x."""
    dequantize: Callable[[Prepared, LinearShape, torch.dtype], Tensor]
    """The dense weight [N, K], back from the prepared tensors."""
    restore: Callable[[Prepared, LinearShape, Tensor], tuple[Tensor, Tensor, Tensor]]
    """(prepared, layer, group of each column int64 [K]) -> codes_NK uint8, scale_NG and zero_NG uint8, exactly those
    given to `prepare`; the scales in any dtype that holds them."""
    inline_rows: int = 0
    """Below so many rows of x, matmul is plain torch operators: a compiler does better to see them than to call it."""


BACKENDS: dict[str, Backend] = {
    "triton": Backend(
        name="triton",
        refuses=gpu.refuses,
        prepare=gpu.prepare,
        matmul=gpu.matmul,
        dequantize=gpu.dequantize,
        restore=gpu.restore,
    ),
    "triton-invariant": Backend(
        name="triton-invariant",
        refuses=gpu.refuses,
        prepare=gpu.prepare,
        matmul=gpu.matmul_invariant,
        dequantize=gpu.dequantize,
        restore=gpu.restore,
    ),
    "llvm": Backend(
        name="llvm",
        refuses=llvm.refuses,
        prepare=llvm.prepare,
        matmul=llvm.matmul,
        dequantize=llvm.dequantize,
        restore=llvm.restore,
    ),
    "cpu": Backend(
        name="cpu",
        refuses=cpu.refuses,
        prepare=cpu.prepare,
        matmul=cpu.matmul,
        dequantize=cpu.dequantize,
        restore=cpu.restore,
        inline_rows=cpu.PACKED_BELOW_ROWS // 2,
    ),
    "torch": Backend(
        name="torch",
        refuses=reference.refuses,
        prepare=reference.prepare,
        matmul=reference.matmul,
        dequantize=reference.dequantize,
        restore=reference.restore,
    ),
}


@dataclass(frozen=True, kw_only=True)
class DenseKernel:
    """One way to multiply with a weight in bfloat16 on a CPU that is faster than `F.linear`, because the weight lies as
    it is read: for a head that stays in 16 bits."""

    usable: Callable[[], bool]
    pack: Callable[[Tensor], Tensor]
    """Weight [N, K] bfloat16 -> how it lies in memory; depends on the processor."""
    unpack: Callable[[Tensor, int, int], Tensor]
    """(packed, N, K) -> the weight."""
    multiply: Callable[[Tensor, Tensor, Tensor | None, int], Tensor]
    """(x [..., K], packed, bias [N] or None, N) -> y [..., N]."""


DENSE_KERNELS: dict[str, DenseKernel] = {
    "llvm": DenseKernel(
        usable=llvm.multiplies_dense, pack=llvm.pack_dense, unpack=llvm.unpack_dense, multiply=llvm.multiply_dense
    ),
    "onednn": DenseKernel(
        usable=cpu.multiplies_bfloat16, pack=cpu.pack_dense, unpack=cpu.unpack_dense, multiply=cpu.multiply_dense
    ),
}


def choose_dense_kernel() -> str | None:
    """The first of `DENSE_KERNELS` that is usable on this processor."""
    return next((name for name, kernel in DENSE_KERNELS.items() if kernel.usable()), None)


@dataclass(frozen=True)
class Choice:
    """The backend of one linear and how it came to it."""

    backend: Backend
    reason: str
    refusals: dict[str, str]
    """What the backends that cannot run this linear said, by name."""


def explain_choice(layer: LinearShape, device: torch.device, dtype: torch.dtype, requested: str = "auto") -> Choice:
    """The backend for a linear, the reason, and the refusals of the others.

    `requested` is a name of `BACKENDS` or "auto"; for "auto" the variable LLMQUANT_BACKEND decides if it is set.
    Raises UserError for an unknown name, and for a named backend that refuses.
    """
    source = "asked for"
    if requested == "auto" and (from_environment := os.environ.get(BACKEND_VARIABLE, "auto")) != "auto":
        requested, source = from_environment, f"{BACKEND_VARIABLE} is set"
    if requested != "auto" and requested not in BACKENDS:
        raise UserError(f"backend '{requested}' ({source}): not one of auto, {', '.join(BACKENDS)}; use --backend auto")
    answers = {name: backend.refuses(layer, device, dtype) for name, backend in BACKENDS.items()}
    refusals = {name: answer for name, answer in answers.items() if answer is not None}
    if requested != "auto":
        if requested in refusals:
            raise UserError(
                f"backend '{requested}' ({source}): cannot run {layer.describe()} on {device} in {_short(dtype)}: "
                f"{refusals[requested]}; use --backend auto"
            )
        return Choice(BACKENDS[requested], source, refusals)
    name = next(name for name in BACKENDS if name not in refusals)
    return Choice(BACKENDS[name], "the first that takes it" if name != "torch" else "no other takes it", refusals)


def choose_backend(
    layer: LinearShape, device: torch.device, dtype: torch.dtype, requested: str = "auto"
) -> tuple[Backend, str]:
    """`explain_choice` in short: the backend and the reason."""
    choice = explain_choice(layer, device, dtype, requested)
    return choice.backend, choice.reason


@torch.library.custom_op("llmquant::matmul", mutates_args=())
def matmul(x: Tensor, prepared: list[Tensor], bias: Tensor | None, backend: str, layer: list[int]) -> Tensor:
    """x [..., K] -> y [..., N] by the named backend; `layer` is `LinearShape.as_ints()`."""
    return BACKENDS[backend].matmul(x, tuple(prepared), bias, LinearShape.from_ints(layer))


@matmul.register_fake
def _(x: Tensor, prepared: list[Tensor], bias: Tensor | None, backend: str, layer: list[int]) -> Tensor:
    return x.new_empty((*x.shape[:-1], layer[0]))


@torch.library.custom_op("llmquant::dequantize", mutates_args=())
def dequantize(prepared: list[Tensor], backend: str, layer: list[int], dtype: torch.dtype) -> Tensor:
    """The dense weight [N, K] of the named backend's prepared tensors."""
    return BACKENDS[backend].dequantize(tuple(prepared), LinearShape.from_ints(layer), dtype)


@dequantize.register_fake
def _(prepared: list[Tensor], backend: str, layer: list[int], dtype: torch.dtype) -> Tensor:
    return prepared[0].new_empty((layer[0], layer[1]), dtype=dtype)


@torch.library.custom_op("llmquant::multiply_dense", mutates_args=())
def multiply_dense(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, kernel: str) -> Tensor:
    """x [..., K] -> y [..., N] by the named one of `DENSE_KERNELS`."""
    return DENSE_KERNELS[kernel].multiply(x, packed, bias, out_features)


@multiply_dense.register_fake
def _(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, kernel: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _keep_for_backward(ctx, inputs, output) -> None:
    _, prepared, bias, backend, layer = inputs
    ctx.save_for_backward(*prepared)
    ctx.backend, ctx.layer, ctx.has_bias = backend, layer, bias is not None


def _backward(ctx, grad_y: Tensor):
    """The gradient of x is grad_y @ W; the codes are constants, so nothing flows to them."""
    weight_NK = dequantize(list(ctx.saved_tensors), ctx.backend, ctx.layer, grad_y.dtype)
    grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
    return grad_y @ weight_NK, [None] * len(ctx.saved_tensors), grad_bias, None, None


matmul.register_autograd(_backward, setup_context=_keep_for_backward)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
