"""The kernel backends, the choice of one for each linear, and the torch operator that calls them.

A backend is a set of functions over the tensors that it prepares when a model is loaded. `BACKENDS` lists the backends
in order of speed; the last one supports every linear. `explain_choice` takes the first one that does not refuse, and
also returns the reasons of all backends that refuse.

The operator `llmquant::matmul` has a fake (meta) implementation and a backward pass that serve all backends, so
`torch.compile(fullgraph=True)`, `torch.export` and CUDA graphs see a single node.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmquant.errors import UserError
from llmquant.kernels import cpu, gpu, llvm, reference
from llmquant.kernels.layout import LinearShape
from llmquant.weight import QuantizedWeight

BACKEND_VARIABLE = "LLMQUANT_BACKEND"
"""Environment variable that overrides `backend="auto"`. `explain_choice` reads it at every call."""

Prepared = tuple[Tensor, ...]
"""The tensors of one weight in a backend's runtime layout. Each backend's module docstring lists its members in order,
with shapes and dtypes. Some members may be empty; only the backend that made the tuple can read it."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One way to compute y = x @ dequantize(W).T + bias."""

    name: str
    refuses: Callable[[LinearShape, torch.device, torch.dtype], str | None]
    """(shape, device, dtype of x) -> why the backend cannot run such a linear, in words; None if it can."""
    prepare: Callable[[QuantizedWeight, torch.dtype, torch.device], Prepared]
    """(weight, dtype of x, device) -> the weight in its runtime layout, which is made at load and never saved."""
    matmul: Callable[[Tensor, Prepared, Tensor | None, LinearShape], Tensor]
    """(x [..., K], prepared, bias [N] or None, shape) -> y [..., N] in the dtype of x."""
    dequantize: Callable[[Prepared, LinearShape, torch.dtype], Tensor]
    """(prepared, shape, dtype) -> the dense weight [N, K] in dtype."""
    restore: Callable[[Prepared, LinearShape, Tensor], tuple[Tensor, Tensor, Tensor]]
    """(prepared, shape, group of each column int64 [K]) -> codes_NK uint8, scale_NG, zero_NG uint8: exactly those that
    `prepare` got. The scales may have any dtype that holds them exactly."""
    traced_below_rows: int = 0
    """Number of rows of x below which a compiler traces the torch operators of matmul instead of a single node."""
    can_join: Callable[[LinearShape, Prepared, LinearShape, Prepared], bool] | None = None
    """(shape, prepared, shape and prepared of another weight) -> whether `join` supports both; None if there is no
    `join`."""
    join: Callable[[Sequence[Prepared]], tuple[Prepared, list[Prepared]]] | None = None
    """Weights that `can_join` -> (one weight with the rows of all, the given weights as views into it). Each weight's
    rows are padded to a multiple of 64, except those of the last. None if the backend cannot join weights."""


