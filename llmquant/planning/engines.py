"""Rules of inference engines: the checkpoints that each engine loads, checked in the plan before any work.

The rules describe one version of each engine, as of `RULES_DATE`. They say which checkpoints an engine loads and for
which it has kernels on an NVIDIA GPU, not which are fastest. A refusal names the linear, the rule and the remedy.

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
    from llmquant.planning.linears import LinearPlan
    from llmquant.planning.plan import Plan

RULES_DATE = "2026-11"
"""Month in which the rules were taken from the engines."""

MARLIN_GROUPS = (-1, 32, 64, 128)
"""Group sizes of the Marlin kernels."""
GRIDS_4 = ((4, True), (4, False))
"""(bits, symmetric) of the 4-bit grids."""
SYMMETRIC_GRIDS_4_8 = ((4, True), (8, True))
"""(bits, symmetric) of the symmetric grids with 4 and 8 bits."""
ANY_GRID = tuple((bits, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False))
"""(bits, symmetric) of all grids."""


@dataclass(frozen=True, kw_only=True)
class FormatRules:
    """The rules of an engine for checkpoints in one format."""

    grids: tuple[tuple[int, bool], ...]
    """(bits, symmetric) of the grids that the engine loads."""
    group_sizes: tuple[int, ...] | None = MARLIN_GROUPS
    """Group sizes for which the engine has kernels; None for any group size."""
    size_multiples: Mapping[int, tuple[int, int]] | None = None
    """Bits -> (number that must divide N, number that must divide K); None if the format's own rules are enough."""
    requires_one_grid: bool = False
    """Whether all linears of the decoder blocks must have the same grid, because the engine ignores other grids."""
    loads_quantized_head: bool = False
    """Whether the engine loads a quantized LM head."""
    packages: str = ""
    """Packages that must be installed besides the engine."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One version of an inference engine."""

    name: str
    """Name and version."""
    formats: Mapping[str, FormatRules]
    """Rules by name of the format. The engine does not load other formats."""
    fuses_linears: bool
    """Whether the engine runs the linears of a fused set (`formats.fused`) as one linear, so that they need one
    grid."""
    supports_tensor_parallel: bool
    """Whether the engine can split a model over several GPUs by tensor parallelism."""
    computes_in_16_bit: bool = False
    """Whether the engine computes in 16 bit, so that float32 scales would be rounded a second time."""


# Marlin's tiles are 64 outputs by 128 inputs. In 4 bits, Triton's W4A16 kernel handles sizes that Marlin does not.
TRITON_OR_MARLIN = {4: (8, 32), 8: (64, 128)}
MARLIN = {4: (64, 128), 8: (64, 128)}

ENGINES: dict[str, Engine] = {
    "vllm": Engine(
        name="vLLM 0.33",
        formats={
            "gptq": FormatRules(grids=SYMMETRIC_GRIDS_4_8, size_multiples=TRITON_OR_MARLIN, loads_quantized_head=True),
            "awq": FormatRules(grids=GRIDS_4, size_multiples=TRITON_OR_MARLIN),
            "compressed-tensors": FormatRules(grids=(*GRIDS_4, (8, True)), size_multiples=TRITON_OR_MARLIN),
        },
        fuses_linears=True,
        supports_tensor_parallel=True,
        computes_in_16_bit=True,
    ),
    "sglang": Engine(
        name="SGLang 0.5.23",
        formats={
            "gptq": FormatRules(grids=SYMMETRIC_GRIDS_4_8, size_multiples=MARLIN, loads_quantized_head=True),
            "awq": FormatRules(grids=GRIDS_4),
            "compressed-tensors": FormatRules(
                grids=(*GRIDS_4, (8, True), (8, False)), size_multiples={4: (1, 8), 8: (1, 4)}
            ),
        },
        fuses_linears=True,
        supports_tensor_parallel=True,
        computes_in_16_bit=True,
    ),
    "transformers": Engine(
        name="transformers 5.23",
        formats={
            "gptq": FormatRules(
                grids=ANY_GRID, group_sizes=None, requires_one_grid=True, packages="optimum and gptqmodel"
            ),
            "awq": FormatRules(grids=GRIDS_4, group_sizes=None, packages="gptqmodel"),
            "compressed-tensors": FormatRules(
                grids=ANY_GRID, group_sizes=None, loads_quantized_head=True, packages="compressed-tensors"
            ),
        },
        fuses_linears=False,
        supports_tensor_parallel=False,
    ),
}
"""Engines by the value of `--engine`."""

