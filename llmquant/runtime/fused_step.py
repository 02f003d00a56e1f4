"""Fewer and larger kernels for the decode step of a transformers model, by `kernels.decode`.

In the Llama of transformers 5.23, a norm executes eight PyTorch operations that launch kernels, and a rotary embedding
ten (counted; views are not). During the capture of a decode step, `FusedStep.active` replaces each by one kernel, and
an attention over a cache by two. It does so in four places:

    forward of RMS norms, of feed-forward layers down(silu(gate(x)) * up(x)), and of blocks x + attention(norm(x)), in
    which that sum and the next norm are one kernel
    `apply_rotary_pos_emb` of the module that defines the model
    the function that transformers' registry names "sdpa"
    `FixedLayer.update`, which stores a key and a value

A replacement is used only if it is right: before its first use with a shape, it and the original run on the same random
input, and their results must agree within rounding. Models whose norms or embeddings follow another formula keep their
own.

While `active` lasts, the functions are replaced in the whole process, so only one capture may take place at a time.
Other threads, and attention over any other cache, still get the original functions. Code that replaces the same
functions in another thread at the same time is not supported.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.errors import one_line

FUSED_DEVICES = {"cuda"}
"""Types of devices on which decode steps use `kernels.decode`."""
POSITION_NAMES = ("layer_idx", "layer_id", "_group_index")
"""Attributes that hold the position of a module, and not what it computes."""
ROTARY_FUNCTION = "apply_rotary_pos_emb"
"""The function of a model's module that rotates queries and keys."""
BRANCH_SCALE = 1 / 64
"""Scale of the input for which the sum in a block is so small that the results show its other parts."""
SILU_CLASSES = ("SiLUActivation", "SiLU")
"""Names of the classes of silu."""


