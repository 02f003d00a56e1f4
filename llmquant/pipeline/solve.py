"""Quantize the linears of one stage: those that read the same input.

They share a Hessian, its factor, and the share of their corrections, which comes from all of them. Then each is solved
on its own, so that several ranks can divide them (`ranks.py`); solving the rows of all of them in one piece saves
little (CONTRIBUTING.md).

A method is what its name says: `rtn` rounds to nearest on each group's extremes and needs no data; `gptq` rounds a
target with GPTQ on searched grids; `awq` rounds to nearest on searched grids. `awq` and `awq+gptq` get weights whose
channels were scaled before (`smoothing.py`). Whatever was searched has to beat plain RTN of the same weight on the
calibration inputs, row of the weight by row; rows where it does not are RTN's.

Letters: N out_features, K in_features.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmquant.algorithms.affine import (
    Grid,
    count_unfit_groups,
    find_grid,
    round_to_grid,
    round_to_nearest,
    to_quantized_weight,
    values_on_grid,
)
from llmquant.algorithms.feedback import Feedback, round_rows
from llmquant.algorithms.gptq import (
    DAMPING_LADDER,
    InverseFactor,
    column_order,
    damped,
    damping_unit,
    factor_inverse,
    gptq_round,
)
from llmquant.algorithms.refine import descend, refit_scales
from llmquant.algorithms.statistics import InputStatistics, output_errors
from llmquant.algorithms.targets import Evidence, correction, share_of
from llmquant.spec import QuantSpec, Recipe
from llmquant.weight import QuantizedWeight


@dataclass(frozen=True)
class Solved:
    """One linear's result and how good it is."""

    weight: QuantizedWeight
    error: float
    """Squared error of the output against that of the target (the weight, corrected where there is a correction), over
    the calibration inputs, relative to the squared output; for `rtn` without data that of the weights themselves."""
    rtn_error: float
    """The same for plain RTN of the weight as it was before AWQ scaled its input channels."""
    rtn_rows: int | None = None
    """Rows where nothing that was searched beat plain RTN, and that are RTN's; None where nothing was searched."""
    correction_share: float | None = None
    """How much of its target's correction was taken, 0 … 1 (`targets.py`), all of it where there is only one sample;
    None where there was nothing to correct."""
    feedback_left: float | None = None
    """What feedback between its rows leaves of their cost (`feedback.py`); None where there was none."""
    incidents: tuple[str, ...] = ()
    """What fell back, in words."""


@dataclass
class Stored:
    """How a format wants its numbers."""

    scale_dtype: torch.dtype
    min_zero: int = 0


ROWS_AT_ONCE = 16384
"""Rows that are rounded together without data: more than any linear of a block has, a part of a vocabulary."""


def solve_without_data(weight_NK: Tensor, spec: QuantSpec, stored: Stored) -> Solved:
    """Plain RTN; its error is that of the weight itself."""
    pieces, lost, whole = [], 0.0, 0.0
    for some_NK in weight_NK.split(ROWS_AT_ONCE):
        piece = round_to_nearest(some_NK, spec, stored.scale_dtype, stored.min_zero)
        lost += (piece.dequantize() - some_NK.float()).square().sum().item()
        whole += some_NK.float().square().sum().item()
        pieces.append(piece)
    quantized = QuantizedWeight(
        codes_NK=torch.cat([piece.codes_NK for piece in pieces]),
        scale_NG=torch.cat([piece.scale_NG for piece in pieces]),
        zero_NG=torch.cat([piece.zero_NG for piece in pieces]),
        spec=spec,
    )
    error = lost / max(whole, torch.finfo(torch.float32).tiny)
    return Solved(quantized, error, error, incidents=unfit_weights(weight_NK, spec, stored.scale_dtype))


