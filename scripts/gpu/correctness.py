"""Compare the Triton kernels with float64: every bit width, group size, dtype, ragged shape and column order.

New memory is filled with NaN. Two runs must agree to the bit, split-K must leave its counters at zero,
`triton-invariant` must give a row the same bits in any batch, and torch.compile must give the eager results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from gpu.runs import Run, device_is_lost, one_line
from llmquant.kernels import gpu
from llmquant.kernels.dispatch import BACKENDS
from llmquant.kernels.layout import LinearShape
from llmquant.kernels.tune import random_weight
from llmquant.runtime.linear import QuantizedLinear
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

LARGE_SHAPES = [(4096, 4096), (4096, 14336), (14336, 4096), (8192, 28672)]
"""(in_features, out_features) of the large linears that are checked."""

ONE_HOT_WIDTHS = [(4, 128), (4, 64), (4, 32), (3, 64), (2, 128)]
"""(bits, group size) of the one-hot check. 8 bits are excluded, because the two planes are rounded separately."""

COMPILE_SECONDS = 15
"""Time that the check of all cases leaves for torch.compile."""


def fill_new_memory_with_nan(enabled: bool) -> None:
    """Make torch fill new memory with NaN, which it does only in deterministic mode, or stop it."""
    torch.utils.deterministic.fill_uninitialized_memory = enabled  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(enabled)


def section_first(run: Run) -> None:
    """Check one matrix of groups of 128 and one of 64 against float64 for every number of rows."""
    fill_new_memory_with_nan(True)
    in_features, out_features = run.sizes.first_shape
    rows = sorted({min(rows, 512) for rows in run.sizes.rows})
    for group_size in (128, 64):
        spec = QuantSpec(group_size=group_size, symmetric=False)
        shape = LinearShape.of_sizes(out_features, in_features, spec)

        def check_and_log(shape: LinearShape = shape, group_size: int = group_size) -> list[str]:
            problems = []
            for record in compare_rows(shape, torch.bfloat16, run.device, tuple(rows)):
                run.log.write("first", group_size=group_size, **record)
                problems += problems_of(record)
            return problems

        find_problems(run, shape.describe(), check_and_log)
    if not run.rehearse:
        run.attempt("cuda graph", lambda: check_cuda_graph(run.device))


def find_problems(run: Run, what: str, check: Callable[[], list[str]]) -> list[str]:
    """Log the problems that a check returns as findings, or its exception, and return them.

    Raises the exception again if the GPU is lost.
    """
    try:
        problems = check()
    except Exception as error:
        run.log.finding(describe_failure(what, error))
        if device_is_lost(run.device):
            raise
        return [str(error)]
    for problem in problems:
        run.log.finding(problem)
    return problems


def describe_failure(what: str, error: Exception) -> str:
    """Return a line about an exception, as when a program needs more shared memory than the GPU has."""
    return f"{what}: {type(error).__name__}: {one_line(error, 200)}"


def section_correctness(run: Run) -> None:
    """Check all cases, the different ones first, until the time is over; then one-hot rows and torch.compile."""
    fill_new_memory_with_nan(True)
    cases = [] if run.rehearse else ordered_cases()
    if run.rehearse:
        cases = [(LinearShape.of_sizes(72, 200, QuantSpec(bits=8, group_size=64)), torch.bfloat16)]
    widths = ONE_HOT_WIDTHS[: 1 if run.rehearse else None]
    for bits, group_size in widths:
        in_features = 128 if run.rehearse else 640
        shape = LinearShape.of_sizes(192, in_features, QuantSpec(bits=bits, group_size=group_size, symmetric=False))
        find_problems(run, f"one-hot rows, {shape.describe()}", partial(check_one_hot, shape, run.device))
    run.log.write("one-hot", widths=widths)
    num_checked = 0
    for shape, dtype in cases:
        if run.seconds_left < COMPILE_SECONDS:
            break
        large = shape.in_features * shape.out_features > 1 << 24
        rows = (1, 33, 513) if large else (3,) if run.rehearse else (1, 5, 16, 17, 64, 100, 200, 400)
        find_problems(run, f"{shape.describe()} {dtype}", partial(check_case, shape, dtype, run.device, rows))
        num_checked += 1
        if num_checked % 20 == 0:
            run.log.write("cases so far", checked=num_checked, of=len(cases))
    run.log.write("correctness", checked=num_checked, of=len(cases), findings=run.log.num_findings)
    fill_new_memory_with_nan(False)
    modes: tuple[dict[str, Any], ...] = ({"mode": "default"}, {"mode": "reduce-overhead"})
    if run.rehearse:  # a tiny linear, and a compiler that generates no code
        modes = ({"backend": "eager"},)
    sizes = (64, 128) if run.rehearse else (512, 1024)
    problems: list[str] = []
    for mode in modes:
        problems += find_problems(run, f"torch.compile, {mode}", partial(check_compiled, run.device, mode, sizes))
    run.log.write("torch.compile", problems=len(problems))


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
                (LinearShape.of_sizes(n, k, spec), dtype) for k, n in LARGE_SHAPES[: 4 if group_size == 128 else 1]
            ]
    return cases


def ordered_cases() -> list[tuple[LinearShape, torch.dtype]]:
    """Return the cases so that every grid and dtype comes once before any comes twice, and the largest come last."""
    seen: dict[tuple[Any, ...], int] = {}
    keyed = []
    for shape, dtype in correctness_cases():
        grid = (shape.bits, shape.group_size, shape.act_order_groups, dtype)
        seen[grid] = seen.get(grid, 0) + 1
        large = shape.in_features * shape.out_features > 1 << 25
        keyed.append(((large, seen[grid]), (shape, dtype)))
    return [case for _, case in sorted(keyed, key=lambda pair: pair[0])]


def relative_error(y: torch.Tensor, truth: torch.Tensor) -> float:
    """Return the Frobenius norm of y - truth divided by that of truth; NaN if y contains NaN."""
    return ((y.double() - truth).norm() / truth.norm()).item()


def exact_product(x_MK: torch.Tensor, weight: QuantizedWeight, bias_N: torch.Tensor) -> torch.Tensor:
    """Return x @ W.T + bias in float64."""
    group_K = weight.group_of_column_K
    q_NK = weight.codes_NK.double() - weight.zero_NG.double()[:, group_K]
    return x_MK.double() @ (weight.scale_NG.double()[:, group_K] * q_NK).T + bias_N.double()


def compare_rows(
    shape: LinearShape, dtype: torch.dtype, device: torch.device, rows: tuple[int, ...]
) -> Iterator[dict[str, Any]]:
    """Yield the errors of one random linear: of its dense weight, then for each number of rows, then its counters."""
    generator = torch.Generator(device).manual_seed(shape.in_features + shape.out_features)
    weight = random_weight(shape, device, generator)
    bias_N = torch.randn(shape.out_features, device=device, generator=generator).to(dtype)
    prepared = gpu.prepare(weight, dtype, device)
    case = f"{shape.describe()} {str(dtype).removeprefix('torch.')}"
    dense_NK = weight.dequantize(dtype)

    def dense_error() -> dict[str, Any]:
        return {"dense_error": relative_error(gpu.dequantize(prepared, shape, dtype), dense_NK.double())}

    def compare(num_rows: int) -> dict[str, Any]:
        x_MK = torch.randn(num_rows, shape.in_features, device=device, generator=generator).to(dtype)
        truth = exact_product(x_MK, weight, bias_N)
        plain = relative_error(F.linear(x_MK, dense_NK, bias_N), truth)
        # 8-bit codes consist of two planes, whose weights are rounded separately.
        record: dict[str, Any] = {"plain_error": plain, "allowed_error": (1.35 if shape.bits == 8 else 1.1) * plain}
        for name in ("triton", "triton-invariant"):
            first, second = (BACKENDS[name].matmul(x_MK, prepared, bias_N, shape) for _ in range(2))
            record[name] = {"error": relative_error(first, truth), "same_bits": torch.equal(first, second)}
        alone = gpu.matmul_invariant(x_MK[-1:], prepared, bias_N, shape)
        together = gpu.matmul_invariant(x_MK, prepared, bias_N, shape)
        return record | {"same_bits_alone": torch.equal(together[-1:], alone)}

    yield {"case": case} | values_or_failure(device, dense_error)
    for num_rows in rows:
        yield {"case": case, "rows": num_rows} | values_or_failure(device, partial(compare, num_rows))
    yield {"case": case, "counters_left": int(prepared[2].count_nonzero())}


def values_or_failure(device: torch.device, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the values of a measurement, or its exception under the key `failure`.

    Raises the exception again if the GPU is lost.
    """
    try:
        return measure()
    except Exception as error:
        if device_is_lost(device):
            raise
        return {"failure": f"{type(error).__name__}: {one_line(error, 200)}"}