ROW_PARALLEL = ("o_proj", "down_proj", "out_proj", "fc2", "dense", "dense_4h_to_h", "c_proj")
"""Last parts of the names of row-parallel linears (their inputs are split over the ranks), if there is no `tp_plan`."""


def check_engines(plan: Plan) -> None:
    """Raise UserError unless every requested engine will load the checkpoint of a plan."""
    options = plan.options
    for name in options.engines:
        if name not in ENGINES:
            raise UserError(f"engine '{name}': not one of {', '.join(ENGINES)}; use --engine vllm")
    if options.tensor_parallel < 1:
        raise UserError(f"tensor_parallel {options.tensor_parallel}: must be at least 1; use --tensor-parallel 1")
    engines = [ENGINES[name] for name in options.engines]
    if options.tensor_parallel > 1 and not any(engine.supports_tensor_parallel for engine in engines):
        remedy = " or ".join(f"--engine {name}" for name, engine in ENGINES.items() if engine.supports_tensor_parallel)
        raise UserError(
            f"tensor_parallel {options.tensor_parallel}: no requested engine supports tensor parallelism; add {remedy}"
        )
    for engine in engines:
        refusals = list(_refusals(plan, engine))
        if refusals:
            subject, reason = refusals[0]
            more = f" (and {len(refusals) - 1} more)" if len(refusals) > 1 else ""
            raise UserError(f"{subject}{more}: {engine.name} {reason} (rules of {RULES_DATE})")


def package_notes(plan: Plan) -> list[str]:
    """Return a line for each requested engine that needs other packages for the format of a plan."""
    requested = [ENGINES[name] for name in plan.options.engines]
    return [
        f"{engine.name} needs {rules.packages} for this format"
        for engine in requested
        if (rules := engine.formats[plan.format.name]).packages
    ]


def _refusals(plan: Plan, engine: Engine) -> Iterator[tuple[str, str]]:
    """Yield (linear or option, broken rule and remedy) for everything in a plan that an engine does not load.

    The second text continues a sentence that begins with the name of the engine.
    """
    rules = engine.formats.get(plan.format.name)
    if rules is None:
        yield (
            f"format {plan.format.name}",
            f"loads {', '.join(engine.formats)}; use --format {next(iter(engine.formats))}",
        )
        return
    if engine.computes_in_16_bit and plan.scale_dtype == torch.float32:
        yield "dtype float32", "computes in 16 bit and would round the float32 scales again; use --dtype bfloat16"
    outputs = _outputs(plan, engine)
    for linear in plan.quantized:
        refusals = {
            name: _linear_refusal(each, linear, name, outputs[linear.name]) for name, each in engine.formats.items()
        }
        if refusal := refusals[plan.format.name]:
            rule, remedy = refusal
            # compressed-tensors stores every grid, so it is a remedy if its rules do not refuse the linear.
            other = "--format compressed-tensors, or " if refusals["compressed-tensors"] is None else ""
            yield linear.name, f"{rule}; use {other}{remedy}"
    if rules.requires_one_grid:
        yield from _second_grid_refusals(plan)
    if engine.fuses_linears:
        yield from _fused_set_refusals(plan)
    if engine.supports_tensor_parallel and plan.options.tensor_parallel > 1:
        yield from _split_group_refusals(plan)


def _outputs(plan: Plan, engine: Engine) -> dict[str, int]:
    """Return the N of each quantized linear in an engine: the N of its fused set if the engine fuses linears."""
    outputs = {linear.name: linear.out_features for linear in plan.quantized}
    for members in fused_sets(outputs).values() if engine.fuses_linears else ():
        outputs |= dict.fromkeys(members, sum(outputs[member] for member in members))
    return outputs


