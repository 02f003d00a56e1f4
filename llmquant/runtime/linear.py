"""`QuantizedLinear`, which replaces a quantized `nn.Linear`, and `PackedDenseLinear`, which replaces a 16-bit head.

Both hold their weight in the layout of one kernel backend, computed at load. The layout depends on the processor, so
its buffers are not persistent. The buffers hold packed bits instead of numbers, so a cast to another dtype raises
UserError.

A state dict holds the tensors of the checkpoint instead, which are computed on demand: packed codes (integer levels),
scales and zero-points in the format that the linear was read from, or the 16-bit weight. `load_state_dict` accepts the
same tensors.

Letters: N out_features, K in_features, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmquant.errors import UserError
from llmquant.formats.bitpack import pack_bits, unpack_bits
from llmquant.formats.format import Format
from llmquant.formats.registry import FORMATS
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
from llmquant.runtime.attention import register_attention
from llmquant.weight import QuantizedWeight, group_of_column

if TYPE_CHECKING:
    from llmquant.runtime.shared_launch import SharedLaunch


class PickledWeight(NamedTuple):
    """The weight of a pickled `QuantizedLinear`. Unlike a backend's layout, it does not depend on the processor."""

    words: Tensor
    """Codes [N, K], packed along K into int32."""
    scale_NG: Tensor
    """Scales [N, G], float16, bfloat16 or float32."""
    zero_NG: Tensor
    """Zero-points [N, G], uint8."""


