"""Versions, missing packages, and the rates of the GPU that the other numbers are compared with."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from functools import partial
from typing import Any

import torch

from gpu.processes import find_program, llmquant_command, run_command
from gpu.rates import copy_bandwidth, product_rate
from gpu.runs import Run, one_line, seconds_of
from llmquant.kernels import gpu, tune

PACKAGES = (
    "torch", "triton", "transformers", "numpy", "safetensors", "tokenizers", "accelerate", "huggingface_hub",
    "greenlet", "datasets", "pydantic", "pydantic_core", "annotated_types", "typing_inspection", "typer", "rich",
    "psutil", "regex", "jinja2", "llvmlite", "matplotlib", "sentencepiece", "google.protobuf",
)  # fmt: skip
"""Packages that llmquant imports."""

COMPILED = ("greenlet", "pydantic", "regex", "safetensors", "tokenizers", "llvmlite")
"""Those with compiled parts that are quick to import."""

DISTRIBUTIONS = {"google.protobuf": "protobuf"}
"""Distribution names that differ from the package's."""


def section_machine(run: Run) -> None:
    """Log versions, missing packages, the properties of the GPU, and its rates."""
    versions = {name: version for name in PACKAGES if (version := installed_version(name)) is not None}
    run.log.write(
        "versions", python=platform.python_version(), cuda=torch.version.cuda, processors=os.cpu_count(), **versions
    )
    missing = [name for name in PACKAGES if not can_import(name)]
    run.log.write("missing packages", names=missing)
    compiler = find_program(os.environ.get("CC", "gcc"), "cc", "clang")
    tools = {name: find_program(name) for name in ("ncu", "nvcc", "ptxas")}
    run.log.write("tools", compiler=compiler, **tools)
    if compiler is None:
        run.log.finding("there is no C compiler, which Triton needs at run time")
    run.attempt("gpu", partial(describe_gpu, run))
    run.attempt("rates", lambda: {"copy_bytes_per_second": round(copy_bandwidth(run))})
    run.attempt("rates", lambda: {"bf16_flops": round(product_rate(run, torch.bfloat16))})
    run.attempt("rates", lambda: {"float32_flops": round(product_rate(run, torch.float32))})
    try:
        run.log.write("rates", bf16_to_float32_flops=round(mixed_product_rate(run)))
    except (TypeError, RuntimeError) as error:  # older releases of torch cannot do it
        run.log.write("note", text=f"bf16 product with a float32 result: {one_line(error)}")
    run.attempt("rates", lambda: {"float64_factor_seconds": round(factor_seconds(run), 4)})
    result = run_command(run, llmquant_command("--version"), 10)
    run.log.write("llmquant --version", output=result.stdout.strip(), **result.describe())


def installed_version(name: str) -> str | None:
    """Return the version of a package, or None if it is not installed."""
    try:
        return importlib.metadata.version(DISTRIBUTIONS.get(name, name))
    except importlib.metadata.PackageNotFoundError:
        return None


def can_import(name: str) -> bool:
    """Whether a package is there and, if its compiled part may not fit this Python, can be imported."""
    try:
        if name in COMPILED:
            importlib.import_module(name)
        return importlib.util.find_spec(name) is not None
    except Exception:
        return False


def describe_gpu(run: Run) -> dict[str, Any]:
    """Return the properties of the GPU, and its clocks from nvidia-smi."""
    properties = torch.cuda.get_device_properties(run.device)
    values: dict[str, Any] = {"l2_bytes": properties.L2_cache_size}
    this_gpu = gpu.gpu_of(run.device)
    values |= {"name": this_gpu.name, "processors": this_gpu.processors, "capability": this_gpu.capability}
    if (program := find_program("nvidia-smi")) is not None:
        query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu,memory.total"
        command = [program, f"--query-gpu={query}", "--format=csv,noheader"]
        values["nvidia_smi"] = subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()
    return values


def mixed_product_rate(run: Run) -> float:
    """Return the FLOP/s of a product of bfloat16 matrices whose result is float32."""
    size = run.sizes.product_size
    factors = [torch.randn(size, size, device=run.device, dtype=torch.bfloat16) for _ in range(2)]
    options: dict[str, Any] = {} if run.rehearse else {"out_dtype": torch.float32}
    return 2e6 * size**3 / tune.graph_microseconds([partial(torch.mm, *factors, **options)], min_calls=4, replays=5)


def factor_seconds(run: Run) -> float:
    """Return the seconds of a Cholesky factor and a triangular solve in float64, after a warm-up."""
    size = run.sizes.factor_size
    root = torch.randn(size, size, device=run.device, dtype=torch.float64)
    matrix = root @ root.T + size * torch.eye(size, device=run.device, dtype=torch.float64)

    def factor_and_solve() -> None:
        factor = torch.linalg.cholesky(matrix)
        torch.linalg.solve_triangular(factor, root, upper=False)

    factor_and_solve()
    return seconds_of(run, factor_and_solve)
