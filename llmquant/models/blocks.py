"""Decoder blocks and their linears, found in the module tree, and the structure of a block, traced in a forward pass.

There is no table of models. The decoder blocks are the ModuleList with the most parameters below the text decoder.
Linears are `nn.Linear` and GPT-2's `Conv1D` (a linear stored transposed), if they compute nothing else (`is_linear`).
One run of a block shows which linears read the same input, in which order they run, and which of them write directly
to the residual stream. Tensors are compared by identity.

Letters: N out_features, K in_features.
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

from llmquant.errors import UserError, one_line
from llmquant.hooks import hooked


@dataclass(frozen=True)
class InputGroup:
    """Linears of one block that read the same tensor; they are quantized together."""

    linears: tuple[str, ...]
    """Names of the linears within the block, in the order they run."""
    residual_source: str | None
    """Module within the block ("" for the block itself) whose input is the residual stream that the group's only linear
    adds to; None if the group has several linears, or if its linear adds to no residual stream."""


@dataclass(frozen=True)
class BlockStructure:
    """How the linears of one block are connected."""

    input_groups: tuple[InputGroup, ...]
    """Linears that are called once, grouped by input, in the order they run."""
    unused: tuple[str, ...]
    """Linears that the traced pass did not call."""
    repeated: tuple[str, ...]
    """Linears that the traced pass called more than once."""


def find_blocks(model: nn.Module) -> tuple[str, list[str]]:
    """Return the name of the ModuleList of decoder blocks, and the names of the blocks in order.

    Raises UserError for a model without such a list, for blocks that have no forward pass, and for blocks in several
    lists: a second list has the same parent, or contains blocks of the same class.
    """
    kind, decoder = type(model).__name__, decoder_of(model)
    lists = set(_block_lists_of(decoder))
    lists_by_name = {name: module for name, module in model.named_modules() if module in lists}
    if not lists_by_name:
        raise UserError(f"{kind}: no list of decoder blocks with linears in it; nothing to quantize")

    def num_parameters(name: str) -> int:
        return sum(parameter.numel() for parameter in lists_by_name[name].parameters())

    largest = max(lists_by_name, key=num_parameters)
    blocks = dict(lists_by_name[largest].named_children())
    parent, classes = largest.rpartition(".")[0], {type(block) for block in blocks.values()}
    others = [
        name
        for name, module in lists_by_name.items()
        if name != largest and (name.rpartition(".")[0] == parent or classes & {type(block) for block in module})
    ]
    if others:
        raise UserError(
            f"{kind}: more than one list of decoder blocks ({', '.join(sorted([largest, *others]))}); only models "
            "whose blocks are in one list, and run in that order, can be quantized"
        )
    for key, block in blocks.items():
        if type(block).forward is nn.Module.forward:
            raise UserError(
                f"{largest}.{key}: this decoder block is a {type(block).__name__}, which has no forward pass; "
                "such a model cannot be quantized"
            )
    return largest, [f"{largest}.{key}" for key in blocks]


def _block_lists_of(model: nn.Module) -> list[nn.ModuleList]:
    """Return the ModuleLists that contain linears, except lists of plain linears and lists inside a returned list."""
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
    """Return the text decoder, which contains the decoder blocks, or the whole model if transformers names none."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return decoder if isinstance(decoder, nn.Module) and _block_lists_of(decoder) else model


def modules_outside(model: nn.Module, block_names: Sequence[str]) -> list[str]:
    """Return the names of the modules outside the blocks that have parameters or persistent buffers of their own."""
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


def run_model_code(model: nn.Module, call: Callable[[], Any]) -> Any:
    """Run the model's own code; turn its exceptions into a UserError.

    Exceptions from llmquant's own hooks, and out-of-memory errors, are not changed.
    """
    try:
        return call()
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if _is_from_llmquant(error):
            raise
        raise UserError(
            f"{type(model).__name__}: the model's own forward pass fails ({type(error).__name__}: "
            f"{one_line(error)}); check that this version of transformers runs the original"
        ) from error