class FusedStep:
    """The replacements for one model, and which of them are right."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._device = device
        self._kernels = _import_kernels() if device.type in FUSED_DEVICES else None
        self._verdicts: dict[tuple[Any, ...], Any] = {}
        self.used: set[str] = set()
        """Names of the kernels in use."""
        self.refusals: dict[str, str] = {}
        """Why a kernel is not used for some shape: name of the kernel -> reason."""
        if isinstance(self._kernels, str):
            self.refusals["all"], self._kernels = self._kernels, None
        self._thread: int | None = None
        """The thread that captures; None outside of captures."""
        self._caches: set[int] = set()
        """Addresses of the keys over which `attend` may be used."""
        modules = list(model.modules())
        self._norms = [module for module in modules if _is_norm(module)]
        self._feed_forwards = [module for module in modules if _is_feed_forward(module)]
        self._blocks = [module for module in modules if _is_block(module)]
        self._kinds: dict[int, int] = {}
        """Kind of each norm in `kernels.decode`, by the norm's id."""
        files = {sys.modules.get(type(module).__module__) for module in modules}
        self._files = [file for file in files if callable(getattr(file, ROTARY_FUNCTION, None))]

    def add_cache(self, keys: Tensor) -> None:
        """Allow `attend` for the cache [S, G, T, D] of a layer, of which the step writes the place `length`."""
        self._caches.add(keys.data_ptr())

    def describe(self) -> tuple[str, ...]:
        """Return the names of the kernels in use, then "-name: reason" for those that are not used for some shape.

        Kernels for which the model has no layer of the kind that they replace are in neither list.
        """
        return (*sorted(self.used), *(f"-{name}: {reason}" for name, reason in sorted(self.refusals.items())))

    @contextmanager
    def active(self, length: Tensor) -> Iterator[None]:
        """Use the replacements. length: int64 [1], the place of the cache that the step writes."""
        if self._kernels is None:
            yield
            return
        self._thread = threading.get_ident()
        try:
            with ExitStack() as stack:
                for method, modules in (
                    (self._norm, self._norms),
                    (self._feed_forward, self._feed_forwards),
                    (self._block, self._blocks),
                ):
                    for module in modules:
                        forward = self._in_this_thread(module.forward, partial(method, module, module.forward))
                        stack.enter_context(_replaced(module, "forward", forward))
                for file in self._files:
                    original = getattr(file, ROTARY_FUNCTION)
                    rotate = self._in_this_thread(original, partial(self._rotate, original))
                    stack.enter_context(_replaced(file, ROTARY_FUNCTION, rotate))
                stack.enter_context(self._registered_attention(length))
                yield
        finally:
            self._thread = None

    def _in_this_thread(self, original: Callable, replacement: Callable) -> Callable:
        """Return a function that calls the replacement in the thread that captures, and the original in others."""

        def call(*args: Any, **options: Any) -> Any:
            return (replacement if threading.get_ident() == self._thread else original)(*args, **options)

        return call

    def _is_right(self, name: str, key: tuple[Any, ...], check: Callable[[], Any]) -> Any:
        """Return the result of `check`, which is computed once per key. It is None if the check raises."""
        key = (name, *key)
        if key not in self._verdicts:
            try:
                verdict = check()
                reason = "its results differ from the model's"
            except Exception as error:  # a kernel that cannot be compiled or launched here is not used
                verdict, reason = None, f"{type(error).__name__}: {one_line(error)}"
            self._verdicts[key] = verdict
            if verdict is None or verdict is False:
                self.refusals[name] = reason
            else:
                self.used.add(name)
        return self._verdicts[key]

    def _random_like(self, tensor: Tensor, seed: int = 0) -> Tensor:
        """Return normal values with the shape and the strides' order of a tensor. Global generators do not change."""
        generator = torch.Generator(tensor.device).manual_seed(seed)
        values = torch.randn(tensor.shape, generator=generator, device=tensor.device, dtype=torch.float32)
        return torch.empty_like(tensor).copy_(values)

    def _norm(self, norm: Any, original: Callable, x: Tensor, *args: Any, **options: Any) -> Any:
        weight_W, eps = norm.weight, _epsilon(norm)
        if args or options or x.dtype != weight_W.dtype or x.shape[-1] != weight_W.shape[0]:
            self.refusals.setdefault("rms_norm", "a norm has further inputs, or a weight of another dtype or width")
            return original(x, *args, **options)
        kernels: Any = self._kernels

        def best_kind() -> int | None:
            sample = self._random_like(x)
            # With a weight of ones, kind 0 and kind 2 give the same results, so either may be chosen.
            truth, results = original(sample), {}
            for kind in kernels.NORM_KINDS:
                result = kernels.rms_norm(sample, weight_W, eps, kind)
                if _agree(truth, result):
                    results[kind] = (truth.float() - result.float()).abs().sum().item()
            return min(results, key=lambda kind: results[kind]) if results else None

        kind = self._is_right("rms_norm", (_formula(norm), x.shape, x.dtype), best_kind)
        if kind is None:
            return original(x)
        self._kinds[id(norm)] = kind
        return kernels.rms_norm(x, weight_W, eps, kind)

    def _block(self, block: Any, original: Callable, hidden_states: Tensor, *args: Any, **options: Any) -> Any:
        """Compute a block with one kernel for x + attention(norm(x)) and the norm after it."""
        kernels: Any = self._kernels
        norm = block.post_attention_layernorm

        def fused(x: Tensor) -> Tensor:
            attention = block.self_attn(hidden_states=block.input_layernorm(x), **options)[0]
            total, normed = kernels.add_rms_norm(x, attention, norm.weight, _epsilon(norm), self._kinds[id(norm)])
            return total + block.mlp(normed)

        def check() -> bool:
            # The original comes first: it also finds the kind of the norm. Both write the same place of the cache.
            x = self._random_like(hidden_states)
            truth = original(x, **options)
            if not isinstance(truth, Tensor) or id(norm) not in self._kinds or not _agree(truth, fused(x)):
                return False
            # The norms give almost the same output for a small x, so its block shows factors of what is added to x.
            x *= BRANCH_SCALE
            ulp = torch.finfo(x.dtype).eps * x.float().abs().max()
            return _agree(original(x, **options).float() - x, fused(x).float() - x, x.dtype, ulp)

        key = (*map(_formula, block.modules()), hidden_states.shape, hidden_states.dtype)
        if args or not self._is_right("add_rms_norm", key, check) or id(norm) not in self._kinds:
            return original(hidden_states, *args, **options)
        return fused(hidden_states)

    def _feed_forward(self, layer: Any, original: Callable, x: Tensor, *args: Any, **options: Any) -> Any:
        kernels: Any = self._kernels
        if args or options:
            self.refusals.setdefault("silu_product", "a feed-forward layer has further inputs")
            return original(x, *args, **options)

        def fused(x: Tensor) -> Tensor:
            return layer.down_proj(kernels.silu_product(layer.gate_proj(x), layer.up_proj(x)))

        def check() -> bool:
            sample = self._random_like(x)
            return _agree(original(sample), fused(sample))

        key = (*map(_formula, layer.modules()), x.shape, x.dtype)
        return fused(x) if self._is_right("silu_product", key, check) else original(x)

    def _rotate(self, original: Callable, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kw: Any) -> Any:
        kernels: Any = self._kernels
        if args or kw or not kernels.can_rotate(q, k, cos, sin):
            self.refusals.setdefault("rotate", "the model's rotary embedding has further inputs or other shapes")
            return original(q, k, cos, sin, *args, **kw)

        def check() -> bool:
            inputs = [self._random_like(tensor, seed) for seed, tensor in enumerate((q, k, cos, sin))]
            # The two halves of a head have the same angles.
            half = cos.shape[-1] // 2
            inputs[2:] = [torch.cat([angles[..., :half]] * 2, dim=-1) for angles in inputs[2:]]
            truth, results = original(*inputs), kernels.rotate(*inputs)
            return all(map(_agree, truth, results))

        if self._is_right("rotate", (original, q.shape, k.shape, cos.shape, q.dtype), check):
            return kernels.rotate(q, k, cos, sin)
        return original(q, k, cos, sin)

    def store(self, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, length: Tensor) -> bool:
        """Write a key and a value [S, G, 1, D] into caches [S, G, T, D], and return whether that was done."""
        kernels: Any = self._kernels
        if kernels is None:
            return False
        if not kernels.can_store(key, value, keys, values):
            self.refusals.setdefault(
                "store", "the model's keys and values have shapes, strides or dtypes of another kind"
            )
            return False

        def check() -> bool:
            caches = [torch.zeros_like(keys), torch.zeros_like(values)]
            inputs = [self._random_like(key), self._random_like(value, 1)]
            place = torch.full_like(length, keys.shape[2] - 3)
            kernels.store(*inputs, *caches, place)
            expected = [torch.zeros_like(keys).index_copy_(2, place, states) for states in inputs]
            return all(map(torch.equal, caches, expected))

        if not self._is_right("store", (keys.shape, keys.dtype), check):
            return False
        kernels.store(key, value, keys, values, length)
        return True

    @contextmanager
    def _registered_attention(self, length: Tensor) -> Iterator[None]:
        """Let transformers call `_attend` for models whose attention implementation is "sdpa"."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as registry

        original = registry["sdpa"]
        local = registry._local_mapping.get("sdpa")
        registry["sdpa"] = self._in_this_thread(original, partial(self._attend, original, length))
        try:
            yield
        finally:
            if local is None:
                del registry["sdpa"]
            else:
                registry["sdpa"] = local

    def _attend(
        self, original: Callable, length: Tensor, module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
        attention_mask: Tensor | None, dropout: float = 0.0, scaling: float | None = None, **options: Any,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        """Return the attention [S, 1, H, D] of query [S, H, 1, D] over caches [S, G, T, D], as transformers' "sdpa"."""
        kernels: Any = self._kernels
        extras = ("position_bias", "cache", "softcap", "s_aux")
        has_extras = bool(dropout) or any(options.get(name) is not None for name in extras)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling

        def check() -> bool:
            places = torch.arange(key.shape[2], device=key.device)
            last = torch.full_like(length, key.shape[2] - 5)
            mask = ((places <= last) & (places > 2)).expand(query.shape[0], 1, 1, -1).contiguous()
            states = [self._random_like(tensor, seed) for seed, tensor in enumerate((query, key, value))]
            for _ in range(2):
                truth, _ = original(module, *states, mask, dropout=0.0, scaling=scaling, **options)
                if not _agree(truth, kernels.attend(*states, mask, last, scale)):
                    return False
                _emphasize(states, [2, 3, key.shape[2] - 5, key.shape[2] - 4], scale)
            return True

        shapes = (_formula(module), query.shape, key.shape, query.dtype, scale)
        has_extras = has_extras or key.data_ptr() not in self._caches
        if has_extras or not kernels.can_attend(query, key, value, attention_mask):
            self.refusals.setdefault("attend", "the model's attention has extras, or a mask or shape of another kind")
        elif self._is_right("attend", shapes, check):
            return kernels.attend(query, key, value, attention_mask, length, scale), None
        return original(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options)