def unfit_weights(weight_NK: Tensor, spec: QuantSpec, scale_dtype: torch.dtype) -> tuple[str, ...]:
    """Incidents of a weight that has groups beyond the range of its scales' dtype; empty if it has none."""
    counts = [0, 0]
    for some_NK in weight_NK.split(ROWS_AT_ONCE):
        for end, count in enumerate(count_unfit_groups(some_NK.float().T, spec, scale_dtype)):
            counts[end] += count
    total = weight_NK.shape[0] * spec.num_groups(weight_NK.shape[1])
    dtype = str(scale_dtype).removeprefix("torch.")
    results = ("rounded coarsely, or to zero", "clipped")
    return tuple(
        f"{count} of {total} groups hold weights too {size} for {dtype} scales: {result}; use --dtype bfloat16 with "
        "--format compressed-tensors, whose scales have no such limits"
        for count, size, result in zip(counts, ("small", "large"), results, strict=True)
        if count
    )


def solve_stage(
    weights: Mapping[str, Tensor],
    specs: Mapping[str, QuantSpec],
    statistics: InputStatistics,
    recipe: Recipe,
    stored: Stored,
    names: Collection[str] | None = None,
    feedback: Mapping[str, Feedback] | None = None,
) -> dict[str, Solved]:
    """Solve linears that read one input.

    weights: [N, K] each, by name, of all that read it. names: those of them that are to be solved here; None: all.
    feedback: between the rows of some of them, where GPTQ rounds them.
    """
    names = weights if names is None else names
    hessian_KK = statistics.hessian_KK
    if not torch.isfinite(hessian_KK).all():
        told = "the Hessian is not finite (inputs too large to be squared): rounded to nearest"
        rounded = {name: solve_without_data(weights[name], specs[name], stored) for name in weights if name in names}
        return {name: replace(result, incidents=(told, *result.incidents)) for name, result in rounded.items()}
    factor = None
    if recipe.compensates:
        order_K = column_order(hessian_KK, recipe.activation_order)
        factor = factor_inverse(hessian_KK, order_K, damping_ladder(recipe), scale_K=statistics.scale_K)
    incidents: list[str] = []
    if factor is None and recipe.compensates:
        incidents.append("the Hessian could not be factored at any damping: rounded to nearest on searched ranges")
    elif factor is not None and factor.damping > recipe.damping:
        incidents.append(f"damping raised to {factor.damping:g} to factor the Hessian")
    changes: dict[str, Tensor] = {}
    evidence: list[Evidence] = []
    if factor is not None:
        for name, weight_NK in weights.items():
            moments_KN = statistics.moments_KN(weight_NK.float().T)
            if any(bool(moment_KN.any()) for moment_KN in moments_KN):
                change_KN, found = correction(factor, moments_KN)
                evidence.append(found)
                if name in names:
                    changes[name] = change_KN
    share = share_of(evidence)
    solved: dict[str, Solved] = {}
    for name in names:
        weight_KN = weights[name].float().T.contiguous()
        corrected = name in changes
        target_KN = weight_KN + share * changes.pop(name) if corrected else weight_KN
        between = (feedback or {}).get(name)
        result = _solve(weight_KN, target_KN, specs[name], statistics, hessian_KK, factor, recipe, stored, between)
        unfit = unfit_weights(weights[name], specs[name], stored.scale_dtype)
        result = replace(result, incidents=(*incidents, *unfit, *result.incidents))
        solved[name] = replace(result, correction_share=share if corrected else None)
    return solved