def _is_from_llmquant(error: Exception) -> bool:
    """Whether the exception was raised in, or passed through, llmquant's code below the model's code."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)]
    below = list(dropwhile(lambda name: name.startswith("llmquant."), modules))
    # llmquant.runtime.attention replaces torch's attention and passes on the exceptions that torch raises.
    return not below or any(name.startswith("llmquant.") and name != "llmquant.runtime.attention" for name in below)


def is_linear_like(module: nn.Module) -> bool:
    """Whether a module is a linear by its class; it may still compute something else (`is_linear`)."""
    return isinstance(module, (nn.Linear, Conv1D))


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has forward hooks, which may change its input or output."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes x @ W.T + b from one weight matrix that can be quantized, and nothing else.

    A subclass with its own `forward` (Falcon's) counts if `forward` takes only the input and computes the same on
    random numbers. These do not count: a subclass with its own `__call__`; a module with parameters other than weight
    and bias; the output projection of `nn.MultiheadAttention`, whose weight is read without a call.
    """
    if not is_linear_like(module) or isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    parameters = {leaf: parameter for leaf, parameter in module._parameters.items() if parameter is not None}
    if "weight" not in parameters or parameters.keys() - {"weight", "bias"} or parameters["weight"].ndim != 2:
        return False
    has_own_forward = "forward" in vars(module) or type(module).forward not in (nn.Linear.forward, Conv1D.forward)
    if type(module).__call__ is not nn.Module.__call__:
        return False
    if not has_own_forward:
        return True
    if len(signature(module.forward).parameters) != 1:
        return False
    with torch.device("cpu"):  # transformers builds models with meta as the default device, which computes nothing
        return _computes_a_linear(module)


def _computes_a_linear(module: nn.Module) -> bool:
    """Whether a module's forward returns x @ W.T + b for a small random weight and inputs of several magnitudes."""
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
    except Exception:  # the code of any model, on shapes that it was not written for
        return False
    expected_SLN = x_SLK @ weight_NK.T + (bias_N if has_bias else 0.0)
    same_shape = isinstance(y_SLN, Tensor) and y_SLN.shape == expected_SLN.shape
    return same_shape and torch.allclose(y_SLN.double(), expected_SLN, rtol=1e-9, atol=1e-12)


def linears_of(module: nn.Module) -> dict[str, nn.Module]:
    """Return every linear below a module by its name within the module, in the order of the module tree."""
    return {name: child for name, child in module.named_modules() if is_linear(child)}


def linear_likes_of(module: nn.Module) -> dict[str, nn.Module]:
    """Return, in the form of `linears_of`, every module that is a linear by its class (`is_linear_like`)."""
    return {name: child for name, child in module.named_modules() if is_linear_like(child)}


def routers_of(block: nn.Module) -> dict[str, str]:
    """Return the routers and gates of a block: name -> reason not to quantize it.

    Inference engines build routers without a quantization scheme, and have no kernel for a single output. A linear is a
    router by its name, or by its place next to E experts: a linear with E outputs, or any linear of a module whose last
    linear has E outputs.
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
    """Yield (name of the parent module, experts, number of experts) for all experts of a block.

    Experts are a list of modules of one class that contain linears, or a module with 3-D parameters (`is_experts`).
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
    """Whether a module contains `count` experts, by the name of its class or by one of its attributes."""
    if isinstance(module, _ConvNd):
        return False
    counts = {value for key, value in vars(module).items() if "expert" in key and type(value) is int}
    return count in counts or "expert" in type(module).__name__.lower()


def linear_shape(linear: nn.Module) -> tuple[int, int]:
    """Return (out_features, in_features)."""
    out_features, in_features = weight_of(linear).shape
    return out_features, in_features


