"""Quantize the linears of one input group: those that read the same input.

They share a Hessian, its factor, and the shrinkage of their corrections, which is estimated from all of them. Then each
is quantized on its own, so that several ranks can divide them (`pipeline/distributed.py`). Quantizing all their rows in
one piece would save little (eval/EXPERIMENTS.md).

`rtn` rounds to nearest on the extremes of each group and needs no data. `gptq` rounds a corrected weight with GPTQ on
searched grids. `awq` rounds to nearest on searched grids. For `awq` and `awq+gptq`, `awq_scaling.py` has already scaled
the channels of the weights. A row is rounded with plain RTN (as by `rtn`) if this has a lower error on the calibration
inputs than the search.

Letters: N out_features, K in_features, P rows of a row block.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmquant.algorithms.coordinate_descent import descend, refit_scales
from llmquant.algorithms.cross_row import CrossRowFactors, round_row_blocks
from llmquant.algorithms.error_correction import ShrinkageTerms, fit_correction, shrinkage_of
from llmquant.algorithms.gptq import (
    DAMPING_LADDER,
    InverseFactor,
    column_order,
    damped,
    damping_unit,
    factor_inverse,
    gptq_round,
)
from llmquant.algorithms.grid import (
    QuantParams,
    count_unfit_groups,
    find_grid,
    round_to_grid,
    round_to_nearest,
    to_quantized_weight,
    values_on_grid,
)
from llmquant.algorithms.statistics import InputStatistics, output_errors
from llmquant.humanize import dtype_name
from llmquant.models.finite import all_finite
from llmquant.planning.plan import Plan
from llmquant.spec import QuantSpec, Recipe
from llmquant.weight import QuantizedWeight

ROWS_AT_ONCE = 16384
"""Number of rows that are rounded together without data. Larger weights, such as most heads, are rounded in pieces."""


@dataclass(frozen=True)
class LinearResult:
    """The quantized weight of one linear, its errors, and how it was found."""

    weight: QuantizedWeight
    """Quantized weight."""
    error: float
    """Squared error of the output over the calibration inputs, relative to the squared output. The error is measured
    against the target (the weight with its correction, if any); without data, it is the error of the weight itself."""
    rtn_error: float
    """The same error for plain RTN of the weight as it was before AWQ scaled its input channels."""
    rtn_rows: int | None = None
    """Rows that were rounded with plain RTN because it beat the search; None if there was no search."""
    correction_shrinkage: float | None = None
    """Fraction of the error correction that was added, 0 … 1 (`error_correction.py`); 1 if there is only one sample,
    None if there was nothing to correct."""
    cross_row_cost_ratio: float | None = None
    """Cost with cross-row compensation over the cost without it (`cross_row.py`); None if it was not used."""
    fallbacks: tuple[str, ...] = ()
    """One sentence for each step that fell back to a simpler one."""


@dataclass(frozen=True)
class StorageLimits:
    """Limits of the scales and zero-points that a format can store."""

    scale_dtype: torch.dtype
    """Dtype in which scales are stored."""
    min_zero: int = 0
    """Smallest zero-point that can be stored."""


@dataclass(frozen=True)
class GroupProblem:
    """The rounding problem that the linears of one input group share."""

    statistics: InputStatistics
    """Statistics of their input."""
    hessian_KK: Tensor
    """Mean second moment of their input, float32."""
    factor: InverseFactor | None
    """Factor of the inverse Hessian for GPTQ; None to round to nearest on searched grids."""
    recipe: Recipe
    """Steps of the search."""
    limits: StorageLimits
    """Limits of the format."""

    def column_importance(self) -> Tensor | None:
        """Return the weight of each column's squared error in the range search, float32 [K], or None for no search."""
        diagonal_K = self.hessian_KK.diagonal()
        match self.recipe.range_search:
            case "hessian":
                return diagonal_K + self.recipe.damping * damping_unit(diagonal_K, self.statistics.scale_K)
            case "mse":
                return torch.ones_like(diagonal_K)
        return None


