"""Settings of PyTorch under which a GPU gives the same bits in every run, and float32 products have float32 precision.

cuBLAS and cuDNN may compute float32 products in TF32, which keeps 10 bits of each factor. The Hessian is inverted, and
codes are rounded by its factor, so this would change codes. TF32 is off by default, but containers of NVIDIA turn it
on by an environment variable, and other code of the process may turn it on.

The backward pass of attention and `index_add_` sum by atomic additions, whose order varies from run to run. In its
deterministic mode, PyTorch takes other kernels for both. A function without such a kernel runs anyway.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""Environment variable that cuBLAS reads when it starts. With it, products have the same bits on every stream."""


@contextmanager
def reproducible_arithmetic(device: torch.device) -> Iterator[None]:
    """Compute reproducibly and without TF32 on a GPU for the duration of a `with` block; no effect on a CPU.

    PyTorch's settings are those of the whole process. They are restored at the end.
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
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_deterministic_debug_mode(mode)
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]