def _import_kernels() -> ModuleType | str:
    """Return the module of the kernels, or why it cannot be imported."""
    try:
        from llmquant.kernels import decode
    except ImportError as error:
        return f"{type(error).__name__}: {one_line(error)}"
    return decode


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    is_vector = isinstance(weight, nn.Parameter) and weight.ndim == 1 and getattr(module, "bias", None) is None
    return "RMSNorm" in type(module).__name__ and is_vector and _epsilon(module) is not None and _is_plain(module)


def _epsilon(norm: Any) -> Any:
    """Return the number that a norm adds to the mean square, or None if it is not found."""
    return next((getattr(norm, name) for name in ("variance_epsilon", "eps", "epsilon") if hasattr(norm, name)), None)


def _is_feed_forward(module: nn.Module) -> bool:
    children = dict(module.named_children())
    is_silu = type(children.get("act_fn")).__name__ in SILU_CLASSES
    return is_silu and set(children) == {"gate_proj", "up_proj", "down_proj", "act_fn"} and _is_plain(module)


def _is_block(module: nn.Module) -> bool:
    children = dict(module.named_children())
    names = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
    return set(children) == names and _is_norm(children["post_attention_layernorm"]) and _is_plain(module)


def _is_plain(module: nn.Module) -> bool:
    """Return whether a module's forward is its class's, and no other library has replaced it."""
    return "forward" not in module.__dict__


