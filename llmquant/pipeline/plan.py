"""What can be settled before a weight is read: what is quantized how, what it will need, and what is refused.

A dry run is this and nothing else; a real run starts with it and gets the same refusals.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmquant.checkpoints.header import TensorInfo
from llmquant.checkpoints.quantized import refuse_quantized, storage_notes
from llmquant.checkpoints.reader import CheckpointReader, count_tensors
from llmquant.checkpoints.storage import is_scale
from llmquant.errors import UserError
from llmquant.formats.format import Format
from llmquant.formats.registry import FORMATS
from llmquant.models.blocks import (
    device_of,
    find_blocks,
    has_hooks,
    is_linear,
    linear_likes_of,
    linear_shape,
    routers_of,
    weight_of,
)
from llmquant.models.skeleton import (
    DTYPES,
    Skeleton,
    compute_dtype,
    context_length,
    converted_names,
    read_config,
    stored_dtype,
)
from llmquant.pipeline.names import kind_of
from llmquant.runtime.attention import use_attention
from llmquant.spec import Options, QuantSpec, Recipe

AUTO = "auto"
"""The default format: gptq; compressed-tensors for an asymmetric grid, because gptq v1 cannot store zero-point 0."""
STANDARD_GROUPS = (128, 64, 32)
"""Group sizes that every loader has kernels for, largest first."""


@dataclass(frozen=True)
class LinearPlan:
    """What happens to one linear."""

    name: str
    """Module name in the model."""
    source: str
    """Module name in the checkpoint: its weight is `<source>.weight`."""
    out_features: int
    in_features: int
    spec: QuantSpec | None
    """Its grid, or None when it stays in 16 bit."""
    reason: str = ""
    """Why it stays in 16 bit, or why its grid is not the one asked for."""
    is_kept_by_rule: bool = False
    """Whether it stays in 16 bit in every run: a router or a gate, which no engine loads quantized."""

    @property
    def grid(self) -> QuantSpec:
        """The grid of a linear that gets one."""
        assert self.spec is not None
        return self.spec

    @property
    def is_left_by_user(self) -> bool:
        """Whether it stays in 16 bit because `--skip` or an override says so."""
        return self.spec is None and self.reason.startswith("--")

    @property
    def kind(self) -> str:
        """The name without its block: `self_attn.q_proj`. Linears of one kind do the same job in every block."""
        return kind_of(self.name)


@dataclass(frozen=True)
class Plan:
    """A run, settled."""

    path: Path
    config: Any
    reader: CheckpointReader
    skeleton: Skeleton
    recipe: Recipe
    format: Format
    dtype: torch.dtype
    """Dtype of the model that is written. Single tensors keep another one, unless `--dtype` was given."""
    block_names: tuple[str, ...]
    linears: tuple[LinearPlan, ...]
    """Every linear of the model in order."""
    options: Options
    calibration: dict[str, Any] | None = None
    """Account of the calibration text (`calibration.preview`); None before a dry run has looked at it."""

    @property
    def num_tokens(self) -> int:
        """Calibration tokens, 0 where no data is needed."""
        return self.options.num_samples * self.options.seq_len if self.recipe.needs_data else 0

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype scales are rounded to and stored in."""
        return self.format.scale_dtype(self.dtype)

    @property
    def quantized(self) -> list[LinearPlan]:
        """The linears that get a grid."""
        return [linear for linear in self.linears if linear.spec is not None]

    @property
    def outside(self) -> dict[str, LinearPlan]:
        """The quantized linears that belong to no block, by full name: the head, where an override asks for it."""
        blocks = tuple(f"{name}." for name in self.block_names)
        return {linear.name: linear for linear in self.quantized if not linear.name.startswith(blocks)}

    def linears_of_block(self, index: int) -> dict[str, LinearPlan]:
        """The quantized linears of one block by their name within it."""
        prefix = self.block_names[index] + "."
        return {linear.name.removeprefix(prefix): linear for linear in self.quantized if linear.name.startswith(prefix)}

    def tensors_of_block(self, index: int) -> dict[str, TensorInfo]:
        """The checkpoint's tensors that belong to one block, by name, and in that order: not in that of the disk."""
        prefix = self.block_names[index] + "."
        wanted = {source for name, source in self.skeleton.names.items() if name.startswith(prefix)}
        return {name: info for name, info in sorted(self.reader.tensors.items()) if name in wanted}

    def tensors_outside(self) -> dict[str, TensorInfo]:
        """The checkpoint's tensors that belong to no block: they are copied as they are, unless an override quantizes
        one."""
        inside = {name for index in range(len(self.block_names)) for name in self.tensors_of_block(index)}
        return {name: info for name, info in sorted(self.reader.tensors.items()) if name not in inside}

    @cached_property
    def read_by_model(self) -> frozenset[str]:
        """The checkpoint's tensors that the model has."""
        return frozenset(self.skeleton.names.values())

    @cached_property
    def parameter_sources(self) -> frozenset[str]:
        """Those of them that are parameters. The others are buffers, which may hold -inf for a mask."""
        parameters = (name for name, _ in self.skeleton.model.named_parameters(remove_duplicate=False))
        return frozenset(self.skeleton.names[name] for name in parameters if name in self.skeleton.names)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is worth knowing about the checkpoint before it is quantized, a sentence each."""
        unused = [name for name in sorted(self.reader.tensors) if name not in self.read_by_model]
        told = "not part of the model that transformers runs: copied, and not checked for NaN"
        return storage_notes(self.reader) + ((f"{count_tensors(unused)} {told}",) if unused else ())

    def kept_dtype(self, info: TensorInfo) -> torch.dtype:
        """The dtype in which a tensor is written that is not quantized: its own, unless `--dtype` was given."""
        return self.dtype if self.options.dtype != "auto" and info.dtype in DTYPES.values() else info.dtype

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per quantized weight: codes, scales, zero-points and whatever else the format keeps."""
        weights = sum(linear.out_features * linear.in_features for linear in self.quantized)
        return 8 * sum(self.packed_bytes(linear) for linear in self.quantized) / max(weights, 1)

    @property
    def output_bytes(self) -> int:
        """Bytes of all tensors that will be written."""
        replaced = {f"{linear.source}.weight" for linear in self.quantized}
        kept = sum(
            math.prod(info.shape) * self.kept_dtype(info).itemsize
            for name, info in self.reader.tensors.items()
            if name not in replaced
        )
        return kept + sum(self.packed_bytes(linear) for linear in self.quantized)

    def packed_bytes(self, linear: LinearPlan) -> int:
        """Bytes of a quantized linear as it will be stored."""
        shapes = self.format.tensor_shapes(linear.grid, linear.out_features, linear.in_features, self.scale_dtype)
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in shapes.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        linears = [
            {
                "name": linear.name,
                "kind": linear.kind,
                "out_features": linear.out_features,
                "in_features": linear.in_features,
                "spec": None if linear.spec is None else asdict(linear.spec),
                "reason": linear.reason,
                "stored_bytes": None if linear.spec is None else self.packed_bytes(linear),
            }
            for linear in self.linears
        ]
        return {
            "model": str(self.path),
            "recipe": asdict(self.recipe),
            "format": self.format.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.skeleton.device),
            "num_blocks": len(self.block_names),
            "linears": linears,
            "bits_per_weight": self.bits_per_weight,
            "original_bytes": self.reader.total_bytes,
            "output_bytes": self.output_bytes,
            "calibration": self.calibration,
            "remarks": list(self.notes),
        }


