"""Profile the quantization of one block: kernels and launches, Python functions, and operators on the CPU.

The three profiles are three runs, because each of them slows a run down. If the time is short, they are made of the
attention linears only. torch's own tables take minutes for a million events, so the raw events are summed up here.
"""

from __future__ import annotations

import cProfile
import hashlib
import io
import pstats
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from gpu.checkpoints import wait_for_checkpoints
from gpu.runs import Run, seconds_of

TOP = 25
"""Number of entries of each table."""

PARSE_SECONDS = 12.0
"""Limit of the time to sum up the events of a profile."""

ATTENTION_ONLY = ("*.gate_proj", "*.up_proj", "*.down_proj")
"""Linears that are left out if the time is short."""


def section_profile(run: Run) -> None:
    """Log the three profiles, the most useful first, each if there is time for it."""
    _, small = wait_for_checkpoints(run)
    expected = expected_seconds(run)
    skip = ATTENTION_ONLY if expected * 4 > run.seconds_left else ()
    run.log.write("profiled", skip=skip, expected_seconds=expected)

    def quantize(name: str) -> float:
        """Quantize the small checkpoint, and return the wall seconds."""
        from llmquant import Options, QuantSpec, Recipe
        from llmquant import quantize as quantize_model

        out = run.scratch / f"profile-{name}"
        shutil.rmtree(out, ignore_errors=True)  # of an earlier run
        recipe = Recipe(spec=QuantSpec(group_size=run.sizes.group_size), skip=skip)
        options = Options(
            calibration="python-docs",
            num_samples=run.sizes.num_few_samples,
            seq_len=run.sizes.seq_len,
            device=run.device.type,
            verify=False,
        )
        return seconds_of(run, lambda: quantize_model(str(small), str(out), recipe, options))

    run.attempt("profile kernels", lambda: profile_kernels(run, lambda: quantize("kernels")))
    began = time.monotonic()
    if run.seconds_left > 3:
        run.attempt("profile functions", lambda: profile_functions(lambda: quantize("functions")))
        compare_outputs(run, "kernels", "functions")
    if run.seconds_left > 2 * (time.monotonic() - began):
        run.attempt("profile operators", lambda: profile_operators(lambda: quantize("operators")))


def expected_seconds(run: Run) -> float:
    """Return the seconds of one block with the default recipe, from section `quantize`; a guess if it has not run."""
    for line in run.results("quantize"):
        if line["name"] == "default" and (blocks := line.get("block_seconds")):
            return float(blocks[0] if len(blocks) < 2 else (blocks[-1] - blocks[0]) / (len(blocks) - 1))
    return 1.0 if run.rehearse else 12.0


def compare_outputs(run: Run, *names: str) -> None:
    """Log whether two runs wrote the same bytes; a difference is a finding."""
    hashes = [
        [hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in sorted(folder.glob("*.safetensors"))]
        for folder in (run.scratch / f"profile-{name}" for name in names)
    ]
    if all(hashes):
        run.log.write("two runs", same_bytes=hashes[0] == hashes[1], hashes=hashes)
        if hashes[0] != hashes[1]:
            run.log.finding("quantize: two runs with the same seed wrote different bytes")


def profile_kernels(run: Run, work: Callable[[], float]) -> dict[str, Any]:
    """Return the kernels with the most time, the number of launches, and the calls of the CUDA runtime."""
    activities = [ProfilerActivity.CPU if run.rehearse else ProfilerActivity.CUDA]
    with profile(activities=activities) as profiler:
        wall = work()
    return {"wall_seconds": round(wall, 2)} | kernel_table(events_of(profiler))


def events_of(profiler: Any) -> Iterable[Any]:
    """Return the raw events of a finished profile."""
    return profiler.profiler.kineto_results.events()