@dataclass(frozen=True)
class RoundedWeight:
    """A weight on its grid."""

    q_KN: Tensor
    """Integer levels, float32."""
    grid: QuantParams
    """Scales and zero-points."""
    spec: QuantSpec
    """Bits, group size and symmetry of the grid."""

    def row_errors(self, target_KN: Tensor, hessian_KK: Tensor) -> Tensor:
        """Return the squared output error of each row against a target, float32 [N]."""
        return output_errors(values_on_grid(self.q_KN, self.grid, self.spec) - target_KN, hessian_KK)

    def with_rows_of(self, other: RoundedWeight, is_other_N: Tensor) -> RoundedWeight:
        """Return this weight with some of its rows, bool [N], taken from another one."""
        grid = QuantParams(
            torch.where(is_other_N, other.grid.scale_GN, self.grid.scale_GN),
            torch.where(is_other_N, other.grid.zero_GN, self.grid.zero_GN),
        )
        return RoundedWeight(torch.where(is_other_N, other.q_KN, self.q_KN), grid, self.spec)


@dataclass(frozen=True)
class RowChoice:
    """The rows on which plain RTN beats the search, and the output errors against the target."""

    is_rtn_N: Tensor
    """Whether plain RTN has the smaller error on a row, bool."""
    error: Tensor
    """Squared output error of the better rows, a scalar."""
    rtn_error: Tensor
    """Squared output error if plain RTN rounds all rows, a scalar."""


def storage_limits(plan: Plan) -> StorageLimits:
    """Return the limits of a plan's format."""
    return StorageLimits(plan.scale_dtype, plan.format.min_zero)


# --- without data ----------------------------------------------------------------------------------------------------


def round_without_data(weight_NK: Tensor, spec: QuantSpec, limits: StorageLimits) -> LinearResult:
    """Round a weight [N, K] with plain RTN; the error of the result is the relative squared error of the weight."""
    pieces, lost, whole = [], 0.0, 0.0
    for some_NK in weight_NK.split(ROWS_AT_ONCE):
        piece = round_to_nearest(some_NK, spec, limits.scale_dtype, limits.min_zero)
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
    return LinearResult(quantized, error, error, fallbacks=scale_range_fallbacks(weight_NK, spec, limits.scale_dtype))


def scale_range_fallbacks(weight_NK: Tensor, spec: QuantSpec, scale_dtype: torch.dtype) -> tuple[str, ...]:
    """Return one sentence if groups of a weight are too small for scale_dtype, and one if groups are too large."""
    counts = [0, 0]
    for some_NK in weight_NK.split(ROWS_AT_ONCE):
        for end, count in enumerate(count_unfit_groups(some_NK.float().T, spec, scale_dtype)):
            counts[end] += count
    total = weight_NK.shape[0] * spec.num_groups(weight_NK.shape[1])
    dtype = dtype_name(scale_dtype)
    results = ("rounded coarsely, or to zero", "clipped")
    return tuple(
        f"{count} of {total} groups hold weights too {size} for {dtype} scales: {result}; use --dtype bfloat16 with "
        "--format compressed-tensors, whose scales have no such limits"
        for count, size, result in zip(counts, ("small", "large"), results, strict=True)
        if count
    )


# --- an input group --------------------------------------------------------------------------------------------------


def quantize_linears(
    weights: Mapping[str, Tensor],
    specs: Mapping[str, QuantSpec],
    statistics: InputStatistics,
    recipe: Recipe,
    limits: StorageLimits,
    names: Collection[str] | None = None,
    cross_row: Mapping[str, CrossRowFactors] | None = None,
) -> dict[str, LinearResult]:
    """Quantize linears that read one input; return their results by name.

    weights: weight [N, K] of every linear of the input group, by name. specs: their grids. names: the linears to
    quantize here; None quantizes all. cross_row: factors of the linears whose rows compensate for each other's errors,
    if GPTQ rounds them.
    """
    names = weights if names is None else names
    hessian_KK = statistics.hessian_KK
    if not torch.isfinite(hessian_KK).all():
        fallback = "the Hessian is not finite (inputs too large to be squared): rounded to nearest"
        rounded = {name: round_without_data(weights[name], specs[name], limits) for name in weights if name in names}
        return {name: _with_fallbacks(result, [fallback]) for name, result in rounded.items()}
    factor, fallbacks = factor_hessian(hessian_KK, statistics, recipe)
    problem = GroupProblem(statistics, hessian_KK, factor, recipe, limits)
    corrections, shrinkage = fit_corrections(weights, problem, names)
    results: dict[str, LinearResult] = {}
    for name in names:
        weight_KN = weights[name].float().T.contiguous()
        is_corrected = name in corrections
        target_KN = weight_KN + shrinkage * corrections.pop(name) if is_corrected else weight_KN
        if is_corrected and not all_finite(target_KN):
            is_corrected, target_KN = False, weight_KN
            fallbacks = [*fallbacks, "the error correction is not finite: left out"]
        result = quantize_linear(weight_KN, target_KN, specs[name], problem, (cross_row or {}).get(name))
        too_small_or_large = scale_range_fallbacks(weights[name], specs[name], limits.scale_dtype)
        result = _with_fallbacks(result, [*fallbacks, *too_small_or_large])
        results[name] = replace(result, correction_shrinkage=shrinkage if is_corrected else None)
    return results


