"""Options to try next if a verdict is not good, ordered by gain relative to cost.

The order follows the measurements in `eval/README.md`: better rounding at the same size; 4 bits or a larger budget;
zero-points, more samples and smaller groups; a longer search; more bits. Each option is planned with the run's format,
engines and memory limit. An option is left out if its plan is refused or if it changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from llmquant.errors import UserError
from llmquant.estimates.memory import estimate_memory
from llmquant.pipeline.budget import plan_provisionally
from llmquant.pipeline.output import quantization_config
from llmquant.planning.engines import check_engines
from llmquant.planning.linears import STANDARD_GROUPS
from llmquant.planning.plan import Plan, make_plan
from llmquant.spec import EFFORTS, Options, Override, Recipe

MAX_STEPS = 3
"""Largest number of steps that are suggested."""
ENOUGH_SAMPLES = Options().num_samples
"""Number of calibration samples from which on more samples are not suggested."""


@dataclass(frozen=True)
class Step:
    """A change of the command line, and its effect."""

    options: str
    effect: str
    recipe: Recipe
    run: Options


def next_steps(
    plan: Plan, errors: Sequence[tuple[str, float]], num_windows: float = math.inf
) -> tuple[tuple[str, str], ...]:
    """Return at most MAX_STEPS options that should help and that the run would accept, with their effects.

    errors: the kind and the error of each quantized linear. num_windows: available windows of the calibration text.
    """
    steps = (step for step in _steps(plan, errors, num_windows) if _accepted(plan, step))
    return tuple((step.options, step.effect) for step in islice(steps, MAX_STEPS))


def _steps(plan: Plan, errors: Sequence[tuple[str, float]], num_windows: float) -> Iterator[Step]:
    recipe, run, spec = plan.recipe, plan.options, plan.recipe.spec

    def step(options: str, effect: str, run: Options = run, **changes: Any) -> Step:
        return Step(options, effect, replace(recipe, **changes), run)

    if not recipe.uses_gptq:
        method = "awq+gptq" if recipe.uses_awq else "gptq"
        yield step(
            f"--method {method}", "compensates errors on calibration text; the same size, more time", method=method
        )
    elif not recipe.needs_original:
        yield step(
            "--effort default", "corrects errors of earlier blocks; the same size, more time", **_effort("default")
        )
    if recipe.has_budget:
        more = plan.bits_per_weight + 0.5
        yield step(f"--target-bpw {more:.2f}", "half a bit more per weight", target_bpw=more, target_bytes=None)
    elif spec.bits < 4:
        yield step("--bits 4", "a finer grid; a larger result", spec=replace(spec, bits=4))
    if spec.symmetric:
        yield step("--asym", "a zero-point for each group; about 1 % larger", spec=replace(spec, symmetric=False))
    num_samples = int(min(ENOUGH_SAMPLES, num_windows))
    if recipe.needs_data and run.num_samples < num_samples:
        more_samples = replace(run, num_samples=num_samples)
        yield step(f"--samples {num_samples}", "more calibration text; the same size, more time", more_samples)
    if not recipe.has_budget:
        widest = max(linear.quant_spec.effective_group_size(linear.in_features) for linear in plan.quantized)
        smaller = next((size for size in STANDARD_GROUPS if size < widest), None)
        if smaller:
            grid = replace(spec, group_size=smaller)
            yield step(f"--group-size {smaller}", "more scales; up to 7 % larger at 4 bits", spec=grid)
    if recipe.uses_gptq and recipe.descent_sweeps == 0:
        yield step("--effort best", "a longer search for codes; the same size, three times the time", **_effort("best"))
    if recipe.needs_data and not recipe.has_budget and not recipe.overrides:
        more = plan.bits_per_weight + 0.25
        yield step(f"--target-bpw {more:.2f}", "a quarter bit more, on the most sensitive linears", target_bpw=more)
    if not recipe.has_budget and spec.bits < 8:
        for kind in _worst_kinds(errors):
            override = Override(pattern=f"*.{kind.rpartition('.')[2]}", bits=8)
            effect = "8 bits for the linears with the largest error"
            yield step(str(override), effect, overrides=(*recipe.overrides, override))
        yield step("--bits 8", "twice the size", spec=replace(spec, bits=8))


def _effort(name: str) -> dict[str, Any]:
    """Return the values of one effort for all fields that any effort sets, including the defaults that it keeps."""
    names = {key for values in EFFORTS.values() for key in values}
    return {key: EFFORTS[name].get(key, getattr(Recipe(), key)) for key in names}


def _worst_kinds(errors: Sequence[tuple[str, float]]) -> list[str]:
    """Return a list of the one kind of linear with the largest mean error; empty if there are fewer than two kinds."""
    by_kind: dict[str, list[float]] = {}
    for kind, error in errors:
        by_kind.setdefault(kind, []).append(error)
    if len(by_kind) < 2:
        return []
    return [max(by_kind, key=lambda kind: sum(by_kind[kind]) / len(by_kind[kind]))]


def _accepted(plan: Plan, step: Step) -> bool:
    """Whether the run with this change passes the checks of its plan and differs from the present run."""
    try:
        changed = make_plan(plan.path, step.recipe, step.run)
        if step.recipe.has_budget:
            changed = plan_provisionally(changed)
        check_engines(changed)
        quantization_config(changed)
        estimate_memory(changed).check_limit()
    except UserError:
        return False
    if [(linear.name, linear.spec) for linear in changed.linears] != [(one.name, one.spec) for one in plan.linears]:
        return True
    grids = {name: getattr(plan.recipe, name) for name in ("spec", "overrides", "target_bpw", "target_bytes")}
    return replace(step.recipe, **grids) != plan.recipe or step.run != plan.options
