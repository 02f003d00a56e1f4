"""How fast a model runs and what memory it takes, by kernel, beside the model it was made from.

All contenders run in turns: on a machine that does other things too, each sees the same of them, and the ratios hold.
A turn is what a user waits for: transformers generates, greedily and to the last token, from prompts of random tokens.
The first turn warms up and does not count; of the others the medians do.

Letters: S sequences, L tokens of a prompt.
"""

from __future__ import annotations

import gc
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import nn

from llmquant.checkpoints.quantized import parsed_quantization
from llmquant.checkpoints.reader import CheckpointReader
from llmquant.errors import UserError
from llmquant.hub import resolve_model
from llmquant.kernels.dispatch import BACKENDS
from llmquant.memory import give_back, peak_resident_bytes, resident_bytes
from llmquant.models.blocks import device_of
from llmquant.models.skeleton import build_empty, read_config
from llmquant.runtime.explain import explain_backends
from llmquant.runtime.generate import Sampling, check_length, run_timed, settings_of, vocabulary_of
from llmquant.runtime.linear import QuantizedLinear
from llmquant.runtime.load import load

DENSE = "dense"
"""The kernel of linears that are torch's own."""

HIGH_WATER_RESET = Path("/proc/self/clear_refs")
"""Linux: writing 5 resets the high-water mark of the process's memory."""

OnStep = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all)."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What every contender does in a turn."""

    prompt_tokens: int = 128
    """Of each prompt."""
    new_tokens: int = 64
    """Of each text."""
    batch_size: int = 1
    """Prompts that run together."""
    repeats: int = 3
    """Turns that count."""

    def __post_init__(self) -> None:
        for name, least in (("prompt_tokens", 1), ("new_tokens", 2), ("batch_size", 1), ("repeats", 1)):
            if (value := getattr(self, name)) < least:
                raise UserError(f"{name} {value}: must be at least {least}; use --{name.replace('_', '-')} {least}")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One contender's figures."""

    model: str
    kernel: str
    """Of its quantized linears; `dense` where there are none."""
    load_seconds: float
    weight_bytes: int
    """What its parameters and buffers take in memory."""
    peak_bytes: int | None
    """Most that loading and one turn took beyond what was there before: of the GPU, or of the process where the system
    tells (Linux)."""
    prefill_tokens_per_second: float
    """Of all prompts together, until the first new token is there."""
    decode_tokens_per_second: float
    """Of all texts together, from then on."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Who ran what where, and how fast."""

    runs: tuple[Run, ...]
    """The original last, where there is one."""
    against: str | None
    workload: Workload
    device: str
    """Name of the GPU, or the processor's kind and the number of threads."""
    dtype: str
    torch: str
    """Its version."""

    @property
    def original(self) -> Run | None:
        """The run that the others are compared with."""
        return self.runs[-1] if self.against is not None else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; with an original, how many times as fast as that each run is."""
        told = asdict(self)
        if (base := self.original) is not None:
            for name in ("prefill", "decode"):
                rate = f"{name}_tokens_per_second"
                for run in told["runs"]:
                    run[f"{name}_speedup"] = run[rate] / getattr(base, rate)
        return told


def bench(
    model: str,
    against: str | None = None,
    *,
    backends: Sequence[str] = ("auto",),
    workload: Workload | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    on_step: OnStep = lambda what, done, total: None,
) -> Bench:
    """Time a checkpoint by each of these backends (`all`: each that takes all its linears), and then `against`.

    All of them are in memory together.
    Raises UserError for whatever the user can mend, as `load` does.
    """
    workload = workload or Workload()
    for name in (model, against):
        if name is not None:
            parsed_quantization(CheckpointReader(resolve_model(name, trust_remote_code)))
    contenders = [(model, name) for name in _expand(model, backends, device, dtype, trust_remote_code)]
    contenders += [(against, "auto")] if against is not None else []
    loaded: list[Any] = []
    facts: list[dict[str, Any]] = []
    seconds: list[list[tuple[float, float]]] = [[] for _ in contenders]
    total = len(contenders) * (1 + workload.repeats)
    _import_code(model, trust_remote_code)
    for name, backend in contenders:
        on_step("running", len(loaded), total)
        meter = _PeakMeter(device_of(device))
        start = perf_counter()
        contender = load(name, device=device, dtype=dtype, backend=backend, trust_remote_code=trust_remote_code)
        load_seconds = perf_counter() - start
        check_length(contender, workload.prompt_tokens, workload.new_tokens)
        _turn(contender, workload)
        loaded.append(contender)
        facts.append({"model": name, "load_seconds": load_seconds, "peak_bytes": meter.peak()})
    for turn in range(workload.repeats):
        for index, contender in enumerate(loaded):
            on_step("running", len(loaded) * (1 + turn) + index, total)
            seconds[index].append(_turn(contender, workload))
    on_step("running", total, total)
    return Bench(
        runs=tuple(
            Run(**known, kernel=kernel_of(contender), weight_bytes=held_bytes(contender), **_rates(times, workload))
            for contender, known, times in zip(loaded, facts, seconds, strict=True)
        ),
        against=against,
        workload=workload,
        device=_describe(loaded[0].device),
        dtype=str(loaded[0].dtype).removeprefix("torch."),
        torch=torch.__version__,
    )


def kernel_of(model: nn.Module) -> str:
    """The backends of its quantized linears."""
    names = {module.backend_name for module in model.modules() if isinstance(module, QuantizedLinear)}
    return ", ".join(name for name in BACKENDS if name in names) or DENSE


def held_bytes(model: nn.Module) -> int:
    """Memory of its parameters and buffers; what is tied counts once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


