"""Compile the Triton kernels into the shared cache with several processes, before the sections launch them.

Every process goes through the same launches, in which the kernels only compile. Each process compiles its share of the
programs.
"""

from __future__ import annotations

import subprocess
import time
from typing import Any

import torch

from gpu.correctness import LARGE_SHAPES, ordered_cases
from gpu.processes import environment, section_command
from gpu.runs import Run
from llmquant.kernels import gpu
from llmquant.kernels.layout import LinearShape
from llmquant.kernels.tiles import ROW_BUCKETS
from llmquant.kernels.tune import random_weight
from llmquant.spec import QuantSpec

NUM_PROCESSES = 12


class CompileOnly:
    """Stands for a kernel. A launch compiles the program if it is new and belongs to this process's share."""

    def __init__(self, kernel: Any, run: Run) -> None:
        self._kernel, self._compiles = kernel, not run.rehearse
        self._number, self._count = map(int, run.share.split("/"))
        self._seen: set[Any] = set()
        self.num_compiled = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self._launch

    def _launch(self, *arguments: Any, **options: Any) -> None:
        # Triton compiles a program for the dtypes of pointers, and for integers that are 1 or multiples of 16.
        kinds = tuple(a.dtype if isinstance(a, torch.Tensor) else (a == 1, a % 16 == 0) for a in arguments)
        key = (kinds, tuple(sorted(options.items())))
        if key in self._seen:
            return
        self._seen.add(key)
        if len(self._seen) % self._count == self._number:
            self.num_compiled += 1
            if self._compiles:
                self._kernel.warmup(*arguments, grid=(1,), **options)


def section_compile(run: Run) -> None:
    """Compile the kernels with several processes, and wait for them."""
    began = time.monotonic()
    count = 1 if run.rehearse else NUM_PROCESSES
    env = environment(run.scratch, interpret=run.rehearse)
    commands = [section_command(run, "compile_share", "--share", f"{number}/{count}") for number in range(count)]
    shares = [subprocess.Popen(command, env=env) for command in commands]
    codes = [process.wait() for process in shares]
    run.log.write("compiled", processes=count, exits=codes, seconds=round(time.monotonic() - began, 1))


def section_compile_share(run: Run) -> None:
    """Compile one share of the programs: those of the timed linears first, then those of the correctness cases."""
    began = time.monotonic()
    kernels = gpu._kernels()
    fused, dense = CompileOnly(kernels.w4a16_kernel, run), CompileOnly(kernels.dequantize_kernel, run)
    kernels.w4a16_kernel, kernels.dequantize_kernel = fused, dense
    make_calls_compile_only()
    shapes = [(128, 64)] if run.rehearse else [*LARGE_SHAPES, (4096, 1024)]
    for group_size in (128, 64):
        spec = QuantSpec(group_size=group_size, symmetric=False)
        for in_features, out_features in shapes:
            prepared = empty_prepared(in_features, out_features, group_size, run.device)
            shape = LinearShape.of_sizes(out_features, in_features, spec)
            for has_bias in (False, True):
                launch_all(shape, prepared, torch.bfloat16, run.device, has_bias, (*ROW_BUCKETS, 1024))
    generator = torch.Generator(run.device).manual_seed(0)
    for shape, dtype in [] if run.rehearse else ordered_cases():
        if shape.in_features * shape.out_features <= 1 << 22:
            prepared = gpu.prepare(random_weight(shape, run.device, generator), dtype, run.device)
            for has_bias in (True, False):
                launch_all(shape, prepared, dtype, run.device, has_bias, (*ROW_BUCKETS, 1024))
    seconds = round(time.monotonic() - began, 1)
    run.log.write("compiled share", share=run.share, programs=fused.num_compiled + dense.num_compiled, seconds=seconds)


def make_calls_compile_only() -> None:
    """Let the backend launch through `CompileOnly` alone: no compiled kernel is called again, and cuBLAS is not."""
    launch = gpu.launch

    def launch_without_plan(x_MK: Any, prepared: Any, bias_N: Any, shape: Any, tiles: Any, plan: Any = None) -> Any:
        return launch(x_MK, prepared, bias_N, shape, tiles)

    def write_dense_weight(x_MK: Any, prepared: Any, bias_N: Any, shape: Any) -> Any:
        gpu.dequantize(prepared, shape, x_MK.dtype)
        return x_MK.new_empty(x_MK.shape[0], shape.out_features)

    gpu.launch, gpu.matmul_dense = launch_without_plan, write_dense_weight


def launch_all(
    shape: LinearShape,
    prepared: tuple[torch.Tensor, ...],
    dtype: torch.dtype,
    device: torch.device,
    has_bias: bool,
    rows_list: tuple[int, ...],
) -> None:
    """Call the backend for each number of rows."""
    bias_N = torch.empty(shape.out_features, dtype=dtype, device=device) if has_bias else None
    for rows in rows_list:
        x_MK = torch.empty(rows, shape.in_features, dtype=dtype, device=device)
        gpu.matmul(x_MK, prepared, bias_N, shape)
        if rows == 1:
            gpu.matmul_invariant(x_MK, prepared, bias_N, shape)


def empty_prepared(
    in_features: int, out_features: int, group_size: int, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """Return tensors like those of `gpu.prepare` for 4 bits, sizes that are multiples of 128, and large groups."""
    block = min(group_size, gpu.TILE_SLOTS)
    tiles, features = in_features // gpu.TILE_SLOTS, out_features
    return (
        torch.empty(features // 64, tiles, 64, 16, dtype=torch.int32, device=device),
        torch.empty(tiles, features, gpu.TILE_SLOTS // block, dtype=torch.int32, device=device),
        torch.empty(features // 64 * gpu.MAX_SPLIT_ROW_TILES, dtype=torch.int32, device=device),
        torch.empty(0, dtype=torch.int64, device=device),
        torch.empty(0, dtype=torch.bfloat16, device=device),
        torch.empty(0, dtype=torch.float16, device=device),
    )