def make_plan(path: Path, recipe: Recipe, options: Options) -> Plan:
    """Open a checkpoint and settle everything; UserError when the run cannot be done as asked."""
    format_name, dtype = options.format, options.dtype
    if format_name == AUTO:
        format_name = "gptq" if recipe.is_symmetric else "compressed-tensors"
    if format_name not in FORMATS:
        raise UserError(f"format '{format_name}': not one of {', '.join(FORMATS)}; use --format gptq")
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"dtype '{dtype}': not one of auto, {', '.join(DTYPES)}; use --dtype auto")
    reader = CheckpointReader(path)
    refuse_quantized(reader)
    config = read_config(path, options.trust_remote_code)
    model_dtype = stored_dtype(config, reader) if dtype == "auto" else DTYPES[dtype]
    device = device_of(options.device)
    skeleton = Skeleton.open(reader, config, device, compute_dtype(model_dtype, device), options.trust_remote_code)
    use_attention(skeleton.model, device)
    _, block_names = find_blocks(skeleton.model)
    _check_blocks_apart(skeleton, block_names)
    _check_complete(skeleton)
    if recipe.needs_data:
        _check_windows(options, context_length(config))
    format = FORMATS[format_name]
    scale_dtype = format.scale_dtype(model_dtype)
    linears = tuple(_plan_linears(skeleton, block_names, recipe, format, scale_dtype))
    if not format.mixes_group_sizes:
        linears = _with_one_group_size(linears, recipe, format, scale_dtype)
    plan = Plan(
        path=path,
        config=config,
        reader=reader,
        skeleton=skeleton,
        recipe=recipe,
        format=format,
        dtype=model_dtype,
        block_names=tuple(block_names),
        linears=linears,
        options=options,
    )
    if not plan.quantized:
        refused = next((linear for linear in linears if linear.reason), None)
        why = f": {refused.name}: {refused.reason}" if refused else ""
        raise UserError(f"{path}: no linear is left to quantize{why}; check --skip, --group-size and --format")
    _check_unused_tensors(plan)
    return plan