def _import_code(model: str, trust_remote_code: bool) -> None:
    """Have transformers import what it needs for a model, so that it is not counted as memory of the first one."""
    config = read_config(resolve_model(model, trust_remote_code), trust_remote_code)
    build_empty(config, torch.float32, trust_remote_code)


def _expand(model: str, backends: Sequence[str], device: str, dtype: str, trust_remote_code: bool) -> list[str]:
    if "all" not in backends:
        return list(dict.fromkeys(backends))
    choices = explain_backends(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code).values()
    return [name for name in BACKENDS if not any(name in choice.refusals for choice in choices)]


def _turn(model: Any, workload: Workload) -> tuple[float, float]:
    """Seconds of prefill and of decoding."""
    settings = settings_of(model, Sampling(max_new_tokens=workload.new_tokens, greedy=True))
    settings.min_new_tokens, settings.pad_token_id = workload.new_tokens, 0
    settings.max_time = settings.stop_strings = None
    generator = torch.Generator().manual_seed(0)
    size = (workload.batch_size, workload.prompt_tokens)
    tokens_SL = torch.randint(0, vocabulary_of(model), size, generator=generator).to(model.device)
    _, prefill, decode = run_timed(model, tokens_SL, torch.ones_like(tokens_SL), settings)
    return prefill, decode


def _rates(seconds: Sequence[tuple[float, float]], workload: Workload) -> dict[str, Any]:
    """Tokens per second of prefill and of decoding, from the medians; the first new token belongs to the prefill."""
    prefill, decode = (median(column) for column in zip(*seconds, strict=True))
    return {
        "prefill_tokens_per_second": workload.prompt_tokens * workload.batch_size / prefill,
        "decode_tokens_per_second": (workload.new_tokens - 1) * workload.batch_size / decode,
    }


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}"


class _PeakMeter:
    """How far memory rises from where it is when the meter is made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start: int | None = None
        gc.collect()
        give_back()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._start = torch.cuda.memory_allocated(device)
        elif os.access(HIGH_WATER_RESET, os.W_OK):
            HIGH_WATER_RESET.write_text("5")
            self._start = resident_bytes()

    def peak(self) -> int | None:
        if self._start is None:
            return None
        on_gpu = self._device.type == "cuda"
        return (torch.cuda.max_memory_allocated(self._device) if on_gpu else peak_resident_bytes()) - self._start
