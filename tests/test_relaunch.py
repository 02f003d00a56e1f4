"""Later launches of a compiled Triton kernel, on a driver that records launches instead of running them."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_cases import random_weight
from quantized_linears import quantized

from llmquant.kernels import gpu
from llmquant.kernels.layout import LinearShape
from llmquant.kernels.relaunch import Relaunch
from llmquant.runtime.shared_launch import SharedLaunch

pytest.importorskip("triton")

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

POINTERS = 7
"""Pointers at the start of the fused kernel's arguments."""


class RecordingDriver:
    """Stands for the driver of an H100: kernels are compiled for it, and a launch only records its arguments."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.utils = SimpleNamespace(
            load_binary=lambda *arguments: (1, 2, 80, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 227 << 10},
        )
        self.launcher_cls = lambda source, metadata: self.record

    def record(self, *arguments: Any) -> None:
        grid, stream, function, rest = arguments[:3], arguments[3], arguments[4], arguments[9:]
        addresses = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in rest]
        self.launches.append((grid, stream, function, arguments[5], *addresses))

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 77

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def recorder(tmp_path, monkeypatch) -> Iterator[RecordingDriver]:
    """A recording driver instead of Triton's. The tensors are on the CPU, whose index is -1."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    recording = RecordingDriver()
    monkeypatch.setattr(driver, "_active", recording)
    kernel = gpu._kernels().w4a16_kernel
    monkeypatch.setattr(kernel, "pre_run_hooks", [])
    for forget in (gpu.forget_plans, kernel.device_caches.clear):
        forget()
    yield recording
    for forget in (gpu.forget_plans, kernel.device_caches.clear):
        forget()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "out_features", "in_features", "group_size", "bias"),
    [
        pytest.param(1, 64, 2048, 128, True, id="split-K and a bias"),
        pytest.param(3, 192, 256, 64, False, id="one split"),
        pytest.param(2, 100, 200, 64, True, id="ragged"),
    ],
)
def test_a_second_call_launches_what_the_first_launched(recorder, rows, out_features, in_features, group_size, bias):
    weight = random_weight(out_features, in_features, group_size=group_size, symmetric=False)
    shape = LinearShape.of(weight)
    prepared = gpu.prepare(weight, torch.bfloat16, torch.device("cpu"))
    bias_N = torch.zeros(out_features, dtype=torch.bfloat16) if bias else None
    x = torch.randn(1, rows, in_features).bfloat16()
    jit_calls = count_calls(gpu._kernels().w4a16_kernel)
    results = [gpu.matmul(x, prepared, bias_N, shape) for _ in range(3)]  # keeps the results, so that addresses differ
    first, *later = recorder.launches
    assert len(later) == 2 and jit_calls() == 1
    x_address, words, meta = first[4:7]
    y_position = 4 + 4
    for launch, y in zip(recorder.launches, results, strict=True):
        assert launch[:4] == first[:4] and launch[4 + POINTERS :] == first[4 + POINTERS :]
        assert launch[5:7] == (words, meta) and launch[4 + 6] == prepared[2].data_ptr()
        assert in_features % 16 or launch[4] == x_address == x.data_ptr()
        assert launch[y_position] == y.data_ptr() and y.shape == (1, rows, out_features)
        assert launch[4 + 3] == (y if bias_N is None else bias_N).data_ptr()


def count_calls(kernel: Any) -> Any:
    """Return a function that gives the number of launches of a `triton.jit` function since now, by a hook of Triton."""
    calls: list[None] = []
    kernel.pre_run_hooks.append(lambda *arguments, **options: calls.append(None))
    return lambda: len(calls)


