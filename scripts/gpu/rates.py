"""The rates of the GPU that the other numbers are compared with: its copy bandwidth, and products in each dtype."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from llmquant.kernels import tune

if TYPE_CHECKING:
    from gpu.runs import Run


def measured_limits(run: Run) -> tuple[float, float]:
    """Return the copy bandwidth in bytes per second and the bf16 rate in FLOP/s.

    They are those that were measured without background work, of section `machine` if it ran; else they are measured.
    """
    values = {
        key: line[key]
        for line in run.results("rates")
        for key in ("copy_bytes_per_second", "bf16_flops")
        if key in line and not line.get("beside")
    }
    if len(values) < 2:
        values = {"copy_bytes_per_second": copy_bandwidth(run), "bf16_flops": product_rate(run, torch.bfloat16)}
        run.log.write("rates", **values)
    return values["copy_bytes_per_second"], values["bf16_flops"]


def copy_bandwidth(run: Run) -> float:
    """Return the bytes per second that a copy reads and writes, added together."""
    if not run.rehearse:
        return tune.copy_bandwidth(run.device)
    source = torch.zeros(1 << 16, dtype=torch.uint8)
    return 2e6 * source.nbytes / tune.graph_microseconds([partial(torch.empty_like(source).copy_, source)])


def product_rate(run: Run, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a square product of random matrices in this dtype."""
    size = run.sizes.product_size
    factors = [torch.randn(size, size, device=run.device, dtype=dtype) for _ in range(2)]
    calls, replays = (8, 10) if dtype == torch.bfloat16 else (2, 3)
    microseconds = tune.graph_microseconds([partial(torch.mm, *factors)], min_calls=calls, replays=replays)
    return 2e6 * size**3 / microseconds
