"""Compile the Triton kernels into the shared cache with several processes, before the sections launch them.

These are the kernels of quantized linears, of the solver, and of decode steps.

Every process goes through the same launches, in which the kernels only compile. Each process compiles its share of the
programs.
"""

from __future__ import annotations

import itertools
import subprocess
import time
from typing import Any

import torch

from gpu.correctness import LARGE_SHAPES, ordered_cases
from gpu.processes import environment, section_command
from gpu.runs import Run
from llmquant.kernels import decode, gpu, solver
from llmquant.kernels.layout import LinearShape
from llmquant.kernels.tiles import ROW_BUCKETS
from llmquant.kernels.tune import random_weight
from llmquant.spec import QuantSpec

NUM_PROCESSES = 12

SHARED_SHAPES = [(4096, 6144), (4096, 28672)]
"""(in_features, out_features) of the model's linears that share a launch: queries, keys and values; gate and up."""

DECODE_KERNELS = (
    "rms_norm_kernel", "rotate_kernel", "silu_product_kernel", "store_kernel", "attend_kernel", "combine_kernel",
)  # fmt: skip
"""The kernels of `kernels/triton_decode.py`."""


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
        # Triton compiles a program for the dtypes and the alignment of pointers, and for integers that are 1 or
        # multiples of 16.
        kinds = tuple(
            (a.dtype, a.data_ptr() % 16 == 0) if isinstance(a, torch.Tensor) else (a == 1, a % 16 == 0)
            for a in arguments
        )
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
    """Compile one share of the programs: those of the solver and of decode steps, those of the timed linears, and those
    of the correctness cases.
    """
    from llmquant.kernels import triton_decode, triton_solver

    began = time.monotonic()
    kernels = gpu._kernels()
    stand_ins = [
        *compile_only(kernels, run, ("w4a16_kernel", "dequantize_kernel")),
        *compile_only(triton_solver, run, ("round_panel_kernel", "search_range_kernel")),
        *compile_only(triton_decode, run, DECODE_KERNELS),
    ]
    make_calls_compile_only()
    launch_solver(run)
    launch_decode(run)
    shapes = [(128, 64)] if run.rehearse else [*LARGE_SHAPES, (4096, 1024), *SHARED_SHAPES]
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
    programs = sum(stand_in.num_compiled for stand_in in stand_ins)
    run.log.write("compiled share", share=run.share, programs=programs, seconds=seconds)


def compile_only(module: Any, run: Run, names: tuple[str, ...]) -> list[CompileOnly]:
    """Replace the kernels of a module by `CompileOnly`, and return those."""
    stand_ins = [CompileOnly(getattr(module, name), run) for name in names]
    for name, stand_in in zip(names, stand_ins, strict=True):
        setattr(module, name, stand_in)
    return stand_ins


def launch_solver(run: Run) -> None:
    """Call the solver for a layer of the model, with all dtypes of scales and all widths of panels that are used."""
    in_features, out_features = (64, 32) if run.rehearse else (4096, 1024)
    group_size = run.sizes.group_size
    saved = solver.PANEL_ROWS, solver.PANEL_COLUMNS

    def floats(*sizes: int) -> torch.Tensor:
        return torch.empty(sizes, device=run.device)

    for rows, columns in ((saved[0], saved[1]), *itertools.product((8, 16, 32), (128, 64))):
        solver.PANEL_ROWS, solver.PANEL_COLUMNS = rows, columns
        values, codes, new_codes, errors = (floats(columns, out_features) for _ in range(4))
        groups = torch.empty(columns, dtype=torch.int64, device=run.device)
        scale, zero = (floats(in_features // group_size, out_features) for _ in range(2))
        matrix = floats(in_features, in_features)[:columns, :columns]
        grid = solver.PanelGrid(groups, scale, zero, 15)
        solver.round_panel(values, matrix, grid, codes, errors)
        solver.descend_panel(values, matrix, grid, codes, new_codes, errors)
    solver.PANEL_ROWS, solver.PANEL_COLUMNS = saved
    for symmetric, dtype in itertools.product((False, True), (torch.bfloat16, torch.float16)):
        solver.search_ranges(
            floats(in_features, out_features), floats(in_features), [1.0, 0.9], group_size=group_size,
            symmetric=symmetric, max_code=15, mid_code=8, min_zero=0, scale_dtype=dtype, scale_limits=(1e-8, 1e4),
        )  # fmt: skip


def launch_decode(run: Run) -> None:
    """Call the kernels of a decode step of the model for several numbers of sequences."""
    sizes, dtype = run.sizes, torch.bfloat16
    head_dim = sizes.hidden_size // sizes.num_heads
    for num_sequences, places in itertools.product((1, 2, 8), (512, 1024)):

        def states(*shape: int, num_sequences: int = num_sequences) -> torch.Tensor:
            return torch.empty(num_sequences, *shape, dtype=dtype, device=run.device)

        x, weight_W = states(1, sizes.hidden_size), torch.empty(sizes.hidden_size, dtype=dtype, device=run.device)
        for kind in decode.NORM_KINDS:
            decode.rms_norm(x, weight_W, 1e-6, kind)
            decode.add_rms_norm(x, x, weight_W, 1e-6, kind)
        q, k = (states(1, heads, head_dim).transpose(1, 2) for heads in (sizes.num_heads, sizes.num_kv_heads))
        angles = states(1, head_dim)
        length = torch.empty(1, dtype=torch.int64, device=run.device)
        cache = states(sizes.num_kv_heads, places, head_dim)
        mask = torch.empty(num_sequences, 1, 1, places, dtype=torch.bool, device=run.device)
        if head_dim >= 32:
            decode.rotate(q, k, angles, angles)
            decode.store(k, k, cache, cache, length)
            decode.attend(q, cache, cache, mask, length, head_dim**-0.5)
        gate = states(1, sizes.intermediate_size)
        decode.silu_product(gate, gate)


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