def _linear_refusal(rules: FormatRules, linear: LinearPlan, format: str, outputs: int) -> tuple[str, str] | None:
    """Return the rule that a linear breaks in a format, and the remedy. outputs: N of the linear or its fused set."""
    spec, skip = linear.quant_spec, f"--skip '*{linear.kind}'"
    is_outside_blocks = not linear.block_name
    if is_outside_blocks and not rules.loads_quantized_head:
        return f"cannot load a quantized head in {format}", f"--skip '{linear.name}'"
    if (spec.bits, spec.symmetric) not in rules.grids:
        known = ", ".join(f"{bits}-bit {'sym' if symmetric else 'asym'}" for bits, symmetric in rules.grids)
        return f"loads {format} with {known}, and this linear is {spec.describe()}", f"--bits 4 --sym, or {skip}"
    if rules.group_sizes is not None and spec.group_size not in rules.group_sizes:
        sizes = ", ".join(map(str, rules.group_sizes))
        return (
            f"has kernels for group sizes {sizes}, and this linear is {spec.describe()}",
            f"--group-size 64, or {skip}",
        )
    for name, size, multiple in zip(
        ("out_features", "in_features"),
        (outputs, linear.in_features),
        (rules.size_multiples or {}).get(spec.bits, (1, 1)),
        strict=True,
    ):
        if size % multiple:
            return f"needs {name} to be a multiple of {multiple} in {spec.bits}-bit {format}, and it is {size}", skip
    return None


def _second_grid_refusals(plan: Plan) -> Iterator[tuple[str, str]]:
    """Yield a refusal for each linear of the decoder blocks that is not on the most frequent grid."""
    ((default, _),) = Counter(linear.quant_spec for linear in plan.quantized).most_common(1)
    for linear in plan.linears:
        if linear.block_name and linear.spec != default:
            yield (
                linear.name,
                f"loads one grid for all linears in {plan.format.name}, and this linear is {_describe(linear.spec)} "
                f"while most are {default.describe()}; use --format compressed-tensors, or give all linears one grid",
            )


def _fused_set_refusals(plan: Plan) -> Iterator[tuple[str, str]]:
    """Yield a refusal for each linear whose grid differs from that of the first linear of its fused set."""
    specs = {linear.name: linear.spec for linear in plan.linears}
    for fused, (first, *others) in fused_sets(specs).items():
        for other in others:
            if specs[other] != specs[first]:
                names = ", ".join(name.rpartition(".")[2] for name in (first, *others))
                yield (
                    other,
                    f"runs {names} as one {fused.rpartition('.')[2]}, "
                    f"and this linear is {_describe(specs[other])} beside {_describe(specs[first])}; give all of them "
                    "one --override, or --skip all of them",
                )


def _split_group_refusals(plan: Plan) -> Iterator[tuple[str, str]]:
    """Yield a refusal for each linear if splitting its inputs over the ranks would split a group."""
    ranks = plan.options.tensor_parallel
    for linear in plan.quantized:
        if not _is_row_parallel(plan, linear):
            continue
        spec = linear.quant_spec
        group_size = spec.effective_group_size(linear.in_features) if spec.group_size != -1 else 1
        if linear.in_features % ranks or linear.in_features // ranks % group_size:
            yield (
                linear.name,
                f"splits its {linear.in_features} inputs over {ranks} ranks, and a group of {group_size} would "
                f"straddle two of them; use a --group-size that divides {linear.in_features / ranks:g}, fewer ranks, "
                f"or --skip '*{linear.kind}'",
            )


def _is_row_parallel(plan: Plan, linear: LinearPlan) -> bool:
    """Whether the inputs of a linear are split over the ranks, by the `tp_plan` of the model or else by its name."""
    split = getattr(plan.skeleton.model, "tp_plan", None) or {}
    if not split:
        return linear.name.rpartition(".")[2] in ROW_PARALLEL
    wildcard = ".".join("*" if part.isdigit() else part for part in linear.name.split("."))
    return "rowwise" in str(split.get(wildcard, ""))


def _describe(spec: QuantSpec | None) -> str:
    return "16 bit" if spec is None else spec.describe()