def weight_as_NK(linear: nn.Module, weight: Tensor) -> Tensor:
    """Convert a linear's weight from its stored layout to [N, K], or back. Conv1D stores the transpose."""
    return weight.T if isinstance(linear, Conv1D) else weight


def weight_of(linear: nn.Module) -> Tensor:
    """Return a view of the weight of a linear, [N, K]."""
    assert isinstance(linear.weight, Tensor)
    return weight_as_NK(linear, linear.weight)


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


class _Additions(TorchFunctionMode):
    """Records the operands of every tensor addition."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in ("add", "__add__", "__radd__", "add_", "__iadd__") and len(args) == 2:
            left, right = args
            if isinstance(left, Tensor) and isinstance(right, Tensor) and left.shape == right.shape:
                self.pairs.append((left, right))
        return function(*args, **(kwargs or {}))


def trace_structure(block: nn.Module, run: Callable[[], Any]) -> BlockStructure:
    """Run a block once and return how its linears are connected.

    run: calls the block on real activations. The trace keeps every tensor alive until the end, so that equal addresses
    mean the same tensor.
    """
    linears = linears_of(block)
    name_of = {module: name for name, module in block.named_modules()}
    linear_inputs: list[tuple[str, Tensor]] = []
    linear_outputs: dict[str, Tensor] = {}
    module_inputs: list[tuple[str, Tensor]] = []

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        tensor = first_tensor(args, kwargs)
        if tensor is not None:
            (linear_inputs if name_of[module] in linears else module_inputs).append((name_of[module], tensor))

    def after(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if isinstance(output, Tensor):
            linear_outputs[name_of[module]] = output

    additions = _Additions()
    with (
        hooked([(module, before) for module in name_of], before=True),
        hooked([(linear, after) for linear in linears.values()]),
        additions,
    ):
        run()

    num_calls = Counter(name for name, _ in linear_inputs)
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in linear_inputs:
        if num_calls[name] == 1:
            groups.setdefault(_identity(tensor), []).append(name)

    input_groups = []
    for names in groups.values():
        source = None
        if len(names) == 1:
            source = _residual_source(linear_outputs[names[0]], additions.pairs, module_inputs)
        input_groups.append(InputGroup(tuple(names), source))
    return BlockStructure(
        input_groups=tuple(input_groups),
        unused=tuple(name for name in linears if name not in num_calls),
        repeated=tuple(name for name, count in num_calls.items() if count > 1),
    )


def first_tensor(args: tuple, kwargs: dict) -> Tensor | None:
    """Return the first tensor among the arguments of a call."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def with_first_tensor(args: tuple, kwargs: dict, tensor: Tensor) -> tuple[tuple, dict]:
    """Return the arguments with every occurrence of the first tensor replaced by another tensor."""
    first = first_tensor(args, kwargs)
    swapped = [tensor if value is first else value for value in (*args, *kwargs.values())]
    return tuple(swapped[: len(args)]), dict(zip(kwargs, swapped[len(args) :], strict=True))


def _residual_source(
    output: Tensor, additions: list[tuple[Tensor, Tensor]], module_inputs: list[tuple[str, Tensor]]
) -> str | None:
    """Return the name of the module whose input an output is added to; None unless it is added exactly once."""
    key = _identity(output)
    partners = [
        right if _identity(left) == key else left
        for left, right in additions
        if key in (_identity(left), _identity(right))
    ]
    if len(partners) != 1:
        return None
    stream = _identity(partners[0])
    return next((name for name, tensor in module_inputs if _identity(tensor) == stream), None)


def parse_device(name: str) -> torch.device:
    """Return the device for `auto`, `cpu` or `cuda[:n]`; `auto` prefers CUDA. Raises UserError for any other."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device '{name}': not a device; use auto, cpu, cuda or cuda:0") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device '{name}': this torch sees no CUDA device; use --device cpu")
    return device