def problems_of(record: dict[str, Any]) -> list[str]:
    """Return the problems that a record of `compare_rows` shows, one line each; [] if there are none."""
    case, problems = record["case"], []
    # Both weights are computed in float32 and rounded once, so at most a few elements may differ.
    if not record.get("dense_error", 0) <= 1e-5:
        problems.append(f"{case}: the dense kernel writes a different weight")
    if record.get("counters_left"):
        problems.append(f"{case}: split-K left a counter that is not zero")
    where = f"{case}, {record['rows']} rows" if "rows" in record else f"{case}, dense kernel"
    if "failure" in record:
        return [f"{where}: {record['failure']}"]
    if "rows" not in record:
        return problems
    for name in ("triton", "triton-invariant"):
        error, plain = record[name]["error"], record["plain_error"]
        if not error <= record["allowed_error"]:
            problems.append(f"{where}, {name}: error {error:.2e}, plain torch has {plain:.2e}")
        if not record[name]["same_bits"]:
            problems.append(f"{where}, {name}: two runs differ")
    if not record["same_bits_alone"]:
        problems.append(f"{where}: the bits of triton-invariant differ for a row alone and in a batch")
    return problems


def check_case(shape: LinearShape, dtype: torch.dtype, device: torch.device, rows: tuple[int, ...]) -> list[str]:
    """Return the problems of one linear for these numbers of rows, one line each; [] if it is correct."""
    return [problem for record in compare_rows(shape, dtype, device, rows) for problem in problems_of(record)]


