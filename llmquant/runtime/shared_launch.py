"""Linears that read the same input, multiplied in one launch: queries, keys and values, or gate and up.

A model calls these linears one after another with the same tensor, each as a module of its own. `share_launches` finds
them when a model is loaded, and stores their weights as one. From then on, the first linear of a group multiplies by
the weights of all and keeps the outputs of the others until they are called. A linear that is called with any other
tensor, or with one that was written to since, multiplies by its own weight, so results do not depend on the order of
the calls.

Launches are shared for few rows, where the time between two launches counts. Autograd, `torch.compile` and
`torch.export` see single linears.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.errors import one_line
from llmquant.kernels.dispatch import BACKENDS
from llmquant.runtime.linear import QuantizedLinear

MAX_ROWS = 64
"""Largest number of rows of x for which launches are shared. With more, the arithmetic takes longer than a launch."""
MAX_UNUSED = 4
"""Number of shared launches in succession with outputs that no linear took, after which a group stops."""

_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", lambda device_index: 0)
"""(index of a GPU) -> its current stream. A torch without CUDA has no such function."""


@dataclass(slots=True)
class _Kept:
    """Outputs for one x, for the linears that were not called with it yet."""

    x: Tensor
    state: tuple[Any, ...]
    """`_state_of` x when the outputs were computed."""
    outputs: dict[int, Tensor]
    """Output of each linear, by its position in the group."""


class SharedLaunch:
    """A group of linears that share launches. It has no reference to the linears, which refer to it."""

    def __init__(self, linears: Sequence[QuantizedLinear]) -> None:
        """Store the weights and the biases of the linears as one; those of each become views.

        linears: at least two, each pair of which `_may_share`, in the order in which the model calls them.
        """
        backend = BACKENDS[linears[0].backend_name]
        assert backend.join is not None
        self.size = len(linears)
        self._multiply = backend.matmul
        self._prepared, weights = backend.join([linear.prepared for linear in linears])
        self._sizes: list[int] = []
        """Numbers of columns into which the output of all is split: those of each linear, and between them padding."""
        self._positions: list[int] = []
        """Position of each linear among `_sizes`."""
        for index, linear in enumerate(linears):
            padding = len(weights[index][0]) * 64 - linear.out_features if index + 1 < self.size else 0
            self._positions.append(len(self._sizes))
            self._sizes += [linear.out_features, padding] if padding else [linear.out_features]
        self._shape = replace(linears[0].shape, out_features=sum(self._sizes))
        self._max_values = MAX_ROWS * linears[0].in_features
        self._bias_N = self._join_biases(linears)
        self._bias_addresses = [0 if linear.bias is None else linear.bias.data_ptr() for linear in linears]
        self._kept: _Kept | None = None
        self._num_unused = 0
        for index, (linear, weight) in enumerate(zip(linears, weights, strict=True)):
            linear.join_group(self, index, weight)

    def _join_biases(self, linears: Sequence[QuantizedLinear]) -> Tensor | None:
        biases = [linear.bias for linear in linears if linear.bias is not None]
        if not biases:
            return None
        bias_N = biases[0].new_zeros(sum(self._sizes))
        pieces = bias_N.split(self._sizes)
        for linear, bias, position in zip(linears, biases, self._positions, strict=True):
            linear.bias = nn.Parameter(pieces[position].copy_(bias.detach()), requires_grad=bias.requires_grad)
        return bias_N

    @property
    def is_active(self) -> bool:
        """Whether the group still shares launches."""
        return self._num_unused < MAX_UNUSED

    def stop(self) -> None:
        """Let every linear multiply by its own weight from now on."""
        self._num_unused, self._kept = MAX_UNUSED, None

    def output(self, index: int, x: Tensor, bias_N: Tensor | None, has_hooks: bool) -> Tensor | None:
        """Return the output [..., N] of a linear, or None if it has to multiply by its own weight.

        index: position of the linear in the group. x: [..., K]. bias_N: the linear's bias. has_hooks: whether the
        linear has hooks, which may write to x.
        """
        kept = self._kept
        if kept is None or kept.x is not x:
            if index > 0 or not self.is_active or not 0 < x.numel() <= self._max_values:
                return None
            kept = None
        if bias_N is not None and bias_N.data_ptr() != self._bias_addresses[index]:
            return None  # the bias was replaced
        if has_hooks and x.is_inference():
            self._kept = None
            return None
        state = _state_of(x)
        if kept is not None and kept.state == state:
            y = kept.outputs.pop(index, None)  # also with several threads, every output is returned once
            if not kept.outputs:
                self._kept, self._num_unused = None, 0
            if y is not None:
                return y
        return self._launch(x, state) if index == 0 else None

    def _launch(self, x: Tensor, state: tuple[Any, ...]) -> Tensor | None:
        """Multiply by all weights, keep the outputs of the other linears, and return that of the first."""
        if self._kept is not None:
            self._kept, self._num_unused = None, self._num_unused + 1
            if not self.is_active:
                return None
        y = self._multiply(x, self._prepared, self._bias_N, self._shape)
        # The pieces of the "unsafe" split have version counters of their own: a write to one is not one to the others.
        pieces = torch.unsafe_split_with_sizes(y, self._sizes, -1)
        first, *others = self._positions
        self._kept = _Kept(x, state, {index: pieces[position] for index, position in enumerate(others, start=1)})
        return pieces[first]


def _state_of(x: Tensor) -> tuple[Any, ...]:
    """Return what must not change between the calls of a group: the writes to x, the stream, and whether it captures.

    Inference tensors do not count writes. A group is only made if the model's code does not write to x between the
    calls, and hooks are handled in `SharedLaunch.output`.
    """
    version = -1 if x.is_inference() else x._version
    if not x.is_cuda:
        return (version,)
    return version, _raw_stream(x.get_device()), torch.cuda.is_current_stream_capturing()


def share_launches(model: Any) -> list[SharedLaunch]:
    """Let the quantized linears of a model that read the same tensor share launches, and return their groups.

    The model is changed in place: weights of a group are stored as one. Only linears of backends that can join weights
    are changed. A model whose code fails on a single token stays as it is, which a warning says.
    """
    linears = [
        module
        for module in model.modules()
        if isinstance(module, QuantizedLinear) and BACKENDS[module.backend_name].join is not None
    ]
    if len(linears) < 2:
        return []
    return [SharedLaunch(group) for readers in _readers_of_one_tensor(model, linears) for group in _joinable(readers)]


def _readers_of_one_tensor(model: Any, linears: Sequence[QuantizedLinear]) -> list[list[QuantizedLinear]]:
    """Run a model on one token, and return the linears that read the same tensor, in the order of their calls.

    The linears return zeros instead of products. A linear that is called more than once is in no group.
    """
    calls: list[tuple[QuantizedLinear, Tensor, int]] = []  # keeps the tensors, so that an id means one of them

    def record(linear: QuantizedLinear, x: Tensor) -> Tensor:
        calls.append((linear, x, x._version))
        return x.new_zeros(*x.shape[:-1], linear.out_features)

    with ExitStack() as stack:
        for linear in linears:
            stack.enter_context(_replaced_forward(linear, partial(record, linear)))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        try:
            model(torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)
        except Exception as error:  # the code of any model
            warnings.warn(
                "linears do not share launches, so decoding is slower: the model fails on one token "
                f"({one_line(error)})",
                stacklevel=2,
            )
            return []
    num_calls = Counter(id(linear) for linear, _, _ in calls)
    readers: dict[tuple[int, int], list[QuantizedLinear]] = {}
    for linear, x, version in calls:
        if num_calls[id(linear)] == 1:
            readers.setdefault((id(x), version), []).append(linear)
    return list(readers.values())


@contextmanager
def _replaced_forward(module: nn.Module, forward: Any) -> Iterator[None]:
    before = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
        if before is not None:
            vars(module)["forward"] = before


def _joinable(linears: Sequence[QuantizedLinear]) -> list[list[QuantizedLinear]]:
    """Divide linears that read one tensor into groups of at least two that may share launches."""
    groups: list[list[QuantizedLinear]] = []
    for linear in linears:
        group = next((group for group in groups if _may_share(group[0], linear)), None)
        if group is None:
            groups.append([linear])
        else:
            group.append(linear)
    return [group for group in groups if len(group) > 1]


def _may_share(one: QuantizedLinear, other: QuantizedLinear) -> bool:
    can_join = BACKENDS[one.backend_name].can_join
    return (
        one.backend_name == other.backend_name
        and one.dtype == other.dtype
        and (one.bias is None) == (other.bias is None)
        and can_join is not None
        and can_join(one.shape, one.prepared, other.shape, other.prepared)
    )