def _check_unused_tensors(plan: Plan) -> None:
    """UserError for tensors that the model does not have and that say that its weights are stored in another way, or
    whose names the format needs."""
    unused = plan.reader.tensors.keys() - plan.read_by_model
    for name in sorted(unused):
        if is_scale(name, plan.reader.tensors):
            raise UserError(
                f"{plan.path}: '{name}' is not part of the model, and its name says that weights are scaled or packed, "
                "which llmquant cannot decode; give the model's checkpoint in 16 bits, or remove that tensor"
            )
    packed = {f"{linear.source}.{suffix}" for linear in plan.quantized for suffix in plan.format.suffixes}
    if taken := sorted(packed & unused):
        raise UserError(
            f"{plan.path}: '{taken[0]}' is not part of the model, and the {plan.format.name} format writes a tensor of "
            "that name; remove it, or use another --format"
        )


def _check_blocks_apart(skeleton: Skeleton, block_names: list[str]) -> None:
    """UserError when two decoder blocks use the same weights: they are read, solved and written block by block."""
    depth, blocks = block_names[0].count(".") + 1, set(block_names)
    owner_of: dict[object, str] = {}
    for name, parameter in skeleton.model.named_parameters(remove_duplicate=False):
        block = ".".join(name.split(".")[:depth])
        if block not in blocks:
            continue
        for key in (parameter, skeleton.names.get(name)):
            other = owner_of.setdefault(key, block) if key is not None else block
            if other != block:
                raise UserError(
                    f"{skeleton.reader.path}: decoder blocks '{other}' and '{block}' share the weight "
                    f"'{skeleton.names.get(name, name)}'; models whose blocks share weights cannot be quantized"
                )


def _check_complete(skeleton: Skeleton) -> None:
    """UserError when a parameter has no tensor in the checkpoint."""
    missing = skeleton.missing()
    if not missing:
        return
    path, converted = skeleton.reader.path, converted_names(skeleton.model, skeleton.reader.tensors)
    if made := [name for name in missing if name in converted]:
        tensors = sorted(converted[made[0]])
        raise UserError(
            f"{path}: parameter '{made[0]}' ({len(made)} such) is not stored as it is: transformers makes it of "
            f"'{tensors[0]}' ({len(tensors)} such), and this version of llmquant cannot; models of type "
            f"'{skeleton.model.config.model_type}' cannot be quantized yet"
        )
    raise UserError(
        f"{path}: no tensor holds parameter '{missing[0]}' ({len(missing)} such): {skeleton.why_missing(missing[0])}"
    )


