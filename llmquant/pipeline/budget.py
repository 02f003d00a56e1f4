"""Grids to a budget (`--target-bpw`, `--target-size`): which linears get more bits, and which smaller groups.

Linears that share an input get one grid: engines run them as one. The candidates are 4 and 8 bits in groups of 128, 64
and 32, as far as the format and the engines that were named take them; 3 and 2 bits only where the budget is too small
for 4: mixing them in where it is not costs more than it saves. What a grid costs the model is measured
(`sensitivity.py`), and the best combination is found by dynamic programming (`algorithms/allocation.py`).

What was chosen is kept as a part of the unfinished checkpoint, so that a run that is continued does not choose again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from llmquant.algorithms.allocation import Allocation, Choice, allocate
from llmquant.errors import UserError
from llmquant.pipeline.names import block_of
from llmquant.pipeline.plan import STANDARD_GROUPS, LinearPlan, Plan
from llmquant.pipeline.sensitivity import SharedInput, measure
from llmquant.pipeline.targets import check_targets
from llmquant.spec import QuantSpec

ALLOCATION = "allocation"
"""The part that holds what was chosen: no tensors, a note."""
BITS = ((4, 8), (3, 4, 8), (2, 3, 4, 8))
"""Bits to choose from: the first of these whose smallest grids fit into the budget."""
CURVE_POINTS = 60
"""At most so many points of the trade-off curve are reported, and its end."""


def provisional(plan: Plan) -> Plan:
    """A plan of about the size that the budget will give, as if all weights were equally sensitive; for a dry run, and
    to refuse a budget that cannot be kept before anything is read."""
    grids = _candidates(plan)
    # Which linears share an input is known once they have run; in one block, it is some of those that are as wide.
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
            inputs.append(SharedInput(tuple(linear.name for linear in linears), losses))
    return with_grids(plan, _by_name(inputs, _allocate(plan, inputs)))


def choose(plan: Plan, tokens_SL: Tensor, on_block: Callable[[], None]) -> dict[str, Any]:
    """Measure, and choose: plain values for the journal and the report (`grids_in` reads them back).

    A point is `bits_per_weight`, stored bits of all quantized linears together, and `loss`, the estimated divergence
    from the original of the linears that were chosen for, nats per token.

    target_bits_per_weight   the budget
    chosen                   the point that was taken
    curve                    the least loss at some budgets, cheapest first
    uniform                  a grid and its point, for every grid that all of them could have had
    inputs                   linears that share an input, their grid (`spec`), and the loss on each grid (`losses`)
    """
    grids = _candidates(plan)

    def grids_of(names: Sequence[str]) -> list[QuantSpec]:
        # Linears that overrides have settled keep their grid.
        free = [name for name in names if name in grids]
        return [spec for spec in grids[free[0]] if all(spec in grids[name] for name in free)] if free else []

    inputs = measure(plan, tokens_SL, grids_of, on_block)
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


def grids_in(chosen: Mapping[str, Any]) -> dict[str, QuantSpec]:
    """The grid of every linear, from what `choose` gave."""
    return {name: QuantSpec(**each["spec"]) for each in chosen["inputs"] for name in each["linears"]}


def with_grids(plan: Plan, grids: Mapping[str, QuantSpec]) -> Plan:
    """The plan with these grids by full name; its recipe's own grid is then the one that most weights have."""
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
    """Linears inside the blocks that no override has settled."""
    outside = plan.outside
    return [
        linear for linear in plan.quantized if linear.name not in outside and not plan.recipe.overrides_of(linear.name)
    ]


def _candidates(plan: Plan) -> dict[str, list[QuantSpec]]:
    """The grids of every choosable linear, by full name; UserError where not even the smallest keep the budget."""
    choosable = _choosable(plan)
    budget = _budget_bits(plan)
    least = 0
    for tier in BITS:
        specs = [replace(plan.recipe.spec, bits=bits, group_size=size) for bits in tier for size in STANDARD_GROUPS]
        grids = {linear.name: [spec for spec in specs if _holds(plan, linear, spec)] for linear in choosable}
        taken = [spec for spec in specs if _is_taken(plan, spec, grids)]
        # A linear that none of them fits keeps the grid it has.
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
        f"{_asked(plan)}: the smallest grids that {plan.format.name} and the targets take need {smallest:.3f} bits per "
        f"weight; {remedy}"
    )


def _asked(plan: Plan) -> str:
    if plan.recipe.target_bytes is not None:
        return f"target_size {plan.recipe.target_bytes / 1e6:g}MB"
    return f"target_bpw {plan.recipe.target_bpw:g}"


def _holds(plan: Plan, linear: LinearPlan, spec: QuantSpec) -> bool:
    shape = linear.out_features, linear.in_features
    return linear.in_features % spec.group_size == 0 and plan.format.refuses(spec, *shape, plan.scale_dtype) is None


def _is_taken(plan: Plan, spec: QuantSpec, grids: Mapping[str, Sequence[QuantSpec]]) -> bool:
    """Whether the engines that were named would load a grid, wherever it fits."""
    trial = {name: spec for name, own in grids.items() if spec in own}
    try:
        check_targets(with_grids(plan, trial))
    except UserError:
        return False
    return bool(trial)


def _budget_bits(plan: Plan) -> int:
    """Bits that the choosable linears may take."""
    recipe = plan.recipe
    if recipe.target_bytes is not None:
        kept = plan.output_bytes - sum(plan.packed_bytes(linear) for linear in plan.quantized)
        return 8 * (recipe.target_bytes - kept) - _fixed_bits(plan)
    assert recipe.target_bpw is not None
    return int(recipe.target_bpw * sum(_weights(linear) for linear in plan.quantized)) - _fixed_bits(plan)


def _fixed_bits(plan: Plan, free: set[str] | None = None) -> int:
    """Bits of the quantized linears that are not to be chosen; `free`: names of those that are."""
    names = {linear.name for linear in _choosable(plan)} if free is None else free
    return sum(_bits(plan, linear) for linear in plan.quantized if linear.name not in names)


def _bits(plan: Plan, linear: LinearPlan, spec: QuantSpec | None = None) -> int:
    return 8 * plan.packed_bytes(linear if spec is None else replace(linear, spec=spec))


def _weights(linear: LinearPlan) -> int:
    return linear.out_features * linear.in_features


def _allocate(plan: Plan, inputs: Sequence[SharedInput]) -> Allocation:
    by_name = {linear.name: linear for linear in plan.quantized}
    items = [
        [
            Choice(sum(_bits(plan, by_name[name], spec) for name in each.names), loss)
            for spec, loss in each.losses.items()
        ]
        for each in inputs
    ]
    chosen = {name for each in inputs for name in each.names}
    budget = _budget_bits(plan) + _fixed_bits(plan) - _fixed_bits(plan, chosen)
    result = allocate(items, budget) if items else None
    if result is None:
        raise UserError(
            f"{_asked(plan)}: linears that the calibration text does not reach, or that share an input, need more; "
            f"use a larger target"
        )
    return result


def _by_name(inputs: Sequence[SharedInput], result: Allocation) -> dict[str, QuantSpec]:
    return {
        name: list(each.losses)[index] for each, index in zip(inputs, result.chosen, strict=True) for name in each.names
    }
