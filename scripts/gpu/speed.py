"""Time the fused linear against torch.mm in bfloat16, torch's own int4 kernel and, if asked for, gemlite.

Times are medians of CUDA graph replays over rotated weights and random data. Each record also gives the part of the
copy bandwidth that is reached, and the physical limit.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpu.rates import measured_limits
from gpu.runs import Run, device_is_lost, one_line
from llmquant.kernels import gpu, tune
from llmquant.kernels.layout import LinearShape
from llmquant.runtime.linear import QuantizedLinear
from llmquant.spec import QuantSpec

SHAPE_GOALS = {(4096, 4096): 2.8, (4096, 14336): 3.4, (14336, 4096): 3.4, (8192, 28672): 3.5}
"""Goals for the speed-up over cuBLAS at one row and groups of 128, by (in_features, out_features)."""

ROW_GOALS = {16: 2.8, 64: 1.8, 256: 0.9}
"""Goals for more rows, for each of those shapes. From 1024 rows on, the goal is MANY_ROWS_GOAL."""

MANY_ROWS_GOAL = 0.8

OTHERS_UP_TO_ROWS = 64
"""Rows of x up to which the other int4 kernels are timed. They are not made for more rows, and are slow."""


def goal(rows: int, shape: LinearShape) -> float | None:
    """Return the goal for the speed-up over cuBLAS; None if there is none."""
    sizes = shape.in_features, shape.out_features
    if shape.group_size != 128 or sizes not in SHAPE_GOALS:
        return None
    return SHAPE_GOALS[sizes] if rows == 1 else MANY_ROWS_GOAL if rows >= 1024 else ROW_GOALS.get(rows)


def section_speed(run: Run) -> None:
    """Time all shapes: groups of 128 with few rows first, then with many rows, then groups of 64."""
    bandwidth, flops = measured_limits(run)
    few = tuple(rows for rows in run.sizes.rows if rows <= 16)
    many = tuple(rows for rows in run.sizes.rows if rows > 16)
    run.attempt("call microseconds", partial(call_microseconds, run))
    timed: dict[LinearShape, TimedShape] = {}
    passes = [(128, rows) for rows in (*few, *many)] + [(64, rows) for rows in few]
    for (group_size, rows), (in_features, out_features) in itertools.product(passes, run.sizes.shapes):
        shape = LinearShape.of_sizes(out_features, in_features, QuantSpec(group_size=group_size, symmetric=False))
        if run.seconds_left < 3:
            run.log.write("not timed", shape=shape.describe(), rows=rows)
            continue
        try:
            if shape not in timed:
                timed[shape] = TimedShape(shape, run.device, bandwidth, flops, gemlite=run.gemlite)
            run.log.write("speed", **timed[shape].record(rows))
        except Exception as error:
            run.log.finding(f"{shape.describe()}, {rows} rows: {type(error).__name__}: {one_line(error, 200)}")
            if device_is_lost(run.device):
                raise
    print_table(run.results("speed"), bandwidth)


def call_microseconds(run: Run, calls: int = 400) -> dict[str, Any]:
    """Return the microseconds of the CPU for a call outside of a CUDA graph: of the fused linear, and of F.linear."""
    in_features, out_features = run.sizes.shapes[-1]
    shape = LinearShape.of_sizes(out_features, in_features, QuantSpec(group_size=128, symmetric=False))
    weight = tune.random_weight(shape, run.device, torch.Generator(run.device).manual_seed(0))
    linear = QuantizedLinear(weight, None, dtype=torch.bfloat16, device=run.device, backend="triton")
    dense = torch.nn.Linear(in_features, out_features, bias=False, device=run.device, dtype=torch.bfloat16)
    x = torch.randn(1, 1, in_features, device=run.device, dtype=torch.bfloat16)
    calls = 2 if run.rehearse else calls
    values = {}
    with torch.inference_mode():
        for name, module in (("QuantizedLinear", linear), ("Linear", dense)):
            for _ in range(3):
                module(x)
            run.synchronize()
            began = time.perf_counter()
            for _ in range(calls):
                module(x)
            values[name] = round(1e6 * (time.perf_counter() - began) / calls, 2)
            run.synchronize()
    return values


class TimedShape:
    """A linear of one shape with its copies of the weight, quantized, dense, and prepared by other kernels."""

    def __init__(
        self, shape: LinearShape, device: torch.device, bandwidth: float, flops: float, *, gemlite: bool = False
    ) -> None:
        self.shape, self.device, self.bandwidth, self.flops = shape, device, bandwidth, flops
        self.copies = tune.prepared_copies(shape, torch.bfloat16, device)
        self.weight_bytes = self.copies[0][0].nbytes + self.copies[0][1].nbytes
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self.dense = [
            torch.randn(shape.out_features, shape.in_features, device=device, dtype=torch.bfloat16).t()
            for _ in range(tune.copies_needed(2 * shape.in_features * shape.out_features, cache))
        ]
        others = {"tinygemm": tinygemm_calls} | ({"gemlite": gemlite_calls} if gemlite else {})
        made = {name: make(shape, len(self.copies), device) for name, make in others.items()}
        self.others = {name: calls for name, calls in made.items() if calls is not None}

    def record(self, rows: int) -> dict[str, Any]:
        """Return the times of all kernels for this number of rows, the speed-up, the bandwidth and the limit."""
        shape = self.shape
        x_MK = torch.randn(rows, shape.in_features, device=self.device, dtype=torch.bfloat16)
        fused_us = tune.graph_microseconds([partial(gpu.matmul, x_MK, copy, None, shape) for copy in self.copies])
        dense_us = tune.graph_microseconds([partial(torch.mm, x_MK, weight_KN) for weight_KN in self.dense])
        limit_us = speed_limit_microseconds(rows, shape, self.weight_bytes, self.bandwidth, self.flops)
        record = {
            "in_features": shape.in_features,
            "out_features": shape.out_features,
            "group_size": shape.group_size,
            "rows": rows,
            "us": round(fused_us, 2),
            "dense_us": round(dense_us, 2),
            "speed_up": round(dense_us / fused_us, 3),
            "limit_us": round(limit_us, 2),
            "limit_speed_up": round(dense_us / limit_us, 3),
            "bandwidth_share": round(self.weight_bytes / (fused_us * 1e-6) / self.bandwidth, 3),
            "goal": goal(rows, shape),
        }
        for name, calls in self.others.items():
            if rows <= OTHERS_UP_TO_ROWS:
                x = x_MK.half() if name == "gemlite" else x_MK
                record[f"{name}_us"] = round(tune.graph_microseconds([partial(call, x) for call in calls]), 2)
        return record


def speed_limit_microseconds(rows: int, shape: LinearShape, weight_bytes: int, bandwidth: float, flops: float) -> float:
    """Return the physical limit: the time to move all bytes once, or to multiply, whichever is longer."""
    num_bytes = weight_bytes + 2 * rows * (shape.in_features + shape.out_features)
    return 1e6 * max(num_bytes / bandwidth, 2 * rows * shape.in_features * shape.out_features / flops)


def time_linear(
    shape: LinearShape, rows_list: tuple[int, ...], device: torch.device, bandwidth: float, flops: float, gemlite: bool
) -> list[dict[str, Any]]:
    """Return one record per number of rows: the times of all kernels, the speed-up, the bandwidth and the limit."""
    timed = TimedShape(shape, device, bandwidth, flops, gemlite=gemlite)
    return [timed.record(rows) for rows in rows_list]


def tinygemm_calls(shape: LinearShape, num_copies: int, device: torch.device) -> list[Callable[..., Any]] | None:
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


def gemlite_calls(shape: LinearShape, num_copies: int, device: torch.device) -> list[Callable[..., Any]] | None:
    """Return calls of gemlite with random weights for x in float16, or None if it is not installed."""
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
        calls.append(linear)
    return calls


def print_table(records: list[dict[str, Any]], bandwidth: float) -> None:
    """Print a line for each shape, group size and number of rows."""
    print(f"\ncopy bandwidth {bandwidth / 1e12:.2f} TB/s")
    print("       KxN   group rows  fused us  dense us speed-up  limit  goal bandwidth  tinygemm  gemlite us")
    for r in records:
        goal = "" if r["goal"] is None else f"{r['goal']:.2f}"
        missed = "" if r["goal"] is None or r["speed_up"] >= r["goal"] else "  below goal"
        print(
            f"{r['in_features']:>5}x{r['out_features']:<5} {r.get('group_size', 128):>5} {r['rows']:>4} "
            f"{r['us']:>9.2f} {r['dense_us']:>9.2f} {r['speed_up']:>7.2f}x {r['limit_speed_up']:>5.2f}x {goal:>5} "
            f"{r['bandwidth_share']:>9.0%} {r.get('tinygemm_us', ''):>9} {r.get('gemlite_us', ''):>8}{missed}".rstrip()
        )


def draw(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw the speed-up over the rows of x, in one panel per shape, with the physical limit as a dashed line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    all_sizes = sorted({(r["in_features"], r["out_features"]) for r in records})
    figure, panels = pyplot.subplots(1, len(all_sizes), figsize=(4.2 * len(all_sizes), 3.8), sharey=True, squeeze=False)
    for panel, sizes in zip(panels[0], all_sizes, strict=True):
        of_shape = [r for r in records if (r["in_features"], r["out_features"]) == sizes]
        of_shape.sort(key=lambda r: r["rows"])
        main = [r for r in of_shape if r.get("group_size", 128) == 128]
        panel.plot([r["rows"] for r in main], [r["limit_speed_up"] for r in main], "--", color="0.6", label="limit")
        for group_size in sorted({r.get("group_size", 128) for r in of_shape}, reverse=True):
            line = [r for r in of_shape if r.get("group_size", 128) == group_size]
            label = f"llmquant triton, g{group_size}"
            panel.plot([r["rows"] for r in line], [r["speed_up"] for r in line], "o-", label=label)
        for name in ("tinygemm", "gemlite"):
            if timed := [r for r in main if f"{name}_us" in r]:
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
