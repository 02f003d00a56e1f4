"""Whether the engines that are to serve the result will take it: rules as data, checked before any work.

The rules are those of one version of each engine, as they stood at `RULES_DATE`. They say what an engine loads and has
kernels for on an NVIDIA GPU, not what is fastest there. A refusal names the linear, the rule and the remedy.

Letters: N out_features, K in_features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from llmquant.errors import UserError
from llmquant.formats.fused import fused_sets
from llmquant.spec import QuantSpec

if TYPE_CHECKING:
    from llmquant.pipeline.plan import LinearPlan, Plan

RULES_DATE = "2026-11"

MARLIN_GROUPS = (-1, 32, 64, 128)
BITS_4, BITS_4_8 = ((4, True), (4, False)), ((4, True), (8, True))
"""(bits, symmetric) pairs."""
ANY_GRID = tuple((bits, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False))


@dataclass(frozen=True, kw_only=True)
class FormatRules:
    """What an engine asks of a checkpoint in one format."""

    grids: tuple[tuple[int, bool], ...]
    """(bits, symmetric) that it loads."""
    group_sizes: tuple[int, ...] | None = MARLIN_GROUPS
    """Group sizes it has kernels for; None for any."""
    multiples: Mapping[int, tuple[int, int]] | None = None
    """Bits -> what N and K must be multiples of; None for no more than the format itself asks."""
    one_grid: bool = False
    """It reads no exceptions: every linear of the decoder blocks must have the same grid."""
    quantized_head: bool = False
    """It loads a quantized head."""
    needs: str = ""
    """Packages that have to be installed beside it."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """One version of an engine."""

    name: str
    formats: Mapping[str, FormatRules]
    """What it loads; a format that is not here it does not load."""
    fuses: bool
    """Linears of one fused set (`formats.fused`) run as one, so they need one grid."""
    splits: bool
    """It can split a model over several GPUs by tensor parallelism."""
    rounds_float32: bool = False
    """It computes in 16 bit, so float32 scales would be rounded once more."""


# Marlin's tiles are 64 outputs by 128 inputs. In 4 bits Triton's W4A16 kernel takes what Marlin refuses.
TRITON_OR_MARLIN = {4: (8, 32), 8: (64, 128)}
MARLIN = {4: (64, 128), 8: (64, 128)}

TARGETS: dict[str, Target] = {
    "vllm": Target(
        name="vLLM 0.33",
        formats={
            "gptq": FormatRules(grids=BITS_4_8, multiples=TRITON_OR_MARLIN, quantized_head=True),
            "awq": FormatRules(grids=BITS_4, multiples=TRITON_OR_MARLIN),
            "compressed-tensors": FormatRules(grids=(*BITS_4, (8, True)), multiples=TRITON_OR_MARLIN),
        },
        fuses=True,
        splits=True,
        rounds_float32=True,
    ),
    "sglang": Target(
        name="SGLang 0.5.23",
        formats={
            "gptq": FormatRules(grids=BITS_4_8, multiples=MARLIN, quantized_head=True),
            "awq": FormatRules(grids=BITS_4),
            "compressed-tensors": FormatRules(grids=(*BITS_4, (8, True), (8, False)), multiples={4: (1, 8), 8: (1, 4)}),
        },
        fuses=True,
        splits=True,
        rounds_float32=True,
    ),
    "transformers": Target(
        name="transformers 5.23",
        formats={
            "gptq": FormatRules(grids=ANY_GRID, group_sizes=None, one_grid=True, needs="optimum and gptqmodel"),
            "awq": FormatRules(grids=BITS_4, group_sizes=None, needs="gptqmodel"),
            "compressed-tensors": FormatRules(
                grids=ANY_GRID, group_sizes=None, quantized_head=True, needs="compressed-tensors"
            ),
        },
        fuses=False,
        splits=False,
    ),
}
"""Engines by the value of `--target`."""

ROW_PARALLEL = ("o_proj", "down_proj", "out_proj", "fc2", "dense", "dense_4h_to_h", "c_proj")
"""Linears whose inputs are split over the ranks, in models whose transformers class has no plan that says so."""


def check_targets(plan: Plan) -> None:
    """UserError unless every engine that was named will load what the plan makes."""
    options = plan.options
    for name in options.targets:
        if name not in TARGETS:
            raise UserError(f"target '{name}': not one of {', '.join(TARGETS)}; use --target vllm")
    if options.tensor_parallel < 1:
        raise UserError(f"tensor_parallel {options.tensor_parallel}: must be at least 1; use --tensor-parallel 1")
    targets = [TARGETS[name] for name in options.targets]
    if options.tensor_parallel > 1 and not any(target.splits for target in targets):
        engines = " or ".join(f"--target {name}" for name, target in TARGETS.items() if target.splits)
        raise UserError(f"tensor_parallel {options.tensor_parallel}: no target that splits a model; add {engines}")
    for target in targets:
        refusals = list(_refusals(plan, target))
        if refusals:
            where, why = refusals[0]
            more = f" (and {len(refusals) - 1} more)" if len(refusals) > 1 else ""
            raise UserError(f"{where}{more}: {target.name} {why} (rules of {RULES_DATE})")


def needs_of(plan: Plan) -> list[str]:
    """What to install beside the engines that were named, one line each."""
    named = [TARGETS[name] for name in plan.options.targets]
    return [
        f"{target.name} needs {rules.needs} for this format"
        for target in named
        if (rules := target.formats[plan.format.name]).needs
    ]


def _refusals(plan: Plan, target: Target) -> Iterator[tuple[str, str]]:
    """(linear, what the engine has against it and the remedy), all of them."""
    rules = target.formats.get(plan.format.name)
    if rules is None:
        yield (
            f"format {plan.format.name}",
            f"loads {', '.join(target.formats)}; use --format {next(iter(target.formats))}",
        )
        return
    if target.rounds_float32 and plan.scale_dtype == torch.float32:
        yield "dtype float32", "computes in 16 bit and would round the scales once more; use --dtype bfloat16"
    outputs, outside = _outputs(plan, target), plan.outside
    for linear in plan.quantized:
        refusals = {
            name: _grid_refusal(each, linear, name, linear.name in outside, outputs[linear.name])
            for name, each in target.formats.items()
        }
        if refusal := refusals[plan.format.name]:
            rule, remedy = refusal
            # compressed-tensors holds every grid, so it is what to try where its rules have nothing against the linear.
            other = "--format compressed-tensors, or " if refusals["compressed-tensors"] is None else ""
            yield linear.name, f"{rule}; use {other}{remedy}"
    if rules.one_grid:
        yield from _exceptions(plan)
    if target.fuses:
        yield from _split_sets(plan)
    if target.splits and plan.options.tensor_parallel > 1:
        yield from _straddling(plan)


def _outputs(plan: Plan, target: Target) -> dict[str, int]:
    """N of every quantized linear as the engine sees it: that of the whole fused set where it fuses."""
    outputs = {linear.name: linear.out_features for linear in plan.quantized}
    for parts in fused_sets(outputs).values() if target.fuses else ():
        outputs |= dict.fromkeys(parts, sum(outputs[part] for part in parts))
    return outputs


def _grid_refusal(
    rules: FormatRules, linear: LinearPlan, format: str, is_head: bool, outputs: int
) -> tuple[str, str] | None:
    """The rule that a linear breaks in a format, and the remedy. outputs: N, together with what it is fused with."""
    spec, skip = linear.grid, f"--skip '*{linear.kind}'"
    if is_head and not rules.quantized_head:
        return f"loads no quantized head in {format}", f"--skip '{linear.name}'"
    if (spec.bits, spec.symmetric) not in rules.grids:
        known = ", ".join(f"{bits}-bit {'sym' if symmetric else 'asym'}" for bits, symmetric in rules.grids)
        return f"loads {format} with {known}, and this is {spec.describe()}", f"--bits 4 --sym, or {skip}"
    if rules.group_sizes is not None and spec.group_size not in rules.group_sizes:
        sizes = ", ".join(map(str, rules.group_sizes))
        return f"has kernels for group sizes {sizes}, and this is {spec.describe()}", f"--group-size 64, or {skip}"
    for name, size, multiple in zip(
        ("out_features", "in_features"),
        (outputs, linear.in_features),
        (rules.multiples or {}).get(spec.bits, (1, 1)),
        strict=True,
    ):
        if size % multiple:
            return f"needs {name} a multiple of {multiple} in {spec.bits}-bit {format}, and it is {size}", skip
    return None


def _exceptions(plan: Plan) -> Iterator[tuple[str, str]]:
    """Linears of the decoder blocks that do not have the grid of most."""
    blocks = tuple(f"{name}." for name in plan.block_names)
    ((default, _),) = Counter(linear.grid for linear in plan.quantized).most_common(1)
    for linear in plan.linears:
        if linear.name.startswith(blocks) and linear.spec != default:
            yield (
                linear.name,
                f"reads no exceptions in {plan.format.name}, and this is {_describe(linear.spec)} beside "
                f"{default.describe()}; use --format compressed-tensors, or give all linears one grid",
            )


def _split_sets(plan: Plan) -> Iterator[tuple[str, str]]:
    """Linears of one fused set with different grids."""
    specs = {linear.name: linear.spec for linear in plan.linears}
    for fused, parts in fused_sets(specs).items():
        first = parts[0]
        for part in parts[1:]:
            if specs[part] != specs[first]:
                yield (
                    part,
                    f"runs {', '.join(name.rpartition('.')[2] for name in parts)} as one {fused.rpartition('.')[2]}, "
                    f"and this is {_describe(specs[part])} beside {_describe(specs[first])}; give all of them one "
                    "--override, or --skip all of them",
                )


def _straddling(plan: Plan) -> Iterator[tuple[str, str]]:
    """Linears whose inputs are split over the ranks in the middle of a group."""
    ranks = plan.options.tensor_parallel
    for linear in plan.quantized:
        if not _is_row_parallel(plan, linear):
            continue
        group_size = linear.grid.effective_group_size(linear.in_features) if linear.grid.group_size != -1 else 1
        if linear.in_features % ranks or linear.in_features // ranks % group_size:
            yield (
                linear.name,
                f"splits its {linear.in_features} inputs over {ranks} ranks, and a group of {group_size} would "
                f"straddle two of them; use a --group-size that divides {linear.in_features / ranks:g}, fewer ranks, "
                f"or --skip '*{linear.kind}'",
            )


def _is_row_parallel(plan: Plan, linear: LinearPlan) -> bool:
    """By the model's own plan for tensor parallelism where transformers has one, by name elsewhere."""
    split = getattr(plan.skeleton.model, "tp_plan", None) or {}
    if not split:
        return linear.name.rpartition(".")[2] in ROW_PARALLEL
    wildcard = ".".join("*" if part.isdigit() else part for part in linear.name.split("."))
    return "rowwise" in str(split.get(wildcard, ""))


def _describe(spec: QuantSpec | None) -> str:
    return "16 bit" if spec is None else spec.describe()
