"""Mixed precision: the choice of each linear's grid within a size budget (`--target-bpw`, `--target-size`).

A grid is the bits, the group size and the symmetry of a linear. Linears that share an input get the same grid, because
engines fuse them. The candidates have 4 or 8 bits and groups of 128, 64 or 32, if the format and the requested engines
support them. 3 and 2 bits become candidates only if the budget is too small for 4 bits, because mixing them into a
larger budget costs more than it saves. The loss of each grid is measured (`sensitivity.py`), and the best combination
is found by dynamic programming (`algorithms/allocation.py`).

The choice is stored as a part of the unfinished checkpoint, so that a continued run does not choose again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from llmquant.algorithms.allocation import Allocation, GridOption, allocate
from llmquant.errors import UserError
from llmquant.module_names import block_of
from llmquant.planning.engines import check_engines
from llmquant.planning.linears import STANDARD_GROUPS, LinearPlan
from llmquant.planning.plan import Plan
from llmquant.solver.sensitivity import InputGroupLosses, measure_sensitivities
from llmquant.spec import QuantSpec

ALLOCATION = "allocation"
"""Name of the part of the unfinished checkpoint that holds the choice. The part has a note and no tensors."""
CANDIDATE_BITS = ((4, 8), (3, 4, 8), (2, 3, 4, 8))
"""Sets of candidate bits. The first set whose smallest grids fit into the budget is used."""
CURVE_POINTS = 60
"""Largest number of points of the trade-off curve that are reported, besides its last point."""


def plan_provisionally(plan: Plan) -> Plan:
    """Return a plan of about the final size, with grids chosen as if all weights were equally sensitive.

    Dry runs show this plan. Raises UserError for an impossible budget, before any weight is read.
    """
    grids = _candidates(plan)
    # Only a forward pass shows shared inputs. Linears of a block with equal in_features are assumed to share one.
    together: dict[tuple[int | None, int], list[LinearPlan]] = {}
    for linear in _choosable(plan):
        if linear.name in grids:
            together.setdefault((block_of(linear.name), linear.in_features), []).append(linear)
    inputs = []
    for linears in together.values():
        outputs = sum(linear.out_features for linear in linears)
        common = [spec for spec in grids[linears[0].name] if all(spec in grids[linear.name] for linear in linears)]
        losses = {spec: outputs * 0.25**spec.bits * spec.group_size**0.1 for spec in common}
        if losses:
            inputs.append(InputGroupLosses(tuple(linear.name for linear in linears), losses))
    return with_grids(plan, _by_name(inputs, _allocate(plan, inputs)))


def choose_allocation(plan: Plan, tokens_SL: Tensor, on_block: Callable[[], None]) -> dict[str, Any]:
    """Measure sensitivities and choose grids. Returns plain values for the journal and the report.

    `grids_of_allocation` reads the result. A point holds `bits_per_weight`, the stored bits per weight of all quantized
    linears, and `loss`, the estimated divergence in nats per token that the linears with a choice of grids cause.

    target_bits_per_weight   the budget
    chosen                   the chosen point
    curve                    the points with the least loss at several budgets, smallest budget first
    uniform                  each grid that all linears could share, with its point
    inputs                   for each shared input, its `linears`, their grid (`spec`), and each grid's loss (`losses`)
    """
    grids = _candidates(plan)

    def grids_of(names: Sequence[str]) -> list[QuantSpec]:
        # Linears without candidates, such as those that an override matches, keep their grid.
        free = [name for name in names if name in grids]
        return [spec for spec in grids[free[0]] if all(spec in grids[name] for name in free)] if free else []

    inputs = measure_sensitivities(plan, tokens_SL, grids_of, on_block)
    result = _allocate(plan, inputs)
    by_name = {linear.name: linear for linear in plan.quantized}
    weights = sum(_weights(linear) for linear in plan.quantized)
    fixed = _fixed_bits(plan, {name for each in inputs for name in each.names})

    def point(bits: int, loss: float) -> dict[str, float]:
        return {"bits_per_weight": (fixed + bits) / weights, "loss": loss}

    step = -(-len(result.curve) // CURVE_POINTS)
    common = [spec for spec in inputs[0].losses if all(spec in each.losses for each in inputs)]
    uniform = [
        asdict(spec)
        | point(
            sum(_bits(plan, by_name[name], spec) for each in inputs for name in each.names),
            sum(each.losses[spec] for each in inputs),
        )
        for spec in common
    ]
    chosen = [list(each.losses)[index] for each, index in zip(inputs, result.chosen, strict=True)]
    return {
        "target_bits_per_weight": (_budget_bits(plan) + _fixed_bits(plan)) / weights,
        "chosen": point(result.cost, result.loss),
        "curve": [point(*each) for each in (*result.curve[:-1:step], result.curve[-1])],
        "uniform": uniform,
        "inputs": [
            {
                "linears": list(each.names),
                "spec": asdict(spec),
                "losses": [asdict(other) | {"loss": loss} for other, loss in each.losses.items()],
            }
            for each, spec in zip(inputs, chosen, strict=True)
        ],
    }


def grids_of_allocation(chosen: Mapping[str, Any]) -> dict[str, QuantSpec]:
    """Return the grid of every linear by full name, from the result of `choose_allocation`."""
    return {name: QuantSpec(**each["spec"]) for each in chosen["inputs"] for name in each["linears"]}


def with_grids(plan: Plan, grids: Mapping[str, QuantSpec]) -> Plan:
    """Return a copy of the plan with other grids, by full name. The recipe gets the grid that most weights have."""
    linears = tuple(
        replace(linear, spec=grids[linear.name], reason="") if linear.name in grids else linear
        for linear in plan.linears
    )
    weights: Counter[QuantSpec] = Counter()
    for linear in linears:
        if linear.spec is not None:
            weights[linear.spec] += _weights(linear)
    return replace(plan, linears=linears, recipe=replace(plan.recipe, spec=weights.most_common(1)[0][0]))


def _choosable(plan: Plan) -> list[LinearPlan]:
    """Return the linears whose grids the budget decides: those inside the blocks that no override matches."""
    outside = plan.quantized_outside_blocks
    return [
        linear for linear in plan.quantized if linear.name not in outside and not plan.recipe.overrides_of(linear.name)
    ]


def _candidates(plan: Plan) -> dict[str, list[QuantSpec]]:
    """Return the candidate grids of every choosable linear, by full name. Raises UserError if none fit the budget."""
    choosable = _choosable(plan)
    budget = _budget_bits(plan)
    least = 0
    for tier in CANDIDATE_BITS:
        specs = [replace(plan.recipe.spec, bits=bits, group_size=size) for bits in tier for size in STANDARD_GROUPS]
        grids = {linear.name: [spec for spec in specs if _fits(plan, linear, spec)] for linear in choosable}
        taken = [spec for spec in specs if _is_loaded_by_engines(plan, spec, grids)]
        # A linear that fits none of the candidates keeps its grid.
        grids = {name: fitting for name, own in grids.items() if (fitting := [s for s in own if s in taken])}
        least = sum(
            min((_bits(plan, linear, spec) for spec in grids.get(linear.name, ())), default=_bits(plan, linear))
            for linear in choosable
        )
        if grids and least <= budget:
            return grids
    weights = sum(_weights(linear) for linear in plan.quantized)
    smallest = (least + _fixed_bits(plan)) / weights
    remedy = f"use --target-bpw {smallest + 0.005:.2f} or more"
    if plan.recipe.target_bytes is not None:
        others = plan.output_bytes - sum(plan.packed_bytes(linear) for linear in plan.quantized)
        smallest_bytes = others + (least + _fixed_bits(plan)) // 8
        remedy = f"use --target-size {smallest_bytes / 1e6 + 0.005:.2f}MB or more"
    raise UserError(
        f"{_requested(plan)}: the smallest grids that {plan.format.name} and the engines support need {smallest:.3f} "
        f"bits per weight; {remedy}"
    )


def _requested(plan: Plan) -> str:
    if plan.recipe.target_bytes is not None:
        return f"target_size {plan.recipe.target_bytes / 1e6:g}MB"
    return f"target_bpw {plan.recipe.target_bpw:g}"


def _fits(plan: Plan, linear: LinearPlan, spec: QuantSpec) -> bool:
    shape = linear.out_features, linear.in_features
    return linear.in_features % spec.group_size == 0 and plan.format.refuses(spec, *shape, plan.scale_dtype) is None


def _is_loaded_by_engines(plan: Plan, spec: QuantSpec, grids: Mapping[str, Sequence[QuantSpec]]) -> bool:
    """Whether the requested engines load a grid on all linears that can have it."""
    trial = {name: spec for name, own in grids.items() if spec in own}
    try:
        check_engines(with_grids(plan, trial))
    except UserError:
        return False
    return bool(trial)


def _budget_bits(plan: Plan) -> int:
    """Return the stored bits that the choosable linears may take together."""
    recipe = plan.recipe
    if recipe.target_bytes is not None:
        kept = plan.output_bytes - sum(plan.packed_bytes(linear) for linear in plan.quantized)
        return 8 * (recipe.target_bytes - kept) - _fixed_bits(plan)
    assert recipe.target_bpw is not None
    return int(recipe.target_bpw * sum(_weights(linear) for linear in plan.quantized)) - _fixed_bits(plan)


def _fixed_bits(plan: Plan, free: set[str] | None = None) -> int:
    """Return the stored bits of the quantized linears except `free`, or except the choosable ones if it is None."""
    names = {linear.name for linear in _choosable(plan)} if free is None else free
    return sum(_bits(plan, linear) for linear in plan.quantized if linear.name not in names)


def _bits(plan: Plan, linear: LinearPlan, spec: QuantSpec | None = None) -> int:
    return 8 * plan.packed_bytes(linear if spec is None else replace(linear, spec=spec))


def _weights(linear: LinearPlan) -> int:
    return linear.out_features * linear.in_features


def _allocate(plan: Plan, inputs: Sequence[InputGroupLosses]) -> Allocation:
    by_name = {linear.name: linear for linear in plan.quantized}
    items = [
        [
            GridOption(sum(_bits(plan, by_name[name], spec) for name in each.names), loss)
            for spec, loss in each.losses.items()
        ]
        for each in inputs
    ]
    chosen = {name for each in inputs for name in each.names}
    budget = _budget_bits(plan) + _fixed_bits(plan) - _fixed_bits(plan, chosen)
    result = allocate(items, budget) if items else None
    if result is None:
        raise UserError(
            f"{_requested(plan)}: the linears that the calibration text does not reach, or that share an input, cannot "
            "be made small enough; use a larger target"
        )
    return result


def _by_name(inputs: Sequence[InputGroupLosses], result: Allocation) -> dict[str, QuantSpec]:
    return {
        name: list(each.losses)[index] for each, index in zip(inputs, result.chosen, strict=True) for name in each.names
    }
