"""Measure the speed and memory of a model with one or more kernel backends, and of its original.

All models are loaded together and run in turns, so that their ratios stay meaningful on a busy machine. In each run,
transformers greedily continues prompts of random tokens. An end token does not stop a run. The first run of a model is
a warm-up and is not counted. The reported rates come from the medians of the other runs.

Letters: S sequences, L tokens of a prompt.
"""

from __future__ import annotations

import gc
import os
import platform
from collections.abc import Sequence
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
from llmquant.humanize import dtype_name
from llmquant.kernels.dispatch import BACKENDS
from llmquant.memory import peak_resident_bytes, resident_bytes, trim_heap
from llmquant.models.blocks import parse_device
from llmquant.models.skeleton import build_empty, read_config
from llmquant.progress import OnProgress, Phase, Progress, ignore_progress
from llmquant.runtime.decoding import NOT_ON_GPU
from llmquant.runtime.explain import explain_backends
from llmquant.runtime.generate import (
    SWITCHED_OFF,
    SamplingParams,
    TimedRun,
    check_length,
    run_timed,
    settings_of,
    vocabulary_size_of,
)
from llmquant.runtime.linear import QuantizedLinear
from llmquant.runtime.load import load

EAGER = "eager: "
"""Start of `BenchmarkRun.decoding` without a CUDA graph."""
DENSE = "dense"
"""Kernel name of a model without quantized linears."""

PEAK_MEMORY_RESET = Path("/proc/self/clear_refs")
"""On Linux, writing 5 to this file resets the recorded peak memory of the process."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The work of one run, which is the same for every model."""

    prompt_tokens: int = 128
    """Number of tokens of each prompt."""
    new_tokens: int = 64
    """Number of tokens generated after each prompt."""
    batch_size: int = 1
    """Number of prompts that run together."""
    repeats: int = 3
    """Number of counted runs of each model."""

    def __post_init__(self) -> None:
        for name, minimum in (("prompt_tokens", 1), ("new_tokens", 2), ("batch_size", 1), ("repeats", 1)):
            if (value := getattr(self, name)) < minimum:
                raise UserError(f"{name} {value}: must be at least {minimum}; use --{name.replace('_', '-')} {minimum}")


@dataclass(frozen=True, kw_only=True)
class BenchmarkRun:
    """The speed and memory of one model with one kernel backend."""

    model: str
    """Folder or hub id of the model."""
    kernel: str
    """Backends of the model's quantized linears; `dense` if it has none."""
    load_seconds: float
    """Time to load the model."""
    weight_bytes: int
    """Memory of the model's parameters and buffers."""
    peak_bytes: int | None
    """Peak memory of loading and one run, minus the memory that was in use before. It is GPU memory for a model on a
    GPU, and memory of the process for a model on a CPU under Linux. It is None on other systems."""
    prefill_tokens_per_second: float
    """Prompt tokens of the whole batch per second of prefill, which ends with the first new token."""
    decode_tokens_per_second: float
    """New tokens of the whole batch per second of decoding, without the first new token of each prompt."""
    decoding: str = "eager"
    """How the tokens after the first were computed: `cuda graph`, or `eager: ` and the reason."""
    fused: tuple[str, ...] = ()
    """The kernels of `kernels.decode` in the graph, and "-name: reason" for those that are not."""

    @property
    def why_eager(self) -> str | None:
        """Why a model on a GPU was decoded without a CUDA graph; None with one, if that was requested, and on a CPU."""
        reason = self.decoding.removeprefix(EAGER)
        expected = reason == SWITCHED_OFF or reason.startswith(NOT_ON_GPU)
        return None if reason == self.decoding or expected else reason


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult:
    """The speed and memory of several models on one machine."""

    runs: tuple[BenchmarkRun, ...]
    """One entry per model and backend; the original comes last if there is one."""
    against: str | None
    """Folder or hub id of the original; None if the benchmark ran without one."""
    workload: Workload
    """The work of each run."""
    device: str
    """Name of the GPU, or the kind of processor and the number of threads."""
    dtype: str
    """dtype of the activations."""
    torch: str
    """Version of PyTorch."""

    @property
    def original(self) -> BenchmarkRun | None:
        """The entry of the original, with which the others are compared; None if there is none."""
        return self.runs[-1] if self.against is not None else None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict for JSON, with the speedup of every run over the original if there is one."""
        values = asdict(self)
        if (original := self.original) is not None:
            for name in ("prefill", "decode"):
                rate = f"{name}_tokens_per_second"
                for run in values["runs"]:
                    run[f"{name}_speedup"] = run[rate] / getattr(original, rate)
        return values


def bench(
    model: str,
    against: str | None = None,
    *,
    backends: Sequence[str] = ("auto",),
    workload: Workload | None = None,
    device: str = "auto",
    dtype: str = "auto",
    cuda_graph: bool = True,
    trust_remote_code: bool = False,
    on_progress: OnProgress = ignore_progress,
) -> BenchmarkResult:
    """Measure a checkpoint with each of the backends, and then the checkpoint `against`.

    backends: keys of `BACKENDS` or auto; "all" stands for every backend that can run all quantized linears.
    cuda_graph: on a GPU, decode every model with a CUDA graph if it supports that.
    All models are in memory at once. Raises UserError for the same reasons as `load`.
    """
    workload = workload or Workload()
    for name in (model, against):
        if name is not None:
            parsed_quantization(CheckpointReader(resolve_model(name, trust_remote_code)))
    candidates = [(model, name) for name in _backend_names(model, backends, device, dtype, trust_remote_code)]
    candidates += [(against, "auto")] if against is not None else []
    loaded: list[_LoadedModel] = []
    num_runs = len(candidates) * (1 + workload.repeats)
    _import_model_code(model, trust_remote_code)
    for name, backend in candidates:
        on_progress(Progress(Phase.RUNNING, len(loaded), num_runs))
        options = {"device": device, "dtype": dtype, "backend": backend, "trust_remote_code": trust_remote_code}
        loaded.append(_load_and_warm_up(name, workload, options, cuda_graph))
    for repeat in range(workload.repeats):
        for index, each in enumerate(loaded):
            on_progress(Progress(Phase.RUNNING, len(loaded) * (1 + repeat) + index, num_runs))
            each.runs.append(_time_run(each.model, workload, cuda_graph))
    on_progress(Progress(Phase.RUNNING, num_runs, num_runs))
    return BenchmarkResult(
        runs=tuple(each.to_run(workload) for each in loaded),
        against=against,
        workload=workload,
        device=_describe_device(loaded[0].model.device),
        dtype=dtype_name(loaded[0].model.dtype),
        torch=torch.__version__,
    )


@dataclass
class _LoadedModel:
    """A model in memory, and its measurements so far."""

    name: str
    model: Any
    load_seconds: float
    peak_bytes: int | None
    runs: list[TimedRun]
    """The counted runs."""

    def to_run(self, workload: Workload) -> BenchmarkRun:
        return BenchmarkRun(
            model=self.name,
            kernel=kernel_names(self.model),
            load_seconds=self.load_seconds,
            weight_bytes=memory_footprint_bytes(self.model),
            peak_bytes=self.peak_bytes,
            **_rates([(run.prefill_seconds, run.decode_seconds) for run in self.runs], workload),
            decoding=self.runs[-1].decoding,
            fused=self.runs[-1].fused,
        )


def _load_and_warm_up(name: str, workload: Workload, load_options: dict[str, Any], cuda_graph: bool) -> _LoadedModel:
    """Load a model, run it once, and measure the peak memory of both steps."""
    meter = _PeakMemory(parse_device(load_options["device"]))
    start = perf_counter()
    model = load(name, **load_options)
    load_seconds = perf_counter() - start
    check_length(model, workload.prompt_tokens, workload.new_tokens)
    _time_run(model, workload, cuda_graph)
    return _LoadedModel(name, model, load_seconds, meter.peak_bytes(), [])


def kernel_names(model: nn.Module) -> str:
    """Return the names of the backends of a model's quantized linears, or `dense` if there are none."""
    names = {module.backend_name for module in model.modules() if isinstance(module, QuantizedLinear)}
    return ", ".join(name for name in BACKENDS if name in names) or DENSE


