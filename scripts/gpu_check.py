#!/usr/bin/env python
"""Check the Triton backend on the GPU of this machine: first that every kernel is correct, then how fast it is.

    scripts/gpu_check.py --plot gpu_check.png        # under 10 minutes on an H100 or H200
    scripts/gpu_check.py --quick                     # correctness and three row counts, a minute or two

Run it in an environment with the package installed (`pip install -e .` in a checkout).

Part 1 compares every bit width, group size, dtype and ragged shape with float64, and fills new memory with NaN. It
checks that two runs agree to the bit, that split-K leaves its counters at zero, that `triton-invariant` gives a row the
same bits in any batch, and that torch.compile and CUDA graphs give the eager results. Any failure ends the script with
exit code 1 before anything is timed.

Part 2 times the fused linear against torch.mm in bfloat16 (their ratio is the speed-up). It also times torch's own int4
kernel and, with --gemlite, gemlite. Times are medians of CUDA graph replays over rotated weights and random data. The
script prints which fraction of the copy bandwidth, measured in the same run, is reached, and the physical limit. The
last line is JSON.

The script exits with 2 if the machine has no GPU that the backend supports.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from functools import partial
from pathlib import Path

# torch fills new memory with NaN only in deterministic mode. cuBLAS needs this variable for that mode when it starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
import torch.nn.functional as F

from llmquant.kernels import gpu
from llmquant.kernels.dispatch import BACKENDS
from llmquant.kernels.layout import LinearShape
from llmquant.kernels.tiles import ROW_BUCKETS
from llmquant.kernels.tune import copies_needed, copy_bandwidth, graph_microseconds, prepared_copies, random_weight
from llmquant.runtime.linear import QuantizedLinear
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

BENCH_SHAPES = [(4096, 4096), (4096, 14336), (14336, 4096), (8192, 28672)]
"""(in_features, out_features) of the linears that are timed."""

BENCH_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
"""Rows of x for which the linears are timed."""

GOALS = {
    (1, 4096, 4096): 2.4, (1, 4096, 14336): 3.0, (1, 14336, 4096): 3.0, (1, 8192, 28672): 3.2,
    (16, 4096, 4096): 2.2, (16, 4096, 14336): 2.8, (16, 14336, 4096): 2.8, (16, 8192, 28672): 3.0,
    (64, 4096, 4096): 1.4, (64, 4096, 14336): 1.8, (64, 14336, 4096): 1.8, (64, 8192, 28672): 2.0,
    (256, 4096, 4096): 0.65, (256, 4096, 14336): 0.7, (256, 14336, 4096): 0.7, (256, 8192, 28672): 0.7,
}  # fmt: skip
"""Goals for the speed-up over cuBLAS, by (rows, in_features, out_features). From 1024 rows on, all goals are 0.75."""


def correctness_cases() -> list[tuple[LinearShape, torch.dtype]]:
    """Return (shape, dtype of x) for all bit widths, group sizes, dtypes, ragged sizes and column orders."""
    grids = [(4, group) for group in (32, 64, 128, -1, 16, 48)] + [(8, 64), (8, 128), (3, 64), (2, 128)]
    cases = []
    for dtype in (torch.bfloat16, torch.float16):
        for bits, group_size in grids:
            for in_features, out_features in ((512, 384), (576, 1536), (1000, 200), (2052, 130)):
                spec = QuantSpec(bits=bits, group_size=group_size, symmetric=group_size == 128)
                cases.append((LinearShape.of_sizes(out_features, in_features, spec), dtype))
        act_order = QuantSpec(group_size=64, symmetric=False)
        cases.append((LinearShape.of_sizes(320, 1024, act_order, act_order_groups=True), dtype))
        for group_size in (128, 64, 32):
            spec = QuantSpec(group_size=group_size, symmetric=False)
            cases += [
                (LinearShape.of_sizes(n, k, spec), dtype) for k, n in BENCH_SHAPES[: 4 if group_size == 128 else 1]
            ]
    return cases


def relative_error(y: torch.Tensor, truth: torch.Tensor) -> float:
    """Return the Frobenius norm of y - truth divided by that of truth; NaN if y contains NaN."""
    return ((y.double() - truth).norm() / truth.norm()).item()


def exact_product(x_MK: torch.Tensor, weight: QuantizedWeight, bias_N: torch.Tensor) -> torch.Tensor:
    """Return x @ W.T + bias in float64."""
    group_K = weight.group_of_column_K
    q_NK = weight.codes_NK.double() - weight.zero_NG.double()[:, group_K]
    return x_MK.double() @ (weight.scale_NG.double()[:, group_K] * q_NK).T + bias_N.double()


def check_case(shape: LinearShape, dtype: torch.dtype, device: torch.device, rows: tuple[int, ...]) -> list[str]:
    """Return the problems of one linear for these numbers of rows, one line each; [] if it is correct."""
    generator = torch.Generator(device).manual_seed(shape.in_features + shape.out_features)
    weight = random_weight(shape, device, generator)
    bias_N = torch.randn(shape.out_features, device=device, generator=generator).to(dtype)
    prepared = gpu.prepare(weight, dtype, device)
    case_name = f"{shape.describe()} {str(dtype).removeprefix('torch.')}"
    problems = []
    dense_NK = weight.dequantize(dtype)
    # Both weights are computed in float32 and rounded once, so at most a few elements may differ.
    if relative_error(gpu.dequantize(prepared, shape, dtype), dense_NK.double()) > 1e-5:
        problems.append(f"{case_name}: the dense kernel writes a different weight")
    for num_rows in rows:
        x_MK = torch.randn(num_rows, shape.in_features, device=device, generator=generator).to(dtype)
        truth = exact_product(x_MK, weight, bias_N)
        plain = relative_error(F.linear(x_MK, dense_NK, bias_N), truth)
        # 8-bit codes consist of two planes, whose weights are rounded separately.
        allowed = (1.35 if shape.bits == 8 else 1.1) * plain
        for name in ("triton", "triton-invariant"):
            matmul = BACKENDS[name].matmul
            first, second = (matmul(x_MK, prepared, bias_N, shape) for _ in range(2))
            error = relative_error(first, truth)
            if not error <= allowed:
                problems.append(f"{case_name}, {num_rows} rows, {name}: error {error:.2e}, plain torch has {plain:.2e}")
            if not torch.equal(first, second):
                problems.append(f"{case_name}, {num_rows} rows, {name}: two runs differ")
        alone = gpu.matmul_invariant(x_MK[-1:], prepared, bias_N, shape)
        if not torch.equal(gpu.matmul_invariant(x_MK, prepared, bias_N, shape)[-1:], alone):
            problems.append(
                f"{case_name}, {num_rows} rows: the bits of triton-invariant differ for a row alone and in a batch"
            )
    if prepared[2].any():
        problems.append(f"{case_name}: split-K left a counter that is not zero")
    return problems


ONE_HOT_WIDTHS = [(4, 128), (4, 64), (4, 32), (3, 64), (2, 128)]
"""(bits, group size) of the one-hot check. 8 bits are excluded, because the two planes are rounded separately."""


def check_one_hot(device: torch.device) -> list[str]:
    """Return the problems of multiplying one-hot rows, which must give the columns of the weight to the bit."""
    problems = []
    for bits, group_size in ONE_HOT_WIDTHS:
        shape = LinearShape.of_sizes(192, 640, QuantSpec(bits=bits, group_size=group_size, symmetric=False))
        weight = random_weight(shape, device, torch.Generator(device).manual_seed(bits))
        for dtype in (torch.bfloat16, torch.float16):
            prepared = gpu.prepare(weight, dtype, device)
            for rows in torch.eye(640, dtype=dtype, device=device).split(100):
                y_MN = gpu.matmul(rows, prepared, None, shape)
                if not torch.equal(y_MN, weight.dequantize(dtype).T[rows.argmax(dim=1)]):
                    problems.append(f"one-hot rows, {shape.describe()} {dtype}: not the weight")
    return problems


def check_compiled(device: torch.device) -> list[str]:
    """Return the differences between torch.compile (no graph breaks; also with CUDA graphs) and the eager results."""
    shape = LinearShape.of_sizes(512, 1024, QuantSpec(symmetric=False))
    weight = random_weight(shape, device, torch.Generator(device).manual_seed(0))
    linear = QuantizedLinear(weight, None, dtype=torch.bfloat16, device=device, backend="triton")
    problems = []
    for mode in ("default", "reduce-overhead"):
        compiled = torch.compile(linear, fullgraph=True, mode=mode)
        with torch.inference_mode():
            for _ in range(4):
                x = torch.randn(3, 1024, device=device, dtype=torch.bfloat16)
                if not torch.equal(compiled(x).clone(), linear(x)):
                    problems.append(f"torch.compile in mode {mode}: not the eager result")
    return problems


def speed_limit_microseconds(rows: int, shape: LinearShape, weight_bytes: int, bandwidth: float, flops: float) -> float:
    """Return the physical limit: the time to move all bytes once, or to multiply, whichever is longer."""
    num_bytes = weight_bytes + 2 * rows * (shape.in_features + shape.out_features)
    return 1e6 * max(num_bytes / bandwidth, 2 * rows * shape.in_features * shape.out_features / flops)


def time_linear(
    shape: LinearShape, rows_list: tuple[int, ...], device: torch.device, bandwidth: float, flops: float, gemlite: bool
) -> list[dict]:
    """Return one record per number of rows: the times of all kernels, the speed-up, the bandwidth and the limit."""
    dtype = torch.bfloat16
    copies = prepared_copies(shape, dtype, device)
    weight_bytes = copies[0][0].nbytes + copies[0][1].nbytes
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    dense = [
        torch.randn(shape.out_features, shape.in_features, device=device, dtype=dtype).t()
        for _ in range(copies_needed(2 * shape.in_features * shape.out_features, cache))
    ]
    others = {"tinygemm": tinygemm_calls} | ({"gemlite": gemlite_calls} if gemlite else {})
    prepared_others = {name: make(shape, len(copies), device) for name, make in others.items()}
    records = []
    for rows in rows_list:
        x_MK = torch.randn(rows, shape.in_features, device=device, dtype=dtype)
        fused_us = graph_microseconds([partial(gpu.matmul, x_MK, copy, None, shape) for copy in copies])
        dense_us = graph_microseconds([partial(torch.mm, x_MK, weight_KN) for weight_KN in dense])
        limit_us = speed_limit_microseconds(rows, shape, weight_bytes, bandwidth, flops)
        record = {
            "in_features": shape.in_features,
            "out_features": shape.out_features,
            "rows": rows,
            "us": round(fused_us, 2),
            "dense_us": round(dense_us, 2),
            "speed_up": round(dense_us / fused_us, 3),
            "limit_us": round(limit_us, 2),
            "limit_speed_up": round(dense_us / limit_us, 3),
            "bandwidth_share": round(weight_bytes / (fused_us * 1e-6) / bandwidth, 3),
            "goal": GOALS.get((rows, shape.in_features, shape.out_features), 0.75 if rows >= 1024 else None),
        }
        for name, calls in prepared_others.items():
            # Skip many rows: these kernels are not made for them, and are slow.
            if calls is not None and rows <= 64:
                record[f"{name}_us"] = round(graph_microseconds([partial(call, x_MK) for call in calls]), 2)
        records.append(record)
    return records


def tinygemm_calls(shape: LinearShape, num_copies: int, device: torch.device) -> list | None:
    """Return calls of torch's own int4 kernel with random weights, or None if this torch does not have it."""
    n, k = shape.out_features, shape.in_features
    try:
        packed = [
            torch.ops.aten._convert_weight_to_int4pack(
                torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device), 8
            )
            for _ in range(num_copies)
        ]
    except RuntimeError as error:
        print(f"tinygemm is skipped: {str(error).splitlines()[0]}")
        return None
    scale_zero = torch.rand(k // shape.group_size, n, 2, device=device).bfloat16()
    mm = torch.ops.aten._weight_int4pack_mm
    return [lambda x, weight=weight: mm(x, weight, shape.group_size, scale_zero) for weight in packed]


def gemlite_calls(shape: LinearShape, num_copies: int, device: torch.device) -> list | None:
    """Return calls of gemlite with random weights, in float16, or None if it is not installed."""
    try:
        from gemlite.core import DType, GemLiteLinearTriton
    except ImportError as error:
        print(f"gemlite is skipped: {error}")
        return None
    n, k, group_size = shape.out_features, shape.in_features, shape.group_size
    calls = []
    for _ in range(num_copies):
        linear = GemLiteLinearTriton(4, group_size, k, n, input_dtype=DType.FP16, output_dtype=DType.FP16)
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=device)
        scale = torch.rand(n * k // group_size, 1, device=device).half() * 0.01
        linear.pack(codes, scale, torch.full_like(scale, 8), None)
        calls.append(lambda x, linear=linear: linear(x.half()))
    return calls


def print_table(records: list[dict], bandwidth: float) -> None:
    """Print a line for each shape and number of rows."""
    print(f"\ncopy bandwidth {bandwidth / 1e12:.2f} TB/s")
    print("       KxN  rows  fused us  dense us  speed-up   limit   goal  bandwidth  tinygemm us  gemlite us")
    for r in records:
        goal = "" if r["goal"] is None else f"{r['goal']:.2f}"
        missed = "" if r["goal"] is None or r["speed_up"] >= r["goal"] else "  below goal"
        print(
            f"{r['in_features']:>5}x{r['out_features']:<5} {r['rows']:>4} {r['us']:>9.2f} {r['dense_us']:>9.2f} "
            f"{r['speed_up']:>8.2f}x {r['limit_speed_up']:>6.2f}x {goal:>6} {r['bandwidth_share']:>9.0%} "
            f"{r.get('tinygemm_us', ''):>12} {r.get('gemlite_us', ''):>11}{missed}"
        )


def draw(records: list[dict], path: Path, title: str) -> None:
    """Draw the speed-up over the rows of x, in one panel per shape, with the physical limit as a dashed line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    all_sizes = sorted({(r["in_features"], r["out_features"]) for r in records})
    figure, panels = pyplot.subplots(1, len(all_sizes), figsize=(4.2 * len(all_sizes), 3.8), sharey=True, squeeze=False)
    for panel, sizes in zip(panels[0], all_sizes, strict=True):
        records_of_shape = [r for r in records if (r["in_features"], r["out_features"]) == sizes]
        rows = [r["rows"] for r in records_of_shape]
        panel.plot(rows, [r["limit_speed_up"] for r in records_of_shape], "--", color="0.6", label="physical limit")
        panel.plot(rows, [r["speed_up"] for r in records_of_shape], "o-", label="llmquant triton")
        for name in ("tinygemm", "gemlite"):
            timed = [r for r in records_of_shape if f"{name}_us" in r]
            if timed:
                ratios = [r["dense_us"] / r[f"{name}_us"] for r in timed]
                panel.plot([r["rows"] for r in timed], ratios, ".-", label=name)
        panel.axhline(1.0, color="0.8", linewidth=0.8)
        panel.set_xscale("log", base=2)
        panel.set_title(f"{sizes[0]} x {sizes[1]}")
        panel.set_xlabel("rows of x")
    panels[0][0].set_ylabel("times as fast as torch.mm bfloat16")
    panels[0][-1].legend(fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="time rows 1, 16 and 64 only")
    parser.add_argument("--plot", type=Path, help="draw speed-up over rows to this file")
    parser.add_argument("--gemlite", action="store_true", help="time gemlite too, if installed (it tunes for minutes)")
    parser.add_argument("--seconds", type=float, default=560, help="start no further timing after this many seconds")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_check: torch sees no CUDA device; run this on a machine with an NVIDIA GPU", file=sys.stderr)
        return 2
    began = time.monotonic()
    device = torch.device("cuda", torch.cuda.current_device())
    if (reason := gpu.refuses(LinearShape.of_sizes(64, 128, QuantSpec()), device, torch.bfloat16)) is not None:
        print(f"gpu_check: the triton backend refuses this machine: {reason}", file=sys.stderr)
        return 2
    this_gpu = gpu.gpu_of(device)
    import triton

    print(f"{this_gpu.name}, {this_gpu.processors} processors, torch {torch.__version__}, triton {triton.__version__}")

    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    cases = correctness_cases()
    problems = check_one_hot(device)
    for shape, dtype in cases:
        large = shape.in_features * shape.out_features > 1 << 24
        problems += check_case(shape, dtype, device, (1, 33, 513) if large else (1, 5, 16, 17, 64, 100, 200, 400))
    torch.use_deterministic_algorithms(False)
    problems += check_compiled(device)
    print(f"correctness: {len(cases)} linears, {len(problems)} problems, {time.monotonic() - began:.0f} s")
    if problems:
        print("\n".join(problems))
        print(json.dumps({"check": "gpu", "gpu": this_gpu.name, "cases": len(cases), "problems": problems[:50]}))
        return 1

    bandwidth = copy_bandwidth(device)
    big = [torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2)]
    flops = 2 * 8192**3 / (graph_microseconds([partial(torch.mm, *big)], min_calls=8) * 1e-6)
    del big
    records: list[dict] = []
    for in_features, out_features in BENCH_SHAPES:
        if time.monotonic() - began > options.seconds:
            print(
                f"{in_features}x{out_features} and the later shapes are not timed: {options.seconds:.0f} s have passed"
            )
            break
        shape = LinearShape.of_sizes(out_features, in_features, QuantSpec(group_size=128, symmetric=False))
        rows = (1, 16, 64) if options.quick else BENCH_ROWS
        records += time_linear(shape, rows, device, bandwidth, flops, options.gemlite)
        torch.cuda.empty_cache()
        print(f"timed {in_features}x{out_features}, {time.monotonic() - began:.0f} s", flush=True)
    print_table(records, bandwidth)
    if options.plot is not None:
        draw(records, options.plot, f"4-bit g128 linear, {this_gpu.name}")
    missed = sum(r["goal"] is not None and r["speed_up"] < r["goal"] for r in records)
    summary = {"check": "gpu", "gpu": this_gpu.name, "torch": torch.__version__, "triton": triton.__version__}
    summary |= {"cases": len(cases), "problems": [], "goals_missed": missed, "seconds": round(time.monotonic() - began)}
    summary |= {"copy_bytes_per_second": round(bandwidth), "flops": round(flops), "row_buckets": ROW_BUCKETS}
    print(json.dumps(summary | {"results": records}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