@pytest.mark.slow
def test_unaligned_tensors_are_launched_by_triton_itself(recorder):
    """Triton compiles another program for addresses that are not multiples of 16."""
    weight = random_weight(64, 256, group_size=128, symmetric=False)
    shape, prepared = LinearShape.of(weight), gpu.prepare(weight, torch.bfloat16, torch.device("cpu"))
    aligned, unaligned = torch.zeros(2, 256).bfloat16(), torch.zeros(513).bfloat16()[1:].view(2, 256)
    gpu.matmul(aligned, prepared, None, shape)
    jit_calls = count_calls(gpu._kernels().w4a16_kernel)
    gpu.matmul(unaligned, prepared, None, shape)
    assert jit_calls() == 1
    gpu.matmul(aligned, prepared, None, shape)
    assert jit_calls() == 1


@pytest.mark.slow
def test_weights_in_a_shared_tensor_have_launches_of_their_own(recorder):
    """The distance between two rows of meta tiles depends on the tensor in which the weight lies."""
    weight = random_weight(64, 256, group_size=128, symmetric=False)
    shape, x = LinearShape.of(weight), torch.zeros(1, 256).bfloat16()
    alone, one, other = (gpu.prepare(weight, torch.bfloat16, torch.device("cpu")) for _ in range(3))
    joined, views = gpu.join_weights([one, other])
    both = LinearShape.of(random_weight(128, 256, group_size=128, symmetric=False))
    calls = [(alone, shape, 64), (views[0], shape, 128), (views[1], shape, 128), (joined, both, 128)]
    for _ in range(2):
        recorder.launches.clear()
        for prepared, its_shape, _ in calls:
            gpu.matmul(x, prepared, None, its_shape)
        for launch, (prepared, its_shape, meta_rows) in zip(recorder.launches, calls, strict=True):
            assert launch[4 + 1] == prepared[0].data_ptr() and launch[4 + 2] == prepared[1].data_ptr()
            assert launch[4 + POINTERS : 4 + POINTERS + 3] == (1, its_shape.out_features, meta_rows)


@pytest.mark.slow
def test_linears_that_share_launches_are_launched_again_together(recorder, monkeypatch):
    gpu._kernels()
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # lets the backend accept the CPU; the kernel is compiled nevertheless
    linears = [quantized(64, 256, group_size=128) for _ in range(3)]
    SharedLaunch(linears)
    jit_calls = count_calls(gpu._kernels().w4a16_kernel)
    for _ in range(4):
        x = torch.zeros(1, 1, 256).bfloat16()
        outputs = [linear(x) for linear in linears]
        assert all(y.shape == (1, 1, 64) for y in outputs)
    assert len(recorder.launches) == 4 and jit_calls() == 1


def relaunch_of(run: Any) -> Relaunch:
    """Return a relaunch of a compiled kernel whose `run` is the given function."""
    compiled = SimpleNamespace(run=run, function=5, packed_metadata=(4, 1, 0))
    relaunch = Relaunch.of(compiled, (3, 2, 1), (10, 11), -1)
    assert relaunch is not None
    return relaunch


def test_a_relaunch_passes_grid_stream_and_arguments(recorder):
    calls: list[tuple[Any, ...]] = []
    assert relaunch_of(lambda *arguments: calls.append(arguments))(32, 48)
    assert calls == [(3, 2, 1, 77, 5, (4, 1, 0), None, None, None, 32, 48, 10, 11)]


def test_a_relaunch_declines_what_it_cannot_launch(recorder, monkeypatch):
    def refuse(*arguments: Any) -> None:
        raise TypeError("other arguments")

    calls: list[tuple[Any, ...]] = []
    relaunch = relaunch_of(lambda *arguments: calls.append(arguments))
    assert not relaunch(32, 40)  # 40 is not a multiple of 16
    assert not relaunch_of(refuse)(32)
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", SimpleNamespace(calls=[print]))
    assert not relaunch(32)
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert not relaunch(32)
    assert calls == []


def test_a_kernel_without_the_interface_has_no_relaunch(recorder):
    assert Relaunch.of(None, (1, 1, 1), (), 0) is None
