"""The resident memory of this process, and the return of freed heap memory to the operating system.

The activations of many sequences are allocated and freed interleaved, and the C library keeps the gaps between them in
the heap. `trim_heap` returns these gaps to the operating system. Calling it every few sequences saves 200 to 350 MiB
between blocks on SmolLM2-135M with 64 x 512 tokens.
"""

from __future__ import annotations

import ctypes
import functools
import resource
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """Return glibc's malloc_trim, or None if the C library has no such function."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):
        return None


def trim_heap() -> None:
    """Return freed heap memory to the operating system if the C library supports it."""
    if (trim := _trim()) is not None:
        trim(0)


def resident_bytes() -> int:
    """Return the resident memory of this process in bytes."""
    import psutil

    return psutil.Process().memory_info().rss


def used_bytes(device: torch.device) -> int:
    """Return the memory in bytes that this process uses now: PyTorch's memory on a GPU, else the resident memory."""
    import torch

    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes()


def peak_resident_bytes() -> int:
    """Return the largest resident memory that this process has had so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