BACKENDS: dict[str, Backend] = {
    "triton": Backend(
        name="triton",
        refuses=gpu.refuses,
        prepare=gpu.prepare,
        matmul=gpu.matmul,
        dequantize=gpu.dequantize,
        restore=gpu.restore,
        can_join=gpu.can_join,
        join=gpu.join_weights,
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
        traced_below_rows=cpu.PACKED_BELOW_ROWS // 2,
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
"""All backends by name, fastest first."""


@dataclass(frozen=True, kw_only=True)
class DenseKernel:
    """A faster `F.linear` for a bfloat16 weight on a CPU, used for a head that stays in 16 bits.

    The weight is stored in the order in which the kernel reads it.
    """

    usable: Callable[[], bool]
    """Whether the kernel runs on this processor and is faster than `F.linear` there."""
    pack: Callable[[Tensor], Tensor]
    """Weight [N, K] bfloat16 -> the weight in the layout of this processor."""
    unpack: Callable[[Tensor, int, int], Tensor]
    """(packed, N, K) -> the weight [N, K] bfloat16."""
    multiply: Callable[[Tensor, Tensor, Tensor | None, int], Tensor]
    """(x [..., K], packed, bias [N] or None, N) -> y [..., N]."""


DENSE_KERNELS: dict[str, DenseKernel] = {
    "llvm": DenseKernel(
        usable=llvm.multiplies_dense, pack=llvm.pack_dense, unpack=llvm.unpack_dense, multiply=llvm.multiply_dense
    ),
    "onednn": DenseKernel(
        usable=cpu.onednn_multiplies_bfloat16, pack=cpu.pack_dense, unpack=cpu.unpack_dense, multiply=cpu.multiply_dense
    ),
}
"""All kernels for a dense bfloat16 weight by name, fastest first."""


def choose_dense_kernel() -> str | None:
    """Return the name of the first of `DENSE_KERNELS` that is usable on this processor, or None."""
    return next((name for name, kernel in DENSE_KERNELS.items() if kernel.usable()), None)


@dataclass(frozen=True)
class BackendChoice:
    """The backend of one linear, and why it was chosen."""

    backend: Backend
    reason: str
    """Why this backend was chosen, in words."""
    refusals: dict[str, str]
    """Backend name -> why that backend cannot run this linear, in words, for the backends that refuse."""


def explain_choice(
    shape: LinearShape, device: torch.device, dtype: torch.dtype, requested: str = "auto"
) -> BackendChoice:
    """Choose the backend for a linear whose x has this dtype, and explain the choice.

    requested: a name of `BACKENDS`, or "auto". "auto" takes the backend that the environment variable LLMQUANT_BACKEND
    names; if it is not set, it takes the first backend that does not refuse. Raises UserError for an unknown name, and
    for a requested backend that refuses.
    """
    source = "requested"
    if requested == "auto" and (from_environment := os.environ.get(BACKEND_VARIABLE, "auto")) != "auto":
        requested, source = from_environment, f"{BACKEND_VARIABLE} is set"
    if requested != "auto" and requested not in BACKENDS:
        raise UserError(f"backend '{requested}' ({source}): not one of auto, {', '.join(BACKENDS)}; use --backend auto")
    refusal_of = {name: backend.refuses(shape, device, dtype) for name, backend in BACKENDS.items()}
    refusals = {name: refusal for name, refusal in refusal_of.items() if refusal is not None}
    if requested != "auto":
        if requested in refusals:
            raise UserError(
                f"backend '{requested}' ({source}): cannot run {shape.describe()} on {device} in {_dtype_name(dtype)}: "
                f"{refusals[requested]}; use --backend auto"
            )
        return BackendChoice(BACKENDS[requested], source, refusals)
    name = next(name for name in BACKENDS if name not in refusals)
    return BackendChoice(
        BACKENDS[name],
        "first backend that supports this linear" if name != "torch" else "no other backend supports this linear",
        refusals,
    )


def choose_backend(
    shape: LinearShape, device: torch.device, dtype: torch.dtype, requested: str = "auto"
) -> tuple[Backend, str]:
    """Choose a backend by `explain_choice`; return it and the reason."""
    choice = explain_choice(shape, device, dtype, requested)
    return choice.backend, choice.reason


@torch.library.custom_op("llmquant::matmul", mutates_args=())
def matmul(x: Tensor, prepared: list[Tensor], bias: Tensor | None, backend: str, shape: list[int]) -> Tensor:
    """x [..., K] -> y [..., N] by the named backend. `shape` is `LinearShape.as_ints()`."""
    return BACKENDS[backend].matmul(x, tuple(prepared), bias, LinearShape.from_ints(shape))


@matmul.register_fake
def _(x: Tensor, prepared: list[Tensor], bias: Tensor | None, backend: str, shape: list[int]) -> Tensor:
    return x.new_empty((*x.shape[:-1], shape[0]))


@torch.library.custom_op("llmquant::dequantize", mutates_args=())
def dequantize(prepared: list[Tensor], backend: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    """Return the dense weight [N, K] of the named backend's prepared tensors."""
    return BACKENDS[backend].dequantize(tuple(prepared), LinearShape.from_ints(shape), dtype)


@dequantize.register_fake
def _(prepared: list[Tensor], backend: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    return prepared[0].new_empty((shape[0], shape[1]), dtype=dtype)


@torch.library.custom_op("llmquant::multiply_dense", mutates_args=())
def multiply_dense(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, kernel: str) -> Tensor:
    """x [..., K] -> y [..., N] by the named kernel of `DENSE_KERNELS`."""
    return DENSE_KERNELS[kernel].multiply(x, packed, bias, out_features)


@multiply_dense.register_fake
def _(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, kernel: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _save_for_backward(ctx, inputs, output) -> None:
    """Save in `ctx` what `_backward` needs."""
    _, prepared, bias, backend, shape = inputs
    ctx.save_for_backward(*prepared)
    ctx.backend, ctx.shape, ctx.has_bias = backend, shape, bias is not None


def _backward(ctx, grad_y: Tensor):
    """Return the gradients of x (grad_y @ W) and of the bias. The prepared tensors are constants and get none."""
    weight_NK = dequantize(list(ctx.saved_tensors), ctx.backend, ctx.shape, grad_y.dtype)
    grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
    return grad_y @ weight_NK, [None] * len(ctx.saved_tensors), grad_bias, None, None


matmul.register_autograd(_backward, setup_context=_save_for_backward)


def _dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without `torch.`, such as `float16`."""
    return str(dtype).removeprefix("torch.")
