"""`QuantizedLinear`: the module that stands where an `nn.Linear` stood; and `PackedLinear`, for a head in 16 bit.

They hold the weight in the layout of the backend that was chosen for it, made once at load. The layout is neither saved
(its buffers are not persistent: it depends on the processor) nor cast by `.to(dtype)` (its bits have a meaning).

A state dict holds the tensors of the checkpoint instead, made when it is asked for: packed codes, scales and
zero-points in the format that the linear was read from, or the 16-bit weight. `load_state_dict` takes the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
from llmquant.runtime.attention import register
from llmquant.weight import QuantizedWeight, group_of_column


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
        format: str = "compressed-tensors",
    ) -> None:
        """format: the key of `FORMATS` in which a state dict holds the weight.

        Raises UserError where `backend` is unknown or cannot run this weight on `device` in `dtype`.
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
        """Bring a weight into the layout of the backend, and note what the layout does not tell about it."""
        self.layer = LinearShape.of(weight)
        self.scale_dtype = weight.scale_NG.dtype
        self.group_index_K = weight.group_index_K
        self._hold(BACKENDS[self.backend_name].prepare(weight, self.dtype, device))

    def _hold(self, prepared: tuple[Tensor, ...]) -> None:
        """Keep the tensors twice: as buffers, for whoever lists them, and as the tuple that every call needs."""
        self.prepared = prepared
        for i, tensor in enumerate(prepared):
            self.register_buffer(f"prepared_{i}", tensor, persistent=False)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: the layout is this processor's, so codes, scales and zero-points travel."""
        weight = self.quantized_weight()
        words = pack_bits(weight.codes_NK, self.spec.bits, dim=1)
        return self.__dict__ | {"_buffers": {}, "prepared": (words, weight.scale_NG, weight.zero_NG)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        words, scale_NG, zero_NG = self.prepared
        weight = QuantizedWeight(
            codes_NK=unpack_bits(words, self.spec.bits, 1, self.in_features),
            scale_NG=scale_NG,
            zero_NG=zero_NG,
            spec=self.spec,
            group_index_K=self.group_index_K,
        )
        if BACKENDS[self.backend_name].refuses(self.layer, words.device, self.dtype) is not None:
            chosen, self.backend_reason = choose_backend(self.layer, words.device, self.dtype)
            self.backend_name = chosen.name
        self._prepare(weight, words.device)
        # The model around it names an attention that a new process does not know.
        register()

    @property
    def device(self) -> torch.device:
        return self.prepared[0].device

    @property
    def format(self) -> Format:
        """The format of its tensors in a state dict."""
        return FORMATS[self.format_name]

    def quantized_weight(self) -> QuantizedWeight:
        """The codes, scales and zero-points that it was made of, on its device."""
        group_K = self.group_index_K
        if group_K is None:
            group_K = group_of_column(self.in_features, self.spec.group_size)
        codes_NK, scale_NG, zero_NG = BACKENDS[self.backend_name].restore(self.prepared, self.layer, group_K)
        return QuantizedWeight(
            codes_NK=codes_NK,
            scale_NG=scale_NG.to(self.scale_dtype),
            zero_NG=zero_NG,
            spec=self.spec,
            group_index_K=self.group_index_K,
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """The bias, and on the CPU what the format stores; UserError if the format cannot hold the weight exactly."""
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
        """Take what `_save_to_state_dict` gives; one that lacks a tensor changes nothing."""
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

    def check_move(self, fn: Callable[[Tensor], Tensor]) -> torch.device:
        """The device to which a function of `_apply` moves; UserError if it casts, or the backend cannot run there."""
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
        return moved.device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """`.to()` and its kin: the layout moves where its backend can run, and is never cast."""
        device = self.check_move(fn)
        self._hold(tuple(tensor.to(device) for tensor in self.prepared))
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

    def __init__(self, linear: nn.Linear, *, tied: bool = False) -> None:
        """There must be a kernel: `choose_dense_kernel`. tied: the weight belongs to the embedding too, and a state
        dict holds that very tensor, as it does for a plain linear."""
        super().__init__()
        # In a tuple, because a parameter that is an attribute would become one of this module.
        self._tied_weight = (linear.weight,) if tied else ()
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

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """The bias and the weight [N, K]."""
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
        """Take the weight [N, K] and the bias."""
        name = f"{prefix}weight"
        weight_NK = state_dict.get(name)
        if weight_NK is None:
            missing_keys.append(name)
        elif tuple(weight_NK.shape) != (self.out_features, self.in_features):
            error_msgs.append(f"{name}: {list(weight_NK.shape)}; must be {[self.out_features, self.in_features]}")
        else:
            self._hold(weight_NK.detach().to("cpu", self.dtype))
        rest = {other: value for other, value in state_dict.items() if other != name}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

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

    def check_move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """UserError if a function of `_apply` casts, or moves away from the CPU."""
        moved = fn(torch.empty(0, dtype=self.dtype, device="cpu"))
        if moved.dtype != self.dtype or moved.device.type != "cpu":
            raise UserError(
                f"head {self.out_features}x{self.in_features}: packed for the CPU in {self.dtype}, cannot become "
                f"{moved.dtype} on {moved.device}; load the model there with that dtype"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """`.to()` and its kin: the layout is this processor's, and stays as it is."""
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