def check_one_hot(shape: LinearShape, device: torch.device) -> list[str]:
    """Return the problems of multiplying one-hot rows, which must give the columns of the weight to the bit."""
    problems = []
    weight = random_weight(shape, device, torch.Generator(device).manual_seed(shape.bits))
    for dtype in (torch.bfloat16, torch.float16):
        prepared = gpu.prepare(weight, dtype, device)
        for rows in torch.eye(shape.in_features, dtype=dtype, device=device).split(100):
            y_MN = gpu.matmul(rows, prepared, None, shape)
            if not torch.equal(y_MN, weight.dequantize(dtype).T[rows.argmax(dim=1)]):
                problems.append(f"one-hot rows, {shape.describe()} {dtype}: not the weight")
    return problems


def check_compiled(device: torch.device, options: dict[str, Any], sizes: tuple[int, int]) -> list[str]:
    """Return the differences between torch.compile (no graph breaks; also with CUDA graphs) and the eager results.

    options: the arguments of torch.compile. sizes: (out_features, in_features).
    """
    shape = LinearShape.of_sizes(*sizes, QuantSpec(symmetric=False))
    weight = random_weight(shape, device, torch.Generator(device).manual_seed(0))
    linear = QuantizedLinear(weight, None, dtype=torch.bfloat16, device=device, backend="triton")
    problems = []
    compiled = torch.compile(linear, fullgraph=True, **options)
    with torch.inference_mode():
        for _ in range(4):
            x = torch.randn(3, sizes[1], device=device, dtype=torch.bfloat16)
            if not torch.equal(compiled(x).clone(), linear(x)):
                problems.append(f"torch.compile with {options}: not the eager result")
    return problems


def check_cuda_graph(device: torch.device) -> dict[str, Any]:
    """Return whether two replays of a captured call with split-K give the bits of an eager call."""
    shape = LinearShape.of_sizes(1024, 4096, QuantSpec(group_size=128, symmetric=False))
    prepared = gpu.prepare(random_weight(shape, device, torch.Generator(device).manual_seed(1)), torch.bfloat16, device)
    x_MK = torch.randn(16, 4096, device=device, dtype=torch.bfloat16)
    gpu.matmul(x_MK, prepared, None, shape)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_MN = gpu.matmul(x_MK, prepared, None, shape)
    equal = []
    for _ in range(2):
        x_MK.normal_()
        graph.replay()
        equal.append(torch.equal(y_MN, gpu.matmul(x_MK, prepared, None, shape)))
    if not all(equal):
        raise RuntimeError("the replays of a CUDA graph differ from eager calls")
    return {"replays_equal": equal}
