"""Forward hooks on several modules, removed when a `with` block ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Callable[..., Any]]], *, before: bool = False) -> Iterator[None]:
    """Register forward hooks for the duration of a `with` block.

    hooks: (module, hook) pairs. A hook is called as hook(module, args, kwargs, output) after the module has run, or as
    hook(module, args, kwargs) before it runs if `before` is set. PyTorch treats its return value as usual.
    """
    with ExitStack() as stack:
        for module, hook in hooks:
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            stack.callback(register(hook, with_kwargs=True).remove)
        yield