def factor_hessian(
    hessian_KK: Tensor, statistics: InputStatistics, recipe: Recipe
) -> tuple[InverseFactor | None, list[str]]:
    """Factor the inverse Hessian if the recipe uses GPTQ; return the factor and the fallbacks."""
    if not recipe.uses_gptq:
        return None, []
    order_K = column_order(hessian_KK, recipe.activation_order)
    factor = factor_inverse(hessian_KK, order_K, dampings_to_try(recipe), scale_K=statistics.scale_K)
    if factor is None:
        return None, ["the Hessian could not be factored at any damping: rounded to nearest on searched ranges"]
    if factor.damping > recipe.damping:
        return factor, [f"damping raised to {factor.damping:g} to factor the Hessian"]
    return factor, []


def dampings_to_try(recipe: Recipe) -> tuple[float, ...]:
    """Return the recipe's damping, and the larger ones of DAMPING_LADDER in case it is too small."""
    return (recipe.damping, *(damping for damping in DAMPING_LADDER if damping > recipe.damping))


def fit_corrections(
    weights: Mapping[str, Tensor], problem: GroupProblem, names: Collection[str]
) -> tuple[dict[str, Tensor], float]:
    """Fit the error corrections of an input group's linears.

    Returns the corrections, float32 [K, N], of the linears that are in names, and the shrinkage factor, which is
    estimated from all of the linears.
    """
    corrections: dict[str, Tensor] = {}
    terms: list[ShrinkageTerms] = []
    if problem.factor is not None:
        for name, weight_NK in weights.items():
            moments_KN = problem.statistics.moments_KN(weight_NK.float().T)
            if any(bool(moment_KN.any()) for moment_KN in moments_KN):
                correction_KN, own_terms = fit_correction(problem.factor, moments_KN)
                terms.append(own_terms)
                if name in names:
                    corrections[name] = correction_KN
    return corrections, shrinkage_of(terms)


def _with_fallbacks(result: LinearResult, fallbacks: Iterable[str]) -> LinearResult:
    """Put fallbacks in front of a result's own fallbacks."""
    return replace(result, fallbacks=(*fallbacks, *result.fallbacks))


# --- one linear ------------------------------------------------------------------------------------------------------


def quantize_linear(
    weight_KN: Tensor, target_KN: Tensor, spec: QuantSpec, problem: GroupProblem, cross_row: CrossRowFactors | None
) -> LinearResult:
    """Search codes for the target of one linear; a row on which plain RTN has a lower error is rounded with plain RTN.

    weight_KN, target_KN: the weight without and with its correction, float32. cross_row: used only with GPTQ; if the
    result is worse than plain RTN of all rows, the linear is rounded again without it.
    """
    if problem.factor is None:
        cross_row = None
    fallbacks: tuple[str, ...] = ()
    if cross_row is None:
        searched = search_codes(target_KN, spec, problem)
        rtn = round_with_plain_rtn(weight_KN, spec, problem.limits)
        choice = choose_rows(searched, rtn, target_KN, target_KN, problem)
    else:
        searched, rounding_target_KN = search_compensated_codes(target_KN, spec, problem, cross_row)
        rtn = round_with_plain_rtn(weight_KN, spec, problem.limits)
        choice = choose_rows(searched, rtn, target_KN, rounding_target_KN, problem)
        if choice.error > choice.rtn_error:
            cross_row = None
            fallbacks = ("cross-row compensation left a larger error than plain RTN: rounded without it",)
            searched = search_codes(target_KN, spec, problem)
            choice = choose_rows(searched, rtn, target_KN, target_KN, problem)
    rtn_error = choice.rtn_error
    if problem.statistics.scale_K is not None:
        rtn_error = unscaled_rtn_error(weight_KN, target_KN, spec, problem)
    rounded = searched.with_rows_of(rtn, choice.is_rtn_N)
    del searched, rtn
    output = output_errors(weight_KN, problem.hessian_KK).sum().clamp(min=torch.finfo(torch.float32).tiny)
    return LinearResult(
        weight=to_quantized_weight(rounded.q_KN, rounded.grid, spec, problem.limits.scale_dtype),
        error=(choice.error / output).item(),
        rtn_error=(rtn_error / output).item(),
        rtn_rows=int(choice.is_rtn_N.sum()),
        cross_row_cost_ratio=None if cross_row is None else cross_row.cost_ratio,
        fallbacks=fallbacks,
    )