def _check_windows(options: Options, context: float) -> None:
    """UserError for windows of calibration text that cannot be drawn. context: most tokens that the model takes."""
    if options.num_samples < 1:
        raise UserError(f"samples {options.num_samples}: at least 1 is needed; use --samples 128")
    if options.seq_len < 1:
        raise UserError(f"seq_len {options.seq_len}: at least 1 token is needed; use --seq-len {min(512, context)}")
    if options.seq_len > context:
        raise UserError(f"seq_len {options.seq_len}: the model takes {context} tokens at most; use --seq-len {context}")
    if not -(2**63) <= options.seed < 2**64:
        raise UserError(f"seed {options.seed}: has more than 64 bits; use --seed 0")


def _plan_linears(
    skeleton: Skeleton, block_names: list[str], recipe: Recipe, format: Format, scale_dtype: torch.dtype
) -> Iterator[LinearPlan]:
    unmatched, unheard = set(recipe.skip), set(recipe.overrides)
    uses = Counter(skeleton.names.values())
    aliases = Counter(id(module) for _, module in skeleton.model.named_modules(remove_duplicate=False))
    blocks = tuple(f"{name}." for name in block_names)
    routers = {
        f"{block}.{name}": reason
        for block in block_names
        for name, reason in routers_of(skeleton.model.get_submodule(block)).items()
    }
    for name, linear in linear_likes_of(skeleton.model).items():
        out_features, in_features = linear_shape(linear)
        source = skeleton.names.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight")
        spec: QuantSpec | None = None
        by_rule = False
        patterns = [pattern for pattern in recipe.skip if fnmatchcase(name, pattern)]
        unmatched -= set(patterns)
        overrides = recipe.overrides_of(name)
        unheard -= set(overrides)
        wanted = recipe.spec_of(name)
        if patterns:
            reason = f"--skip '{patterns[0]}'"
        elif wanted is None:
            reason = str(overrides[-1])
        elif not name.startswith(blocks) and not overrides:
            reason = "outside the decoder blocks"
        else:
            if name in routers:
                reason, by_rule = routers[name], True
            elif not is_linear(linear):
                reason = f"its class {type(linear).__name__} does not compute just x @ W.T + b"
            elif has_hooks(linear):
                reason = "forward hooks may change what it computes, and no loader has them"
            elif aliases[id(linear)] > 1:
                reason = "is registered under several names, of which a loader replaces one"
            elif uses[f"{source}.weight"] > 1:
                reason = f"shares its weight '{source}.weight' with another module, which needs it in 16 bit"
            else:
                spec, reason = _fit(wanted, format, out_features, in_features, scale_dtype)
            if spec is None and overrides:
                raise UserError(f"{name}: {overrides[-1]}: {reason} (--skip '{name}' leaves it in 16 bit)")
        yield LinearPlan(name, source, out_features, in_features, spec, reason, by_rule)
    if unmatched:
        raise UserError(
            f"skip pattern '{min(unmatched)}': matches no linear; patterns are matched against full names, "
            "such as '*.down_proj'"
        )
    if unheard:
        raise UserError(
            f"override pattern '{min(override.pattern for override in unheard)}': matches no linear; patterns are "
            "matched against full names, such as '*.down_proj'"
        )


