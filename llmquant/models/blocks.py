"""Decoder blocks and their linears, found in the module tree; and what a watched forward pass tells about them.

No table of models. The decoder blocks are the ModuleList with the most parameters. Its linears are `nn.Linear` and
GPT-2's `Conv1D` (the same thing, stored transposed). Which linears read the same input, in which order they run, and
which of them write straight to the residual stream is seen by running a block once and comparing tensors by identity.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import dropwhile
from traceback import walk_tb
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from llmquant.errors import UserError, first_words


@dataclass(frozen=True)
class Stage:
    """Linears of one block that read the same tensor; they are solved together."""

    linears: tuple[str, ...]
    """Names within the block, in the order they run."""
    residual_source: str | None
    """Module within the block ("" for the block itself) whose input is the residual stream that the stage's one linear
    is added to, or None when that is not what happens with its output."""


@dataclass(frozen=True)
class BlockPlan:
    """How one block runs."""

    stages: tuple[Stage, ...]
    unused: tuple[str, ...]
    """Linears that the watched pass did not call."""
    repeated: tuple[str, ...]
    """Linears that it called more than once."""


def find_blocks(model: nn.Module) -> tuple[str, list[str]]:
    """Name of the ModuleList of decoder blocks, and the names of the blocks in order."""
    decoder = decoder_of(model)
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if module in set(_lists_of_blocks(decoder)):
            size = sum(parameter.numel() for parameter in module.parameters())
            if best is None or size > best[0]:
                best = (size, name, module)
    if best is None:
        raise UserError(f"{type(model).__name__}: no list of decoder blocks with linears in it; nothing to quantize")
    return best[1], [f"{best[1]}.{key}" for key, _ in best[2].named_children()]


def _lists_of_blocks(model: nn.Module) -> list[nn.ModuleList]:
    return [module for module in model.modules() if isinstance(module, nn.ModuleList) and linears_of(module)]


def decoder_of(model: Any) -> nn.Module:
    """The text decoder, below which the decoder blocks are, or the whole model where transformers names none."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return decoder if isinstance(decoder, nn.Module) and _lists_of_blocks(decoder) else model


def modules_outside(model: nn.Module, block_names: Sequence[str]) -> list[str]:
    """Names of the modules outside the blocks that have parameters or persistent buffers of their own."""
    inside = {module for name in block_names for module in model.get_submodule(name).modules()}
    return [
        name
        for name, module in model.named_modules()
        if module not in inside
        and (
            any(parameter is not None for parameter in module._parameters.values())
            or any(key not in module._non_persistent_buffers_set for key in module._buffers)
        )
    ]


def run_own(model: nn.Module, call: Callable[[], Any]) -> Any:
    """Run code of the model; an exception of that code becomes a UserError.

    Exceptions of ours, which a hook of ours may raise below it, pass as they are, and so does a lack of memory.
    """
    try:
        return call()
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if _is_ours(error):
            raise
        raise UserError(
            f"{type(model).__name__}: the model's own forward pass fails ({type(error).__name__}: "
            f"{first_words(error)}); check that this version of transformers runs the original"
        ) from error


def _is_ours(error: Exception) -> bool:
    """Whether the exception passed through code of ours that the model had called."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)]
    below = list(dropwhile(lambda name: name.startswith("llmquant."), modules))
    # Our attention stands in the place of torch's and passes on what that raises.
    return not below or any(name.startswith("llmquant.") and name != "llmquant.runtime.attention" for name in below)


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes x @ W.T + b from one weight matrix that can be quantized."""
    return isinstance(module, (nn.Linear, Conv1D))


def linears_of(module: nn.Module) -> dict[str, nn.Module]:
    """Every linear below a module by its name within it, in the order of the tree."""
    return {name: child for name, child in module.named_modules() if is_linear(child)}


def linear_shape(linear: nn.Module) -> tuple[int, int]:
    """(out_features, in_features)."""
    out_features, in_features = weight_of(linear).shape
    return out_features, in_features


def weight_as_NK(linear: nn.Module, weight: Tensor) -> Tensor:
    """A linear's stored weight as [out_features, in_features] (Conv1D stores the transpose); and back again."""
    return weight.T if isinstance(linear, Conv1D) else weight


def weight_of(linear: nn.Module) -> Tensor:
    """The weight of a linear as [out_features, in_features], a view."""
    assert isinstance(linear.weight, Tensor)
    return weight_as_NK(linear, linear.weight)


def _key(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


class _Additions(TorchFunctionMode):
    """Notes the operands of every tensor addition."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in ("add", "__add__", "__radd__", "add_", "__iadd__") and len(args) == 2:
            left, right = args
            if isinstance(left, Tensor) and isinstance(right, Tensor) and left.shape == right.shape:
                self.pairs.append((left, right))
        return function(*args, **(kwargs or {}))


def watch(block: nn.Module, run: Callable[[], Any]) -> BlockPlan:
    """Run a block once and see how its linears are connected.

    run: calls the block on real activations. Every tensor seen is kept alive until the end, so that equal addresses
    mean the same tensor.
    """
    linears = linears_of(block)
    name_of = {module: name for name, module in linears.items()}
    inputs: list[tuple[str, Tensor]] = []
    outputs: dict[str, Tensor] = {}
    entered: list[tuple[str, Tensor]] = []
    handles = []

    def before(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            tensor = first_tensor(args, kwargs)
            if tensor is None:
                return
            if module in name_of:
                inputs.append((name, tensor))
            else:
                entered.append((name, tensor))

        return hook

    def after(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs[name] = output

        return hook

    for name, module in block.named_modules():
        handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
    for name, module in linears.items():
        handles.append(module.register_forward_hook(after(name)))
    additions = _Additions()
    try:
        with additions:
            run()
    finally:
        for handle in handles:
            handle.remove()

    calls = Counter(name for name, _ in inputs)
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in inputs:
        if calls[name] == 1:
            groups.setdefault(_key(tensor), []).append(name)

    stages = []
    for names in groups.values():
        source = _residual_source(outputs[names[0]], additions.pairs, entered) if len(names) == 1 else None
        stages.append(Stage(tuple(names), source))
    return BlockPlan(
        stages=tuple(stages),
        unused=tuple(name for name in linears if name not in calls),
        repeated=tuple(name for name, count in calls.items() if count > 1),
    )


def first_tensor(args: tuple, kwargs: dict) -> Tensor | None:
    """The first tensor a module was called with."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def with_first_tensor(args: tuple, kwargs: dict, tensor: Tensor) -> tuple[tuple, dict]:
    """The same arguments with another tensor in the place, or places, of the first."""
    first = first_tensor(args, kwargs)
    swapped = [tensor if value is first else value for value in (*args, *kwargs.values())]
    return tuple(swapped[: len(args)]), dict(zip(kwargs, swapped[len(args) :], strict=True))


def _residual_source(
    output: Tensor, additions: list[tuple[Tensor, Tensor]], entered: list[tuple[str, Tensor]]
) -> str | None:
    """The module whose input is what the output is added to, when it is added to exactly one such tensor."""
    key = _key(output)
    partners = [right if _key(left) == key else left for left, right in additions if key in (_key(left), _key(right))]
    if len(partners) != 1:
        return None
    wanted = _key(partners[0])
    return next((name for name, tensor in entered if _key(tensor) == wanted), None)


def device_of(name: str) -> torch.device:
    """The device that `auto`, `cpu` or `cuda[:n]` stands for."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device '{name}': not a device; use auto, cpu, cuda or cuda:0") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device '{name}': this torch sees no CUDA device; use --device cpu")
    return device
