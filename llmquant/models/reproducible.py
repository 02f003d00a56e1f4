"""Settings of PyTorch under which a GPU gives the same bits in every run, and float32 products have float32 precision.

cuBLAS and cuDNN may compute float32 products in TF32, which keeps 10 bits of each factor. The Hessian is inverted, and
codes are rounded by its factor, so this would change codes. TF32 is off by default, but containers of NVIDIA turn it
on by an environment variable, and other code of the process may turn it on.

`index_add_` sums by atomic additions, whose order varies from run to run. In PyTorch's deterministic mode, it takes
another kernel; operations without such a kernel run anyway. The backward pass of fused attention also uses atomic
additions, and changes its kernel only in a mode that refuses all other such operations. So gradients are computed with
plain attention, whose products have a fixed order (`reproducible_attention`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""Environment variable that cuBLAS reads when it starts. With it, products have the same bits on every stream."""
DETERMINISM = "deterministic"
"""A word in all of PyTorch's warnings about operations without a deterministic kernel."""
SCORE_BYTES = 8
"""Bytes of plain attention for each pair of tokens and head: the scores and their gradient, and copies in float32."""
MAX_MEMORY_FRACTION = 0.125
"""Largest fraction of a GPU's memory for the scores of plain attention."""


@contextmanager
def reproducible_arithmetic(device: torch.device, on_warning: Callable[[str], None]) -> Iterator[None]:
    """Compute reproducibly and without TF32 on a GPU for the duration of a `with` block; no effect on a CPU.

    PyTorch's settings are those of the whole process. They are restored at the end; the environment variable of cuBLAS
    stays, since cuBLAS has read it. on_warning: called with PyTorch's warning if an operation has no deterministic
    kernel.
    """
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault(CUBLAS_WORKSPACE, ":4096:8")
    precision, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    mode = torch.get_deterministic_debug_mode()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        with _warnings_passed_on(on_warning):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_deterministic_debug_mode(mode)
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]


@contextmanager
def _warnings_passed_on(on_warning: Callable[[str], None]) -> Iterator[None]:
    """Call a function with each of PyTorch's warnings about determinism, instead of showing them."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def pass_on(message: Any, *arguments: Any, **options: Any) -> None:
            if DETERMINISM in str(message):
                on_warning(str(message))
            else:
                show(message, *arguments, **options)

        warnings.filterwarnings("default", message=f".*{DETERMINISM}")
        warnings.showwarning = pass_on
        yield


def has_reproducible_attention(device: torch.device, num_scores: int) -> bool:
    """Whether gradients of attention have the same bits in every run: on a CPU, or if the scores fit in a GPU's memory.

    num_scores: query tokens times key tokens times heads that run at one time.
    """
    if device.type != "cuda":
        return True
    total_bytes = torch.cuda.get_device_properties(device).total_memory
    return SCORE_BYTES * num_scores <= MAX_MEMORY_FRACTION * total_bytes


@contextmanager
def reproducible_attention(device: torch.device, num_scores: int) -> Iterator[None]:
    """Use plain attention on a GPU for the duration of a `with` block, if its scores fit in the GPU's memory."""
    if device.type == "cuda" and has_reproducible_attention(device, num_scores):
        with sdpa_kernel(SDPBackend.MATH):
            yield
    else:
        yield