class QuantizedLinear(nn.Module):
    """A linear with a quantized weight: y = x @ dequantize(weight).T + bias.

    x is [..., in_features] in `dtype`; the result has the same dtype. Gradients flow to x and to the bias, never to
    the codes.
    """

    _group: SharedLaunch | None = None
    """The linears that share launches with this one, or None."""
    _group_index: int = 0
    """Position of this linear in its group."""

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        backend: str = "auto",
        format: str = "compressed-tensors",
    ) -> None:
        """dtype: dtype of x and of the result. backend: a key of `BACKENDS`, or auto. format: format of the weight in a
        state dict, a key of `FORMATS`.

        Raises UserError if `backend` is unknown or cannot run this weight on `device` in `dtype`.
        """
        super().__init__()
        device = torch.device(device)
        self.in_features = weight.in_features
        self.out_features = weight.out_features
        self.spec = weight.spec
        self.dtype = dtype
        self.format_name = format
        chosen, self.backend_reason = choose_backend(LinearShape.of(weight), device, dtype, backend)
        self.backend_name = chosen.name
        self._prepare(weight, device)
        self.bias = None if bias is None else nn.Parameter(bias.to(device, dtype), requires_grad=False)

    def _prepare(self, weight: QuantizedWeight, device: torch.device) -> None:
        """Convert a weight to the backend's layout, and keep the attributes that the layout does not store."""
        self.shape = LinearShape.of(weight)
        self.scale_dtype = weight.scale_NG.dtype
        self.group_index_K = weight.group_index_K
        self._set_prepared(BACKENDS[self.backend_name].prepare(weight, self.dtype, device))

    def _set_prepared(self, prepared: tuple[Tensor, ...]) -> None:
        """Store the backend's tensors twice: as the tuple that every call needs, and as buffers of the module.

        The linear leaves its group, whose weight holds the previous tensors.
        """
        if self._group is not None:
            self._group.stop()
            self._group = None
        self.prepared = prepared
        for i, tensor in enumerate(prepared):
            self.register_buffer(f"prepared_{i}", tensor, persistent=False)

    def join_group(self, group: SharedLaunch, index: int, prepared: tuple[Tensor, ...]) -> None:
        """Share launches with other linears. prepared: the same weight, as views into that of the group."""
        self._set_prepared(prepared)
        self._group, self._group_index = group, index

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies and pickles, with a `PickledWeight` instead of this processor's layout.

        Copies do not share launches.
        """
        weight = self.quantized_weight()
        pickled = PickledWeight(
            words=pack_bits(weight.codes_NK, self.spec.bits, dim=1), scale_NG=weight.scale_NG, zero_NG=weight.zero_NG
        )
        return self.__dict__ | {"_buffers": {}, "prepared": pickled, "_group": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the weight from a `PickledWeight`. Another backend is chosen if the old one cannot run here.

        A pickled block may name our attention function, which a new process has not registered yet.
        """
        register_attention()
        super().__setstate__(state)
        pickled: PickledWeight = state["prepared"]
        device = pickled.words.device
        weight = QuantizedWeight(
            codes_NK=unpack_bits(pickled.words, self.spec.bits, 1, self.in_features),
            scale_NG=pickled.scale_NG,
            zero_NG=pickled.zero_NG,
            spec=self.spec,
            group_index_K=self.group_index_K,
        )
        if BACKENDS[self.backend_name].refuses(self.shape, device, self.dtype) is not None:
            chosen, self.backend_reason = choose_backend(self.shape, device, self.dtype)
            self.backend_name = chosen.name
        self._prepare(weight, device)

    @property
    def device(self) -> torch.device:
        return self.prepared[0].device

    @property
    def format(self) -> Format:
        """The format of the weight's tensors in a state dict."""
        return FORMATS[self.format_name]

    def quantized_weight(self) -> QuantizedWeight:
        """Return the codes, scales and zero-points that this linear was built from, on its device."""
        group_K = self.group_index_K
        if group_K is None:
            group_K = group_of_column(self.in_features, self.spec.group_size)
        codes_NK, scale_NG, zero_NG = BACKENDS[self.backend_name].restore(self.prepared, self.shape, group_K)
        return QuantizedWeight(
            codes_NK=codes_NK,
            scale_NG=scale_NG.to(self.scale_dtype),
            zero_NG=zero_NG,
            spec=self.spec,
            group_index_K=self.group_index_K,
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Store the bias, and the weight's tensors on the CPU.

        Raises UserError if the format cannot store the weight exactly.
        """
        super()._save_to_state_dict(destination, prefix, keep_vars)
        try:
            tensors = self.format.pack(self.quantized_weight().to("cpu"))
        except UserError as error:
            raise UserError(
                f"{prefix.removesuffix('.')}: cannot be saved as {self.format_name} ({error}); "
                "run `llmquant convert` on the checkpoint that the model was loaded from"
            ) from None
        destination.update({f"{prefix}{suffix}": tensor for suffix, tensor in tensors.items()})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load the tensors that `_save_to_state_dict` stores. If one is missing, the weight does not change."""
        names = {suffix: f"{prefix}{suffix}" for suffix in self.format.suffixes}
        tensors = {suffix: state_dict[name].cpu() for suffix, name in names.items() if name in state_dict}
        stored = self.format.tensor_shapes(self.spec, self.out_features, self.in_features, self.scale_dtype)
        missing = [names[suffix] for suffix in stored if suffix not in tensors and suffix != self.format.group_index]
        missing_keys.extend(missing)
        if not missing:
            try:
                weight = self.format.unpack(tensors, self.spec, self.out_features, self.in_features)
                self._prepare(weight, self.device)
            except UserError as error:
                error_msgs.append(f"{prefix}{error}")
        rest = {name: value for name, value in state_dict.items() if name not in names.values()}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    @property
    def weight(self) -> DenseWeight:
        """The dense weight, computed at each use of its values. Its shape, dtype and device cost nothing."""
        return DenseWeight(self)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the dense weight [N, K] that the backend multiplies with, by default in the linear's dtype."""
        return BACKENDS[self.backend_name].dequantize(self.prepared, self.shape, dtype or self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return y for x. Raises TypeError if x has another dtype than the linear."""
        if x.dtype != self.dtype:
            raise TypeError(f"x is {x.dtype}, but this linear was prepared for {self.dtype}")
        bias_N = self.bias
        if self._needs_operator(x, bias_N):
            return matmul(x, list(self.prepared), bias_N, self.backend_name, self.shape.as_ints())
        if self._group is not None:
            has_hooks = bool(self._forward_hooks or self._forward_pre_hooks)
            if (y := self._group.output(self._group_index, x, bias_N, has_hooks)) is not None:
                return y
        return BACKENDS[self.backend_name].matmul(x, self.prepared, bias_N, self.shape)

    def _needs_operator(self, x: Tensor, bias_N: Tensor | None) -> bool:
        """Return whether this call needs the custom operator, because autograd, tracing or a dispatch mode is active.

        The operator adds 10 to 30 microseconds of Python, as much as a small matmul takes, so plain inference calls the
        kernel directly.
        """
        if torch.is_grad_enabled() and (x.requires_grad or (bias_N is not None and bias_N.requires_grad)):
            return True
        if not torch.compiler.is_compiling():
            return not is_plain(x)
        traced_below_rows = BACKENDS[self.backend_name].traced_below_rows
        return torch.compiler.is_exporting() or x.numel() >= traced_below_rows * self.in_features

    def check_move(self, fn: Callable[[Tensor], Tensor]) -> torch.device:
        """Return the device to which a function given to `_apply` moves tensors.

        Raises UserError if the function casts to another dtype, or if the backend cannot run on that device.
        """
        moved = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if moved.dtype != self.dtype:
            raise UserError(
                f"{self.shape.describe()}: prepared for {self.dtype}, cannot be cast to {moved.dtype}; "
                f"load the model with that dtype"
            )
        refusal = BACKENDS[self.backend_name].refuses(self.shape, moved.device, self.dtype)
        if moved.device != self.device and refusal is not None:
            raise UserError(
                f"{self.shape.describe()}: prepared for backend '{self.backend_name}' on {self.device}, which cannot "
                f"run on {moved.device} ({refusal}); load the model on that device"
            )
        return moved.device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Implement `.to()`, `.cuda()` and similar methods.

        The layout moves only to a device on which its backend runs, and it is never cast.
        """
        device = self.check_move(fn)
        if device != self.device:
            self._set_prepared(tuple(tensor.to(device) for tensor in self.prepared))
        if self.bias is not None:
            self.bias.data = fn(self.bias.data)
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {self.spec.describe()}, "
            f"bias={self.bias is not None}, backend={self.backend_name}"
            + (f", launched with {self._group.size - 1} others" if self._group is not None else "")
        )


class PackedDenseLinear(nn.Module):
    """An unquantized bfloat16 linear on a CPU, with its weight in the layout that one of `DENSE_KERNELS` reads.

    A plain linear converts its weight to oneDNN's layout at every call, which is most of the work for one row.
    """

    packed: Tensor
    """The weight in the layout of the kernel."""

    def __init__(self, linear: nn.Linear, *, tied: bool = False) -> None:
        """The caller has checked that `choose_dense_kernel` returns a kernel.

        tied: whether the embedding shares the weight; a state dict then stores the shared tensor, as for a plain
        linear.
        """
        super().__init__()
        # The tuple hides the parameter from nn.Module, which would register it.
        self._tied_weight = (linear.weight,) if tied else ()
        self.in_features, self.out_features, self.dtype = linear.in_features, linear.out_features, linear.weight.dtype
        self.register_buffer("packed", torch.empty(0), persistent=False)
        self.bias = linear.bias
        self._pack(linear.weight.detach())

    def _pack(self, weight_NK: Tensor) -> None:
        """Choose the kernel for this processor, and convert a weight to its layout."""
        self.kernel_name = choose_dense_kernel() or ""
        self.packed = DENSE_KERNELS[self.kernel_name].pack(weight_NK)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies and pickles, with a plain weight [N, K] instead of this processor's layout."""
        return self.__dict__ | {"_buffers": {"packed": self.dequantize()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pack(self.packed)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def weight(self) -> DenseWeight:
        """The dense weight, computed at each use of its values."""
        return DenseWeight(self)

    def dequantize(self) -> Tensor:
        """Return the weight [N, K] as a plain tensor."""
        return DENSE_KERNELS[self.kernel_name].unpack(self.packed, self.out_features, self.in_features)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Store the bias and the weight [N, K]."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight_NK = next((weight if keep_vars else weight.detach() for weight in self._tied_weight), None)
        destination[f"{prefix}weight"] = self.dequantize() if weight_NK is None else weight_NK

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load the weight [N, K] and the bias."""
        name = f"{prefix}weight"
        weight_NK = state_dict.get(name)
        if weight_NK is None:
            missing_keys.append(name)
        elif tuple(weight_NK.shape) != (self.out_features, self.in_features):
            error_msgs.append(f"{name}: {list(weight_NK.shape)}; must be {[self.out_features, self.in_features]}")
        else:
            self._pack(weight_NK.detach().to("cpu", self.dtype))
        rest = {other: value for other, value in state_dict.items() if other != name}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ weight.T + bias. Raises TypeError if x has another dtype, and RuntimeError for another width."""
        if x.dtype != self.dtype:
            raise TypeError(f"x is {x.dtype}, but this linear was prepared for {self.dtype}")
        check_width(x, self.in_features)
        if torch.is_grad_enabled() and (x.requires_grad or (self.bias is not None and self.bias.requires_grad)):
            return F.linear(x, self.dequantize(), self.bias)
        if torch.compiler.is_compiling() or not is_plain(x):
            return multiply_dense(x, self.packed, self.bias, self.out_features, self.kernel_name)
        return DENSE_KERNELS[self.kernel_name].multiply(x, self.packed, self.bias, self.out_features)

    def check_move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Raise UserError if a function given to `_apply` casts to another dtype, or moves tensors off the CPU."""
        moved = fn(torch.empty(0, dtype=self.dtype, device="cpu"))
        if moved.dtype != self.dtype or moved.device.type != "cpu":
            raise UserError(
                f"head {self.out_features}x{self.in_features}: packed for the CPU in {self.dtype}, cannot become "
                f"{moved.dtype} on {moved.device}; load the model there with that dtype"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedDenseLinear:
        """Implement `.to()`, `.cuda()` and similar methods. Only the bias changes."""
        self.check_move(fn)
        if self.bias is not None:
            self.bias.data = fn(self.bias.data)
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"kernel={self.kernel_name}"
        )


class DenseWeight:
    """A lazy proxy for the dense weight of a `QuantizedLinear` or `PackedDenseLinear`.

    Model code often reads only `linear.weight.dtype`, `.device` or `.shape`, which costs nothing. Any other attribute,
    and any torch function, first dequantizes the weight.
    """

    def __init__(self, linear: QuantizedLinear | PackedDenseLinear) -> None:
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
        if name == "_linear":  # copy and pickle look it up before it is set
            raise AttributeError(name)
        return getattr(self._linear.dequantize(), name)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        def dense(value: Any) -> Any:
            return value._linear.dequantize() if isinstance(value, DenseWeight) else value

        return func(*map(dense, args), **{name: dense(value) for name, value in (kwargs or {}).items()})
