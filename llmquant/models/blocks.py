"""Decoder blocks and their linears, found in the module tree; and what a watched forward pass tells about them.

No table of models. The decoder blocks are the ModuleList with the most parameters below the text decoder. Its linears
are `nn.Linear` and GPT-2's `Conv1D` (the same thing, stored transposed), if they compute just that. Which linears read
the same input, in which order they run, and which of them write straight to the residual stream is seen by running a
block once and comparing tensors by identity.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from inspect import signature
from itertools import dropwhile
from traceback import walk_tb
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
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
    """Name of the ModuleList of decoder blocks, and the names of the blocks in order.

    Raises UserError for a model without such a list, and for one whose blocks are spread over several: another list
    beside it, or another with blocks of the same class.
    """
    kind, decoder = type(model).__name__, decoder_of(model)
    lists = set(_lists_of_blocks(decoder))
    names = {name: module for name, module in model.named_modules() if module in lists}
    if not names:
        raise UserError(f"{kind}: no list of decoder blocks with linears in it; nothing to quantize")

    def size(name: str) -> int:
        return sum(parameter.numel() for parameter in names[name].parameters())

    best = max(names, key=size)
    blocks = dict(names[best].named_children())
    parent, classes = best.rpartition(".")[0], {type(block) for block in blocks.values()}
    also = [
        name
        for name, module in names.items()
        if name != best and (name.rpartition(".")[0] == parent or classes & {type(block) for block in module})
    ]
    if also:
        raise UserError(
            f"{kind}: more than one list of decoder blocks ({', '.join(sorted([best, *also]))}); only models whose "
            "blocks are in one list, and run in that order, can be quantized"
        )
    for key, block in blocks.items():
        if type(block).forward is nn.Module.forward:
            raise UserError(
                f"{best}.{key}: this decoder block is a {type(block).__name__}, which is never called as a whole; such "
                "a model cannot be quantized"
            )
    return best, [f"{best}.{key}" for key in blocks]


def _lists_of_blocks(model: nn.Module) -> list[nn.ModuleList]:
    """Lists of modules with linears in them; neither lists of plain linears, nor lists inside another list."""
    found: list[nn.ModuleList] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if not isinstance(module, nn.ModuleList) or module in inside:
            continue
        if any(linears_of(block) and not is_linear_like(block) for block in module):
            found.append(module)
            inside |= set(module.modules())
    return found


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


def is_linear_like(module: nn.Module) -> bool:
    """Whether a module is a linear by its class; what it computes may still be something else."""
    return isinstance(module, (nn.Linear, Conv1D))


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has forward hooks, which may change its input or output."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes x @ W.T + b from one weight matrix that can be quantized, and nothing else.

    A subclass with a forward of its own (Falcon's) counts if that takes the input alone and gives the same on random
    numbers. One with a `__call__` of its own does not count, nor a linear that has parameters beside, or in the place
    of, its weight and bias, nor the one of `nn.MultiheadAttention`, whose weight is read without a call.
    """
    if not is_linear_like(module) or isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    held = {leaf: parameter for leaf, parameter in module._parameters.items() if parameter is not None}
    if "weight" not in held or held.keys() - {"weight", "bias"} or held["weight"].ndim != 2:
        return False
    has_own_forward = "forward" in vars(module) or type(module).forward not in (nn.Linear.forward, Conv1D.forward)
    if type(module).__call__ is not nn.Module.__call__:
        return False
    if not has_own_forward:
        return True
    if len(signature(module.forward).parameters) != 1:
        return False
    with torch.device("cpu"):  # transformers builds models with the meta device as the default: nothing is computed
        return _computes_a_linear(module)


def _computes_a_linear(module: nn.Module) -> bool:
    """Whether the forward of a linear gives x @ W.T + b for a small random weight, and inputs of several magnitudes."""
    draw = torch.Generator().manual_seed(0)
    weight_NK, bias_N, x_SLK = (
        torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((3, 4), (3,), (2, 6, 4))
    )
    x_SLK *= torch.tensor([1e-4, 1e-2, 1.0, 1e2, 1e4, 1e6], dtype=torch.float64)[:, None]
    has_bias = module._parameters.get("bias") is not None
    probe = copy(module)
    probe.__dict__ |= {"in_features": 4, "out_features": 3, "nf": 3, "nx": 4}
    probe.__dict__["_parameters"] = {
        "weight": nn.Parameter(weight_as_NK(module, weight_NK), requires_grad=False),
        "bias": nn.Parameter(bias_N, requires_grad=False) if has_bias else None,
    }
    try:
        with torch.no_grad():
            y_SLN = probe.forward(x_SLK)
    except Exception:  # code of any model, on other shapes than it was made for
        return False
    right_SLN = x_SLK @ weight_NK.T + (bias_N if has_bias else 0.0)
    same_shape = isinstance(y_SLN, Tensor) and y_SLN.shape == right_SLN.shape
    return same_shape and torch.allclose(y_SLN.double(), right_SLN, rtol=1e-9, atol=1e-12)


def linears_of(module: nn.Module) -> dict[str, nn.Module]:
    """Every linear below a module by its name within it, in the order of the tree."""
    return {name: child for name, child in module.named_modules() if is_linear(child)}


def linear_likes_of(module: nn.Module) -> dict[str, nn.Module]:
    """Every module below a module that is a linear by its class, by its name within it, in the order of the tree."""
    return {name: child for name, child in module.named_modules() if is_linear_like(child)}


def routers_of(block: nn.Module) -> dict[str, str]:
    """Linears of a block that choose or weigh instead of transforming, by name, with the reason to keep them.

    Engines build routers without a scheme, and have no kernel for one output. A router is found by its name, or beside
    E experts: there, a linear with E outputs, or all linears of a module of which the last has E outputs.
    """
    linears = linear_likes_of(block)
    found = {name: "a router, which no engine loads quantized" for name in linears if "router" in name.lower()}
    for parent, experts, count in _experts_of(block):
        for key, child in block.get_submodule(parent).named_children():
            inside = linear_likes_of(child)
            if inside and child is not experts and linear_shape(list(inside.values())[-1])[0] == count:
                names = [".".join(filter(None, (parent, key, name))) for name in inside]
                found |= dict.fromkeys(names, f"a router of {count} experts, which no engine loads quantized")
    for name, linear in linears.items():
        if linear_shape(linear)[0] == 1:
            found[name] = "a gate with one output, for which no engine has a kernel"
    return found


def _experts_of(block: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """(name of the module that holds them, experts, how many) of a block.

    Experts are a list of equal modules with linears in them, or a module with 3-D parameters that says so.
    """
    for name, module in block.named_modules():
        parent = name.rpartition(".")[0]
        if isinstance(module, nn.ModuleList):
            if len(module) > 1 and len({type(one) for one in module}) == 1 and linears_of(module[0]):
                yield parent, module, len(module)
            continue
        for parameter in module._parameters.values():
            if parameter is not None and parameter.ndim == 3 and is_experts(module, parameter.shape[0]):
                yield parent, module, parameter.shape[0]


def is_experts(module: nn.Module, count: int) -> bool:
    """Whether a module holds that many experts, by its class or an attribute of it."""
    if isinstance(module, _ConvNd):
        return False
    counts = {value for key, value in vars(module).items() if "expert" in key and type(value) is int}
    return count in counts or "expert" in type(module).__name__.lower()


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
