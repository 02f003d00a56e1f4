"""Launch a compiled Triton kernel again at a fraction of the CPU time of its first launch.

`kernel[grid](...)` of a `triton.jit` function examines every argument at every call, which takes about as long as a
small matmul runs. It returns the compiled kernel, whose `run` launches at once. That is correct as long as everything
that Triton compiled in is the same: the constants, the types, and that addresses are multiples of 16. `run` has the
same arguments in Triton 3.4 to 3.9. With a version where it has others, the caller launches as before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

POINTER_ALIGNMENT = 16
"""Triton compiles in that an address is a multiple of this number of bytes."""


class Relaunch:
    """A compiled kernel with its grid and all arguments but the addresses, for one GPU."""

    __slots__ = ("_device_index", "_function", "_grid", "_knobs", "_metadata", "_run", "_scalars", "_stream_of")

    def __init__(self, compiled: Any, grid: tuple[int, int, int], scalars: tuple[Any, ...], device_index: int) -> None:
        """compiled: what the first launch returned. scalars: all arguments after the addresses, also constants, in the
        order of the kernel's signature. device_index: the current GPU.

        Raises AttributeError or ImportError if this version of Triton has another interface.
        """
        from triton import knobs
        from triton.runtime import driver

        self._run: Callable[..., None] = compiled.run
        self._function, self._metadata = compiled.function, compiled.packed_metadata
        self._grid, self._scalars, self._device_index = grid, scalars, device_index
        self._stream_of: Callable[[int], int] = driver.active.get_current_stream
        self._knobs = knobs.runtime
        self._has_hooks()

    @staticmethod
    def of(compiled: Any, grid: tuple[int, int, int], scalars: tuple[Any, ...], device_index: int) -> Relaunch | None:
        """Return a relaunch, or None if this version of Triton has another interface."""
        try:
            return Relaunch(compiled, grid, scalars, device_index)
        except (AttributeError, ImportError):
            return None

    def __call__(self, *addresses: int) -> bool:
        """Launch the kernel with these addresses on the current stream. Return whether it was launched.

        It is not launched if an address is not a multiple of 16, if another GPU is the current one, if a profiler
        hooks launches, or if Triton does not accept the arguments.
        """
        bits = 0
        for address in addresses:
            bits |= address
        index = self._device_index
        if bits % POINTER_ALIGNMENT or torch.cuda.current_device() != index or self._has_hooks():
            return False
        try:
            self._run(
                *self._grid,
                self._stream_of(index),
                self._function,
                self._metadata,
                None,  # no launch metadata and no hooks
                None,
                None,
                *addresses,
                *self._scalars,
            )
        except TypeError:
            return False
        return True

    def _has_hooks(self) -> bool:
        """Whether a profiler asked Triton to call it at launches. A hook is None in Triton 3.4, later a chain."""
        enter, leave = self._knobs.launch_enter_hook, self._knobs.launch_exit_hook
        return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