def _fit(
    spec: QuantSpec, format: Format, out_features: int, in_features: int, scale_dtype: torch.dtype
) -> tuple[QuantSpec | None, str]:
    """The grid asked for if the format can hold it, else the largest standard group that it can; else None."""
    refusal = format.refuses(spec, out_features, in_features, scale_dtype)
    if refusal is None and (spec.group_size == -1 or in_features % spec.group_size == 0):
        return spec, ""
    wanted = spec.group_size if spec.group_size != -1 else in_features
    for group_size in STANDARD_GROUPS:
        smaller = replace(spec, group_size=group_size)
        fits = group_size < wanted and in_features % group_size == 0
        if fits and format.refuses(smaller, out_features, in_features, scale_dtype) is None:
            return smaller, f"group size {spec.group_size} -> {group_size}, because in_features is {in_features}"
    reason = refusal or (
        f"in_features {in_features} is not a multiple of group_size {spec.group_size}, nor of a smaller one of "
        f"{', '.join(map(str, STANDARD_GROUPS))}"
    )
    return None, reason


def _with_one_group_size(
    linears: tuple[LinearPlan, ...], recipe: Recipe, format: Format, scale_dtype: torch.dtype
) -> tuple[LinearPlan, ...]:
    """The same linears on one group size, where some had to reduce the recipe's: the largest that all of them take.

    Linears whose group size an override sets keep it. Nothing changes where no standard group size fits all.
    """
    asked = recipe.spec.group_size
    sharing = {
        linear.name
        for linear in linears
        if linear.spec is not None and (wanted := recipe.spec_of(linear.name)) and wanted.group_size == asked
    }
    those = [linear for linear in linears if linear.name in sharing]
    sizes = {linear.grid.group_size for linear in those}
    if asked == -1 or sizes <= {asked}:
        return linears
    for group_size in (size for size in STANDARD_GROUPS if size <= min(sizes)):
        specs = {linear.name: replace(linear.grid, group_size=group_size) for linear in those}
        if all(
            linear.in_features % group_size == 0
            and format.refuses(specs[linear.name], linear.out_features, linear.in_features, scale_dtype) is None
            for linear in those
        ):
            widths = ", ".join(map(str, sorted({linear.in_features for linear in those})))
            reason = (
                f"group size {asked} -> {group_size}, the largest that divides the in_features of all linears "
                f"({widths}): not every {format.name} loader reads a group size per linear"
            )
            return tuple(
                replace(linear, spec=specs[linear.name], reason=reason) if linear.name in sharing else linear
                for linear in linears
            )
    return linears


class DamagedWeights(UserError):
    """A weight holds NaN or inf: nothing that was made of this checkpoint is of use."""


def damaged_weights(path: Path, name: str) -> DamagedWeights:
    """The error that names a tensor."""
    return DamagedWeights(
        f"{path}: tensor '{name}' holds NaN or inf; the checkpoint is damaged, download it again "
        "(what this run had made of it is removed)"
    )


def read_finite(plan: Plan, name: str) -> Tensor:
    """A tensor of the checkpoint; UserError when it holds NaN or inf."""
    tensor = plan.reader.read(name)
    check_finite(plan, name, tensor)
    return tensor


def check_tokens(plan: Plan, tokens_SL: Tensor) -> None:
    """UserError when the tokenizer makes ids that the model has no embedding for."""
    vocabulary = weight_of(plan.skeleton.model.get_input_embeddings()).shape[0]
    largest = int(tokens_SL.max())
    if largest >= vocabulary:
        raise UserError(
            f"{plan.path}: the tokenizer makes token {largest}, the model has {vocabulary}; "
            "the tokenizer's files are those of another model"
        )


def check_finite(plan: Plan, name: str, tensor: Tensor) -> None:
    """UserError when a tensor that the model reads, or a piece of it, holds NaN, or is a parameter and holds inf. Takes
    no memory of its size."""
    if not tensor.is_floating_point() or tensor.itemsize == 1 or name not in plan.read_by_model:
        return
    if not (all_finite(tensor) if name in plan.parameter_sources else no_nan(tensor)):
        raise damaged_weights(plan.path, name)


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or inf. Takes no memory of the tensor's size, as isfinite would."""
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def no_nan(tensor: Tensor) -> bool:
    """Whether no element is NaN. Takes no memory of the tensor's size."""
    return tensor.numel() == 0 or not bool(torch.isnan(torch.stack(torch.aminmax(tensor))).any())