def search_codes(target_KN: Tensor, spec: QuantSpec, problem: GroupProblem) -> RoundedWeight:
    """Choose grid and codes for a target: range search, then GPTQ and coordinate descent if there is a factor."""
    limits, recipe, factor = problem.limits, problem.recipe, problem.factor
    grid = find_grid(target_KN, problem.column_importance(), spec, limits.scale_dtype, limits.min_zero)
    if factor is None:
        return RoundedWeight(round_to_grid(target_KN, grid, spec), grid, spec)
    q_KN = gptq_round(target_KN, factor, grid, spec)
    if recipe.descent_sweeps:
        damped_KK = damped(problem.hessian_KK, factor.damping, problem.statistics.scale_K)
        for sweep in range(recipe.descent_sweeps):
            if sweep and recipe.refit_scales:
                grid = refit_scales(target_KN, q_KN, grid, damped_KK, spec, limits.scale_dtype)
            q_KN = descend(target_KN, q_KN, grid, damped_KK, spec)
    return RoundedWeight(q_KN, grid, spec)


def search_compensated_codes(
    target_KN: Tensor, spec: QuantSpec, problem: GroupProblem, cross_row: CrossRowFactors
) -> tuple[RoundedWeight, Tensor]:
    """Choose grid and codes with cross-row compensation.

    Also returns the values that were rounded, [K, N]: the target, compensated for the errors of earlier rows.
    """

    def search(target_KP: Tensor) -> tuple[Tensor, QuantParams]:
        rounded = search_codes(target_KP, spec, problem)
        return rounded.q_KN, rounded.grid

    q_KN, grid, rounding_target_KN = round_row_blocks(target_KN, cross_row, spec, search)
    return RoundedWeight(q_KN, grid, spec), rounding_target_KN


def round_with_plain_rtn(weight_KN: Tensor, spec: QuantSpec, limits: StorageLimits) -> RoundedWeight:
    """Round to nearest on the extremes of each group (plain RTN)."""
    grid = find_grid(weight_KN, None, spec, limits.scale_dtype, limits.min_zero)
    return RoundedWeight(round_to_grid(weight_KN, grid, spec), grid, spec)


def choose_rows(
    searched: RoundedWeight, rtn: RoundedWeight, target_KN: Tensor, rounding_target_KN: Tensor, problem: GroupProblem
) -> RowChoice:
    """Find the rows on which plain RTN beats the search, and the output errors of the better rows and of plain RTN.

    Rows are compared by their errors against the values that were rounded (rounding_target_KN), which may compensate
    for the errors of other rows. The returned errors are against the target.
    """
    hessian_KK = problem.hessian_KK
    error_N = searched.row_errors(rounding_target_KN, hessian_KK)
    rtn_error_N = rtn.row_errors(rounding_target_KN, hessian_KK)
    is_rtn_N = rtn_error_N < error_N
    if rounding_target_KN is not target_KN:
        error_N, rtn_error_N = searched.row_errors(target_KN, hessian_KK), rtn.row_errors(target_KN, hessian_KK)
    return RowChoice(is_rtn_N, torch.where(is_rtn_N, rtn_error_N, error_N).sum(), rtn_error_N.sum())


def unscaled_rtn_error(weight_KN: Tensor, target_KN: Tensor, spec: QuantSpec, problem: GroupProblem) -> Tensor:
    """Return the squared output error of plain RTN of the weight as it was before AWQ scaled it, a scalar.

    The rounded values are multiplied by the scale, since the target and the Hessian belong to the scaled inputs. Rows
    that AWQ divided, because they make the channels of another linear, stay divided: this changes rounding to nearest
    only in the last bit of the stored scale.
    """
    assert problem.statistics.scale_K is not None
    scale_K1 = problem.statistics.scale_K.to(weight_KN.dtype)[:, None]
    rtn = round_with_plain_rtn(weight_KN / scale_K1, spec, problem.limits)
    values_KN = values_on_grid(rtn.q_KN, rtn.grid, spec) * scale_K1
    return output_errors(values_KN - target_KN, problem.hessian_KK).sum()