def kernel_table(events: Iterable[Any], top: int = TOP) -> dict[str, Any]:
    """Return the sums of a profile: per kernel and copy (name, calls, ms), and per call of the runtime."""
    device_ns: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    host_ns: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    until, complete = time.monotonic() + PARSE_SECONDS, True
    for number, event in enumerate(events):
        on_device = event.device_type() == torch.autograd.DeviceType.CUDA
        entry = (device_ns if on_device else host_ns)[event.name()]
        entry[0] += 1
        entry[1] += event.duration_ns()
        if number % 10_000 == 0 and time.monotonic() > until:
            complete = False
            break
    return {
        "complete": complete,
        "launches": sum(calls for name, (calls, _) in host_ns.items() if "LaunchKernel" in name),
        "device_ms": round(sum(ns for _, ns in device_ns.values()) / 1e6, 1),
        "device_calls": sum(calls for calls, _ in device_ns.values()),
        "kernels": _largest(device_ns, top),
        "host_calls": _largest(host_ns, 12),
    }


def _largest(sums: dict[str, list[int]], top: int) -> list[list[Any]]:
    """Return (shortened name, calls, ms) of the entries with the most time."""
    ordered = sorted(sums.items(), key=lambda pair: -pair[1][1])[:top]
    return [[name[:90], calls, round(ns / 1e6, 2)] for name, (calls, ns) in ordered]


def profile_operators(work: Callable[[], float]) -> dict[str, Any]:
    """Return the operators with the most time on the CPU, without that of the operators that they call."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        wall = work()
    self_ns, calls, complete = self_times(events_of(profiler))
    top = [[name[:80], calls[name], round(ns / 1e6, 1)] for name, ns in self_ns.most_common(TOP)]
    return {
        "wall_seconds": round(wall, 2),
        "complete": complete,
        "operator_calls": sum(calls.values()),
        "operators": top,
    }


def self_times(events: Iterable[Any]) -> tuple[Counter[str], Counter[str], bool]:
    """Return the own time in ns and the calls of each operator, and whether all events were counted."""
    by_thread: dict[int, list[tuple[int, int, str]]] = defaultdict(list)
    until, complete = time.monotonic() + PARSE_SECONDS, True
    for number, event in enumerate(events):
        if event.device_type() == torch.autograd.DeviceType.CPU:
            start = event.start_ns()
            by_thread[event.start_thread_id()].append((start, start + event.duration_ns(), event.name()))
        if number % 10_000 == 0 and time.monotonic() > until:
            complete = False
            break
    self_ns: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for spans in by_thread.values():
        spans.sort(key=lambda span: (span[0], -span[1]))
        open_spans: list[tuple[int, str]] = []
        for start, end, name in spans:
            while open_spans and open_spans[-1][0] <= start:
                open_spans.pop()
            if open_spans:
                self_ns[open_spans[-1][1]] -= end - start
            self_ns[name] += end - start
            calls[name] += 1
            open_spans.append((end, name))
    return self_ns, calls, complete


def profile_functions(work: Callable[[], float]) -> dict[str, Any]:
    """Return the Python functions with the most time of their own, and with the most time in all."""
    profiler = cProfile.Profile()
    wall = profiler.runcall(work)
    tables = {}
    for key, order in (("own", "tottime"), ("total", "cumulative")):
        stats = pstats.Stats(profiler, stream=io.StringIO()).sort_stats(order)
        tables[key] = [_describe(stats, function) for function in stats.fcn_list[:TOP]]  # type: ignore[attr-defined]
    return {"wall_seconds": round(wall, 2)} | tables


def _describe(stats: pstats.Stats, function: tuple[str, int, str]) -> list[Any]:
    """Return (file:line function, calls, own seconds, seconds in all) of a function."""
    _, calls, own, total, _ = stats.stats[function]  # type: ignore[attr-defined]
    file, line, name = function
    place = name if file == "~" else f"{'/'.join(file.split('/')[-2:])}:{line} {name}"
    return [place[-80:], calls, round(own, 3), round(total, 3)]
