"""Replace what needs a GPU, so that the sections run on a CPU. The times then mean nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from llmquant.kernels import tune


def use_cpu() -> None:
    """Replace the timing by CUDA graphs and the properties of the GPU."""
    tune.graph_microseconds = wall_microseconds
    properties = SimpleNamespace(L2_cache_size=1 << 12, name="rehearsal", multi_processor_count=1)
    torch.cuda.get_device_properties = lambda device=None: properties  # type: ignore[assignment,return-value]


def capture_on_cpu() -> None:
    """Let decoding with CUDA graphs run on a CPU: a replay calls the step again."""
    from llmquant.runtime.decoding import CAPTURES

    def call_again(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
        step()
        return step

    CAPTURES["cpu"] = call_again


def wall_microseconds(calls: Sequence[Callable[[], Any]], **_: int) -> float:
    """Return the wall microseconds of the first call."""
    start = time.perf_counter()
    calls[0]()
    return 1e6 * (time.perf_counter() - start)