def memory_footprint_bytes(model: nn.Module) -> int:
    """Return the memory of a model's parameters and buffers. Tied tensors count once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


def _import_model_code(model: str, trust_remote_code: bool) -> None:
    """Make transformers import a model's code now, so that the import does not count as memory of the first run."""
    config = read_config(resolve_model(model, trust_remote_code), trust_remote_code)
    build_empty(config, torch.float32, trust_remote_code)


def _backend_names(model: str, backends: Sequence[str], device: str, dtype: str, trust_remote_code: bool) -> list[str]:
    """Return the requested backends without duplicates, with "all" expanded."""
    if "all" not in backends:
        return list(dict.fromkeys(backends))
    choices = explain_backends(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code).values()
    return [name for name in BACKENDS if not any(name in choice.refusals for choice in choices)]


def _time_run(model: Any, workload: Workload, cuda_graph: bool) -> TimedRun:
    """Run a workload, and return its times."""
    settings = settings_of(model, SamplingParams(max_new_tokens=workload.new_tokens, greedy=True))
    settings.min_new_tokens, settings.pad_token_id = workload.new_tokens, 0
    settings.max_time = settings.stop_strings = None
    generator = torch.Generator().manual_seed(0)
    size = (workload.batch_size, workload.prompt_tokens)
    tokens_SL = torch.randint(0, vocabulary_size_of(model), size, generator=generator).to(model.device)
    return run_timed(model, tokens_SL, torch.ones_like(tokens_SL), settings, cuda_graph=cuda_graph)


def _rates(seconds: Sequence[tuple[float, float]], workload: Workload) -> dict[str, Any]:
    """Return tokens per second from the median times. The first new token belongs to the prefill."""
    prefill, decode = (median(column) for column in zip(*seconds, strict=True))
    return {
        "prefill_tokens_per_second": workload.prompt_tokens * workload.batch_size / prefill,
        "decode_tokens_per_second": (workload.new_tokens - 1) * workload.batch_size / decode,
    }


def _describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}"


class _PeakMemory:
    """Measures how far the memory in use rises after the construction of this object."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start: int | None = None
        gc.collect()
        trim_heap()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._start = torch.cuda.memory_allocated(device)
        elif os.access(PEAK_MEMORY_RESET, os.W_OK):
            PEAK_MEMORY_RESET.write_text("5")
            self._start = resident_bytes()

    def peak_bytes(self) -> int | None:
        """Return the rise in bytes, or None if the system does not report it."""
        if self._start is None:
            return None
        on_gpu = self._device.type == "cuda"
        return (torch.cuda.max_memory_allocated(self._device) if on_gpu else peak_resident_bytes()) - self._start
