"""The quantizer's kernels on the GPU: compared with their PyTorch form, and timed.

A pretended layer with correlated inputs is quantized step by step, once by the kernels and once by PyTorch. Codes may
differ only at ties, so the output errors must agree. The large shape is timed with the kernels alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu.runs import Run, seconds_of
from llmquant.algorithms import statistics as input_statistics
from llmquant.algorithms.coordinate_descent import descend, refit_scales
from llmquant.algorithms.cross_row import OutputHessian
from llmquant.algorithms.gptq import column_order, damped, factor_inverse, gptq_round
from llmquant.algorithms.grid import QuantParams, find_grid, round_to_nearest, values_on_grid
from llmquant.algorithms.statistics import InputStatistics, output_errors
from llmquant.kernels import solver
from llmquant.models.reproducible import has_reproducible_attention, reproducible_attention
from llmquant.spec import QuantSpec

MAX_ERROR_CHANGE = 2e-3
"""Largest relative difference of the output error between the kernels and PyTorch. Ties cause far smaller ones."""


def section_rounding(run: Run) -> None:
    """Compare and time the steps of the solver."""
    small, large = ((48, 16), (48, 16)) if run.rehearse else ((4096, 1024), (14336, 4096))
    run.attempt("solver compared", lambda: compare(run, *small))
    run.attempt("statistics", lambda: time_statistics(run, large[0]))
    run.attempt("solver steps", lambda: {"shape": small} | time_steps(run, *small))
    for rows in (8, 16, 32):
        run.attempt("panel rows", lambda rows=rows: {"rows": rows} | time_panels(run, *small, rows))  # type: ignore[misc]
    run.attempt("solver steps", lambda: {"shape": large} | time_steps(run, *large))
    run.attempt("output Hessians", lambda: time_output_hessians(run, large[0]))
    run.attempt("attention gradients", lambda: time_attention_gradients(run))


def problem(run: Run, in_features: int, out_features: int) -> tuple[Tensor, Tensor, QuantSpec]:
    """Return a weight [K, N], a Hessian [K, K] of correlated inputs, and a grid."""
    generator = torch.Generator(run.device).manual_seed(0)
    draw = partial(torch.randn, device=run.device, generator=generator)
    weight_KN = 0.02 * draw(in_features, out_features)
    factors_RK = draw(64, in_features)
    x_TK = draw(2 * in_features, 64) @ factors_RK * 0.1 + draw(2 * in_features, in_features)
    x_TK *= 1 + 4 * torch.rand(in_features, device=run.device, generator=generator)
    return weight_KN, x_TK.T @ x_TK / len(x_TK), QuantSpec(group_size=32 if run.rehearse else 128, symmetric=False)


@contextmanager
def by_torch() -> Iterator[None]:
    """Let PyTorch do the work of the kernels for the duration of a `with` block."""
    can_run, solver.can_run = solver.can_run, lambda weight: False
    try:
        yield
    finally:
        solver.can_run = can_run


def quantize(weight_KN: Tensor, hessian_KK: Tensor, spec: QuantSpec) -> tuple[Tensor, QuantParams]:
    """Search ranges, round with GPTQ, and improve the codes by coordinate descent."""
    factor = factor_inverse(hessian_KK, column_order(hessian_KK))
    assert factor is not None
    grid = find_grid(weight_KN, hessian_KK.diagonal(), spec, torch.bfloat16)
    q_KN = gptq_round(weight_KN, factor, grid, spec)
    return descend(weight_KN, q_KN, grid, damped(hessian_KK, factor.damping), spec), grid


def compare(run: Run, in_features: int, out_features: int) -> dict[str, Any]:
    """Return how the results of the kernels and of PyTorch differ, and their times."""
    weight_KN, hessian_KK, spec = problem(run, in_features, out_features)
    quantize(weight_KN[:, :16].contiguous(), hessian_KK, spec)
    (ours, grid), (again, _) = (quantize(weight_KN, hessian_KK, spec) for _ in range(2))
    if not torch.equal(ours, again):
        run.log.finding("rounding: two runs of the kernels differ")
    seconds = seconds_of(run, lambda: quantize(weight_KN, hessian_KK, spec))
    with by_torch():
        torch_seconds = seconds_of(run, lambda: quantize(weight_KN, hessian_KK, spec))
        theirs, torch_grid = quantize(weight_KN, hessian_KK, spec)
    errors = [
        output_errors(values_on_grid(q_KN, some, spec) - weight_KN, hessian_KK).sum().item()
        for q_KN, some in ((ours, grid), (theirs, torch_grid))
    ]
    if not abs(errors[0] / errors[1] - 1) < MAX_ERROR_CHANGE:
        run.log.finding(f"rounding: output error {errors[0]:.6g} by the kernels, {errors[1]:.6g} by PyTorch")
    return {
        "codes_differ": (ours != theirs).float().mean().item(),
        "scales_differ": (grid.scale_GN != torch_grid.scale_GN).float().mean().item(),
        "error_ratio": errors[0] / errors[1],
        "seconds": seconds,
        "torch_seconds": torch_seconds,
    }


def milliseconds(run: Run, call: Callable[[], Any]) -> float:
    """Return the milliseconds of the second of two calls."""
    call()
    return round(1e3 * seconds_of(run, call), 3)


def time_steps(run: Run, in_features: int, out_features: int) -> dict[str, float]:
    """Return the milliseconds of each step of the solver, by name."""
    weight_KN, hessian_KK, spec = problem(run, in_features, out_features)
    order_K = column_order(hessian_KK)
    factor = factor_inverse(hessian_KK, order_K)
    assert factor is not None
    grid = find_grid(weight_KN, hessian_KK.diagonal(), spec, torch.bfloat16)
    q_KN = gptq_round(weight_KN, factor, grid, spec)
    steps = {
        "factor_inverse": lambda: factor_inverse(hessian_KK, order_K),
        "find_grid": lambda: find_grid(weight_KN, hessian_KK.diagonal(), spec, torch.bfloat16),
        "gptq_round": lambda: gptq_round(weight_KN, factor, grid, spec),
        "descend": lambda: descend(weight_KN, q_KN, grid, hessian_KK, spec),
        "output_errors": lambda: output_errors(weight_KN, hessian_KK),
        "round_to_nearest": lambda: round_to_nearest(weight_KN.T, spec, torch.bfloat16),
    }
    if in_features <= 4096:
        steps["refit_scales"] = lambda: refit_scales(weight_KN, q_KN, grid, hessian_KK, spec, torch.bfloat16)
    return {name: milliseconds(run, call) for name, call in steps.items()}


def time_panels(run: Run, in_features: int, out_features: int, rows: int) -> dict[str, float]:
    """Return the milliseconds of the column loop with this number of rows in a program, for panels of two widths."""
    weight_KN, hessian_KK, spec = problem(run, in_features, out_features)
    factor = factor_inverse(hessian_KK, column_order(hessian_KK))
    assert factor is not None
    grid = find_grid(weight_KN, None, spec, torch.bfloat16)
    saved = solver.PANEL_ROWS, solver.PANEL_COLUMNS
    times = {}
    try:
        solver.PANEL_ROWS = rows
        for columns in (128, 64):
            solver.PANEL_COLUMNS = columns
            call = partial(gptq_round, weight_KN, factor, grid, spec, columns)
            times[f"{columns} columns"] = milliseconds(run, call)
    finally:
        solver.PANEL_ROWS, solver.PANEL_COLUMNS = saved
    return times


def time_statistics(run: Run, in_features: int) -> dict[str, float]:
    """Return the milliseconds and errors of sums of products, with 16-bit inputs and with float32 inputs."""
    generator = torch.Generator(run.device).manual_seed(0)
    x_TK = torch.randn(2048, in_features, device=run.device, generator=generator).bfloat16()
    exact_KK = x_TK[:, :512].double().T @ x_TK[:, :512].double() / len(x_TK)
    results: dict[str, float] = {"float32 result": input_statistics.sums_in_float32(x_TK)}
    for name, x in (("bfloat16", x_TK), ("float32", x_TK.float())):
        sums = InputStatistics(in_features, run.device)
        results[f"{name} ms"] = milliseconds(run, lambda sums=sums, x=x: sums.add(x))  # type: ignore[misc]
        one = InputStatistics(in_features, run.device)
        one.add(x)
        error = (one.hessian_KK[:512, :512].double() - exact_KK).norm() / exact_KK.norm()
        results[f"{name} error"] = error.item()
    y_TN = torch.randn(2048, 1024, device=run.device, generator=generator)
    exact_KN = x_TK.double().T @ y_TN.double()
    for name, x in (("split", x_TK), ("float32", x_TK.float())):
        product = partial(input_statistics.product_with_float32, x, y_TN)
        results[f"moment {name} ms"] = milliseconds(run, product)
        results[f"moment {name} error"] = ((product().double() - exact_KN).norm() / exact_KN.norm()).item()
    return results


def time_output_hessians(run: Run, out_features: int) -> dict[str, float]:
    """Return the milliseconds of adding gradients to an output Hessian, and of its factors."""
    generator = torch.Generator(run.device).manual_seed(0)
    mixing_NN = torch.randn(64, out_features, device=run.device, generator=generator)
    hessian = OutputHessian(out_features, run.device)
    gradients = [
        torch.randn(512, 64, device=run.device, generator=generator) @ mixing_NN
        + torch.randn(512, out_features, device=run.device, generator=generator)
        for _ in range(4)
    ]

    def add() -> None:
        for number, gradient in enumerate(gradients):
            hessian.add(gradient, number % 2)

    times = {"add": milliseconds(run, add), "factors": milliseconds(run, lambda: hessian.validated_factors(2))}
    return {"out_features": out_features} | times


def time_attention_gradients(run: Run) -> dict[str, Any]:
    """Return the milliseconds of causal attention, forward and backward, on one sequence of the model, with plain
    attention (`reproducible_attention`) and with PyTorch's choice, and whether two runs give the same gradients.
    """
    sizes = run.sizes
    heads, tokens = sizes.num_heads, sizes.seq_len
    num_scores = tokens**2 * heads
    generator = torch.Generator(run.device).manual_seed(0)
    shape = (1, heads, tokens, sizes.hidden_size // heads)
    q, k, v, gradient = (
        torch.randn(shape, device=run.device, generator=generator, dtype=torch.bfloat16).requires_grad_(index < 3)
        for index in range(4)
    )

    def gradients() -> tuple[Tensor, ...]:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return torch.autograd.grad(out, (q, k, v), gradient)

    values: dict[str, Any] = {"tokens": tokens, "heads": heads}
    for name in ("plain", "chosen by PyTorch"):
        used = reproducible_attention(run.device, num_scores) if name == "plain" else nullcontext()
        with used:
            values[f"{name} ms"] = milliseconds(run, gradients)
            same = all(map(torch.equal, gradients(), gradients()))
        values[f"{name} same_bits"] = same
        if name == "plain" and has_reproducible_attention(run.device, num_scores) and not same:
            run.log.finding("rounding: two runs of plain attention have different gradients")
    return values