def _formula(module: nn.Module) -> tuple[Any, ...]:
    """Return the class and the numbers of a module, such as an epsilon, which decide what it computes."""
    values = sorted((name, value) for name, value in vars(module).items() if isinstance(value, bool | int | float))
    return type(module), *((name, value) for name, value in values if name not in POSITION_NAMES)


def _emphasize(states: list[Tensor], places: list[int], scale: float) -> None:
    """Give the keys of some places such large scores that the attention to all others is small.

    states: query [S, H, 1, D], keys and values [S, G, T, D], which change. The values of the places become large. In
    bfloat16, one of thousands of places with random keys has no visible effect on the result.
    """
    query, keys, values = states
    num_sequences, num_kv_heads, num_places, head_dim = keys.shape
    # The heads that share keys get similar queries, so one key has a large score with all of them.
    heads = query.reshape(num_sequences, num_kv_heads, -1, head_dim).float()
    base = heads[:, :, :1]
    query.copy_((base + 0.2 * heads).reshape(query.shape))
    score = math.log(num_places) + 3
    decisive = base * score / (scale * 1.2 * base.square().sum(dim=-1, keepdim=True))
    for index, place in enumerate(places):
        keys[:, :, place] = decisive[:, :, 0].to(keys.dtype)
        values[:, :, place] *= 2 + index


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute in an object's own dictionary, and restore the dictionary afterwards."""
    missing = object()
    before = owner.__dict__.get(name, missing)
    owner.__dict__[name] = value
    try:
        yield
    finally:
        if before is missing:
            del owner.__dict__[name]
        else:
            owner.__dict__[name] = before


def _agree(truth: Tensor, result: Tensor, dtype: torch.dtype | None = None, slack: Tensor | float = 0.0) -> bool:
    """Return whether two results agree within a few roundings of their largest value, and `slack`.

    dtype: the dtype to which they were rounded, if it is not their own.
    """
    if truth.shape != result.shape or truth.dtype != result.dtype:
        return False
    tolerance = max(4 * torch.finfo(dtype or truth.dtype).eps, 1e-5) * truth.float().abs().max() + slack
    return bool(((truth.float() - result.float()).abs().max() <= tolerance).item())
