"""`QuantizedLinear`: the module that stands where an `nn.Linear` stood; and `PackedLinear`, for a head in 16 bit.

They hold the weight in the layout of the backend that was chosen for it, made once at load. The layout is neither saved
(its buffers are not persistent: it depends on the processor) nor cast by `.to(dtype)` (its bits have a meaning).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmquant.errors import UserError
from llmquant.kernels.dispatch import (
    BACKENDS,
    DENSE_KERNELS,
    choose_backend,
    choose_dense_kernel,
    matmul,
    multiply_dense,
)
from llmquant.kernels.jit import is_plain
from llmquant.kernels.layout import LinearShape, check_width
from llmquant.runtime.attention import register
from llmquant.weight import QuantizedWeight


class QuantizedLinear(nn.Module):
    """y = x @ dequantize(weight).T + bias.

    x is [..., in_features] in `dtype`; the result has the same dtype. Gradients flow to x and to the bias, never to
    the codes.
    """

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        backend: str = "auto",
    ) -> None:
        """Raises UserError where `backend` is unknown or cannot run this weight on `device` in `dtype`."""
        super().__init__()
        device = torch.device(device)
        self.layer = LinearShape.of(weight)
        self.in_features = weight.in_features
        self.out_features = weight.out_features
        self.spec = weight.spec
        self.dtype = dtype
        chosen, self.backend_reason = choose_backend(self.layer, device, dtype, backend)
        self.backend_name = chosen.name
        self._hold(chosen.prepare(weight, dtype, device))
        self.bias = None if bias is None else nn.Parameter(bias.to(device, dtype), requires_grad=False)

    def _hold(self, prepared: tuple[Tensor, ...]) -> None:
        """Keep the tensors twice: as buffers, for whoever lists them, and as the tuple that every call needs."""
        self.prepared = prepared
        for i, tensor in enumerate(prepared):
            self.register_buffer(f"prepared_{i}", tensor, persistent=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_buffers": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._hold(self.prepared)
        # The model around it names an attention that a new process does not know.
        register()

    @property
    def device(self) -> torch.device:
        return self.prepared[0].device

    @property
    def weight(self) -> DenseWeight:
        """The dense weight, made when its values are first needed; its shape, dtype and device cost nothing."""
        return DenseWeight(self)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight [N, K] as this layer's backend sees it."""
        return BACKENDS[self.backend_name].dequantize(self.prepared, self.layer, dtype or self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Raises TypeError where x has another dtype, as a dense linear would."""
        if x.dtype != self.dtype:
            raise TypeError(f"x is {x.dtype}, but this linear was prepared for {self.dtype}")
        if self._needs_operator(x):
            return matmul(x, list(self.prepared), self.bias, self.backend_name, self.layer.as_ints())
        return BACKENDS[self.backend_name].matmul(x, self.prepared, self.bias, self.layer)

    def _needs_operator(self, x: Tensor) -> bool:
        """Whether somebody differentiates, traces or watches. The operator costs some ten to thirty microseconds of
        Python per call, as much as a small matmul, so whoever does nothing of it goes without."""
        if torch.is_grad_enabled() and self._wants_gradient(x):
            return True
        if not torch.compiler.is_compiling():
            return not is_plain(x)
        inline_rows = BACKENDS[self.backend_name].inline_rows
        return torch.compiler.is_exporting() or x.numel() >= inline_rows * self.in_features

    def _wants_gradient(self, x: Tensor) -> bool:
        return x.requires_grad or (self.bias is not None and self.bias.requires_grad)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """`.to()` and its kin: the layout moves where its backend can run, and is never cast."""
        moved = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if moved.dtype != self.dtype:
            raise UserError(
                f"{self.layer.describe()}: prepared for {self.dtype}, cannot be cast to {moved.dtype}; "
                f"load the model with that dtype"
            )
        refusal = BACKENDS[self.backend_name].refuses(self.layer, moved.device, self.dtype)
        if moved.device != self.device and refusal is not None:
            raise UserError(
                f"{self.layer.describe()}: prepared for backend '{self.backend_name}' on {self.device}, which cannot "
                f"run on {moved.device} ({refusal}); load the model on that device"
            )
        self._hold(tuple(tensor.to(moved.device) for tensor in self.prepared))
        if self.bias is not None:
            self.bias.data = fn(self.bias.data)
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {self.spec.describe()}, "
            f"bias={self.bias is not None}, backend={self.backend_name}"
        )


class PackedLinear(nn.Module):
    """An `nn.Linear` in bfloat16 on a CPU, its weight laid out as one of `DENSE_KERNELS` reads it.

    A plain linear brings its weight into oneDNN's layout at every call, which for one row is most of the work.
    """

    packed: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        """There must be a kernel: `choose_dense_kernel`."""
        super().__init__()
        self.in_features, self.out_features, self.dtype = linear.in_features, linear.out_features, linear.weight.dtype
        self.register_buffer("packed", torch.empty(0), persistent=False)
        self.bias = linear.bias
        self._hold(linear.weight.detach())

    def _hold(self, weight_NK: Tensor) -> None:
        self.kernel_name = choose_dense_kernel() or ""
        self.packed = DENSE_KERNELS[self.kernel_name].pack(weight_NK)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: the layout is this processor's, so the weight travels as a plain tensor."""
        return self.__dict__ | {"_buffers": {"packed": self.dequantize()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._hold(self.packed)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def weight(self) -> DenseWeight:
        """As that of a `QuantizedLinear`."""
        return DenseWeight(self)

    def dequantize(self) -> Tensor:
        """The weight [N, K] as a plain tensor."""
        return DENSE_KERNELS[self.kernel_name].unpack(self.packed, self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Raises TypeError where x has another dtype, RuntimeError where it has another width."""
        if x.dtype != self.dtype:
            raise TypeError(f"x is {x.dtype}, but this linear was prepared for {self.dtype}")
        check_width(x, self.in_features)
        if torch.is_grad_enabled() and (x.requires_grad or (self.bias is not None and self.bias.requires_grad)):
            return F.linear(x, self.dequantize(), self.bias)
        if torch.compiler.is_compiling() or not is_plain(x):
            return multiply_dense(x, self.packed, self.bias, self.out_features, self.kernel_name)
        return DENSE_KERNELS[self.kernel_name].multiply(x, self.packed, self.bias, self.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """`.to()` and its kin: the layout is this processor's, and stays as it is."""
        moved = fn(torch.empty(0, dtype=self.dtype, device="cpu"))
        if moved.dtype != self.dtype or moved.device.type != "cpu":
            raise UserError(
                f"head {self.out_features}x{self.in_features}: packed for the CPU in {self.dtype}, cannot become "
                f"{moved.dtype} on {moved.device}; load the model there with that dtype"
            )
        if self.bias is not None:
            self.bias.data = fn(self.bias.data)
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"kernel={self.kernel_name}"
        )


class DenseWeight:
    """Stands for the dense weight of a `QuantizedLinear` or `PackedLinear`.

    Some model code only peeks at `linear.weight.dtype` or `.device`: that stays free. Anything else (an attribute, a
    torch function) makes the dense tensor and uses that.
    """

    def __init__(self, linear: QuantizedLinear | PackedLinear) -> None:
        self._linear = linear

    @property
    def dtype(self) -> torch.dtype:
        return self._linear.dtype

    @property
    def device(self) -> torch.device:
        return self._linear.device

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self._linear.out_features, self._linear.in_features))

    def __getattr__(self, name: str) -> Any:
        if name == "_linear":  # asked for by copy and pickle before it is there
            raise AttributeError(name)
        return getattr(self._linear.dequantize(), name)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        def dense(value: Any) -> Any:
            return value._linear.dequantize() if isinstance(value, DenseWeight) else value

        return func(*map(dense, args), **{name: dense(value) for name, value in (kwargs or {}).items()})