def _solve(
    weight_KN: Tensor,
    target_KN: Tensor,
    spec: QuantSpec,
    statistics: InputStatistics,
    hessian_KK: Tensor,
    factor: InverseFactor | None,
    recipe: Recipe,
    stored: Stored,
    feedback: Feedback | None,
) -> Solved:
    importance_K = None
    if recipe.range_search == "hessian":
        diagonal_K = hessian_KK.diagonal()
        importance_K = diagonal_K + recipe.damping * damping_unit(diagonal_K, statistics.scale_K)
    elif recipe.range_search == "mse":
        importance_K = torch.ones_like(hessian_KK.diagonal())

    def search(target_KN: Tensor) -> tuple[Tensor, Grid]:
        grid = find_grid(target_KN, importance_K, spec, stored.scale_dtype, stored.min_zero)
        if factor is None:
            return round_to_grid(target_KN, grid, spec), grid
        steps_KN = gptq_round(target_KN, factor, grid, spec)
        for sweep in range(recipe.descent_sweeps):
            damped_KK = damped(hessian_KK, factor.damping, statistics.scale_K)
            if sweep and recipe.refit_scales:
                grid = refit_scales(target_KN, steps_KN, grid, damped_KK, spec, stored.scale_dtype)
            steps_KN = descend(target_KN, steps_KN, grid, damped_KK, spec)
        return steps_KN, grid

    # What rows were rounded to, and judged by: with feedback not only the target, but the errors of other rows too.
    wanted_KN = target_KN
    if feedback is not None and factor is not None:
        steps_KN, grid, wanted_KN = round_rows(target_KN, feedback, spec, search)
    else:
        steps_KN, grid = search(target_KN)

    def errors(steps_KN: Tensor, grid: Grid, wanted_KN: Tensor) -> Tensor:
        return output_errors(values_on_grid(steps_KN, grid, spec) - wanted_KN, hessian_KK)

    def rtn(of_KN: Tensor) -> tuple[Tensor, Grid]:
        grid = find_grid(of_KN, None, spec, stored.scale_dtype, stored.min_zero)
        return round_to_grid(of_KN, grid, spec), grid

    rtn_steps_KN, rtn_grid = rtn(weight_KN)
    error_N, rtn_error_N = errors(steps_KN, grid, wanted_KN), errors(rtn_steps_KN, rtn_grid, wanted_KN)
    worse_N = rtn_error_N < error_N
    if wanted_KN is not target_KN:
        error_N, rtn_error_N = errors(steps_KN, grid, target_KN), errors(rtn_steps_KN, rtn_grid, target_KN)
        if torch.where(worse_N, rtn_error_N, error_N).sum() > rtn_error_N.sum():
            plain = _solve(weight_KN, target_KN, spec, statistics, hessian_KK, factor, recipe, stored, None)
            told = "with feedback between its rows its error was larger than plain rounding's: rounded without"
            return replace(plain, incidents=(told,))
    unscaled_rtn_error_N = rtn_error_N
    if statistics.scale_K is not None:
        # The original's rounding, in the units of the scaled inputs. Where AWQ divided rows too, as what makes the
        # channels of another linear, they stay divided: rounding to nearest takes no notice but in the last bit of
        # the stored scale.
        scale_K1 = statistics.scale_K.to(weight_KN.dtype)[:, None]
        unscaled_KN = values_on_grid(*rtn(weight_KN / scale_K1), spec) * scale_K1
        unscaled_rtn_error_N = output_errors(unscaled_KN - target_KN, hessian_KK)
    grid = Grid(
        torch.where(worse_N, rtn_grid.scale_GN, grid.scale_GN), torch.where(worse_N, rtn_grid.zero_GN, grid.zero_GN)
    )
    steps_KN = torch.where(worse_N, rtn_steps_KN, steps_KN)
    output = output_errors(weight_KN, hessian_KK).sum().clamp(min=torch.finfo(torch.float32).tiny)
    return Solved(
        weight=to_quantized_weight(steps_KN, grid, spec, stored.scale_dtype),
        error=(torch.where(worse_N, rtn_error_N, error_N).sum() / output).item(),
        rtn_error=(unscaled_rtn_error_N.sum() / output).item(),
        rtn_rows=int(worse_N.sum()),
        feedback_left=None if wanted_KN is target_KN or feedback is None else feedback.left,
    )


def damping_ladder(recipe: Recipe) -> tuple[float, ...]:
    """The dampings to try, the recipe's own first."""
    return (recipe.damping, *(step for step in DAMPING_LADDER if step > recipe.damping))
