"""The plan of a run: all decisions that need no weights, and the checks of the request.

A plan says which linears are quantized, on which grid and in which format. A dry run makes a plan and stops; a real run
starts with the same plan and the same checks.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
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
from llmquant.humanize import dtype_name
from llmquant.models.blocks import (
    find_blocks,
    parse_device,
    weight_of,
)
from llmquant.models.skeleton import (
    MODEL_DTYPES,
    Skeleton,
    compute_dtype,
    context_length,
    converted_names,
    read_config,
    stored_dtype,
)
from llmquant.planning.linears import LinearPlan, block_name_of, plan_linears
from llmquant.spec import Options, Recipe

AUTO_FORMAT = "auto"
"""The default format: gptq, or compressed-tensors for an asymmetric grid, because gptq v1 cannot store zero-point 0."""


@dataclass(frozen=True)
class Plan:
    """All decisions about a run that need no weights."""

    path: Path
    """Folder of the original checkpoint."""
    config: Any
    """Configuration of the original model (transformers' PretrainedConfig)."""
    reader: CheckpointReader
    """Reader of the original checkpoint."""
    skeleton: Skeleton
    """The original model without weights."""
    recipe: Recipe
    """Grids and methods for the linears."""
    format: Format
    """Format of the quantized checkpoint."""
    dtype: torch.dtype
    """Dtype of the model that is written. Without `--dtype`, tensors with another dtype keep it."""
    block_names: tuple[str, ...]
    """Module names of the decoder blocks in order."""
    linears: tuple[LinearPlan, ...]
    """All linears of the model in order."""
    options: Options
    """Inputs, outputs and devices of the run."""
    calibration: dict[str, Any] | None = None
    """Summary of the calibration text (`preview_calibration`); None unless a dry run has read the text."""

    @property
    def num_tokens(self) -> int:
        """Number of calibration tokens, or 0 if the recipe needs no data."""
        return self.options.num_samples * self.options.seq_len if self.recipe.needs_data else 0

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype to which scales are rounded, and in which they are stored."""
        return self.format.scale_dtype(self.dtype)

    @property
    def quantized(self) -> list[LinearPlan]:
        """The linears that are quantized."""
        return [linear for linear in self.linears if linear.spec is not None]

    @property
    def quantized_outside_blocks(self) -> dict[str, LinearPlan]:
        """The quantized linears outside the decoder blocks, by full name: the head, if an override gives it a grid."""
        return {linear.name: linear for linear in self.quantized if not linear.block_name}

    def linears_of_block(self, index: int) -> dict[str, LinearPlan]:
        """Return the quantized linears of one block by local name."""
        block = self.block_names[index]
        return {linear.local_name: linear for linear in self.quantized if linear.block_name == block}

    def tensors_of_block(self, index: int) -> dict[str, TensorInfo]:
        """Return the tensors of the checkpoint that belong to one block, sorted by name."""
        prefix = self.block_names[index] + "."
        names = {tensor for name, tensor in self.skeleton.names.items() if name.startswith(prefix)}
        return {name: info for name, info in sorted(self.reader.tensors.items()) if name in names}

    def tensors_outside(self) -> dict[str, TensorInfo]:
        """Return the tensors of the checkpoint that belong to no block, sorted by name.

        They are copied, unless an override quantizes one.
        """
        inside = {name for index in range(len(self.block_names)) for name in self.tensors_of_block(index)}
        return {name: info for name, info in sorted(self.reader.tensors.items()) if name not in inside}

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes about the original checkpoint, one sentence each."""
        unused = [name for name in sorted(self.reader.tensors) if name not in self.skeleton.used_tensors]
        note = "not part of the model that transformers runs: copied, and not checked for NaN"
        return storage_notes(self.reader) + ((f"{count_tensors(unused)} {note}",) if unused else ())

    def unquantized_dtype(self, info: TensorInfo) -> torch.dtype:
        """Return the dtype in which an unquantized tensor is written: its own dtype, unless `--dtype` was given."""
        return self.dtype if self.options.dtype != "auto" and info.dtype in MODEL_DTYPES.values() else info.dtype

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per quantized weight, including codes, scales, zero-points and everything else in the format."""
        weights = sum(linear.out_features * linear.in_features for linear in self.quantized)
        return 8 * sum(self.packed_bytes(linear) for linear in self.quantized) / max(weights, 1)

    @property
    def output_bytes(self) -> int:
        """Bytes of all tensors that will be written."""
        replaced = {f"{linear.checkpoint_name}.weight" for linear in self.quantized}
        unquantized_bytes = sum(
            math.prod(info.shape) * self.unquantized_dtype(info).itemsize
            for name, info in self.reader.tensors.items()
            if name not in replaced
        )
        return unquantized_bytes + sum(self.packed_bytes(linear) for linear in self.quantized)

    def packed_bytes(self, linear: LinearPlan) -> int:
        """Return the bytes of a quantized linear in the format."""
        shapes = self.format.tensor_shapes(linear.quant_spec, linear.out_features, linear.in_features, self.scale_dtype)
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in shapes.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values, for JSON."""
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
            "dtype": dtype_name(self.dtype),
            "device": str(self.skeleton.device),
            "num_blocks": len(self.block_names),
            "linears": linears,
            "bits_per_weight": self.bits_per_weight,
            "original_bytes": self.reader.total_bytes,
            "output_bytes": self.output_bytes,
            "calibration": self.calibration,
            "notes": list(self.notes),
        }


def make_plan(path: Path, recipe: Recipe, options: Options) -> Plan:
    """Open a checkpoint and plan the run. Raises UserError if the run cannot be done as requested."""
    format, dtype = _choose_format(recipe, options), options.dtype
    if dtype != "auto" and dtype not in MODEL_DTYPES:
        raise UserError(f"dtype '{dtype}': not one of auto, {', '.join(MODEL_DTYPES)}; use --dtype auto")
    reader = CheckpointReader(path)
    refuse_quantized(reader)
    config = read_config(path, options.trust_remote_code)
    model_dtype = stored_dtype(config, reader) if dtype == "auto" else MODEL_DTYPES[dtype]
    device = parse_device(options.device)
    skeleton = Skeleton.open(reader, config, device, compute_dtype(model_dtype, device), options.trust_remote_code)
    _, block_names = find_blocks(skeleton.model)
    _check_blocks_apart(skeleton, block_names)
    _check_complete(skeleton)
    if recipe.needs_data:
        _check_windows(options, context_length(config))
    scale_dtype = format.scale_dtype(model_dtype)
    linears = plan_linears(skeleton, block_names, recipe, format, scale_dtype)
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
        example = next((linear for linear in linears if linear.reason), None)
        reason = f": {example.name}: {example.reason}" if example else ""
        raise UserError(f"{path}: no linear is left to quantize{reason}; check --skip, --group-size and --format")
    _check_unused_tensors(plan)
    return plan


def _choose_format(recipe: Recipe, options: Options) -> Format:
    """Return the requested format, or the default format for the grids of a recipe."""
    name = options.format
    if name == AUTO_FORMAT:
        name = "gptq" if recipe.is_symmetric else "compressed-tensors"
    if name not in FORMATS:
        raise UserError(f"format '{name}': not one of {', '.join(FORMATS)}; use --format gptq")
    return FORMATS[name]


def _check_unused_tensors(plan: Plan) -> None:
    """Check the tensors of the checkpoint that are not part of the model.

    Raises UserError if a name says that weights are stored in another way, or if the format writes a tensor of the
    same name.
    """
    unused = plan.reader.tensors.keys() - plan.skeleton.used_tensors
    for name in sorted(unused):
        if is_scale(name, plan.reader.tensors):
            raise UserError(
                f"{plan.path}: '{name}' is not part of the model, and its name says that weights are scaled or packed, "
                "which llmquant cannot decode; give the model's checkpoint in 16 bits, or remove that tensor"
            )
    packed = {f"{linear.checkpoint_name}.{suffix}" for linear in plan.quantized for suffix in plan.format.suffixes}
    if conflicts := sorted(packed & unused):
        raise UserError(
            f"{plan.path}: '{conflicts[0]}' is not part of the model, and the {plan.format.name} format writes a "
            "tensor of that name; remove it, or use another --format"
        )


def _check_blocks_apart(skeleton: Skeleton, block_names: list[str]) -> None:
    """Raise UserError if two decoder blocks share a weight. Weights are read, quantized and written block by block."""
    owner_of: dict[object, str] = {}
    for name, parameter in skeleton.model.named_parameters(remove_duplicate=False):
        block = block_name_of(name, block_names)
        if not block:
            continue
        for key in (parameter, skeleton.names.get(name)):
            other = owner_of.setdefault(key, block) if key is not None else block
            if other != block:
                raise UserError(
                    f"{skeleton.reader.path}: decoder blocks '{other}' and '{block}' share the weight "
                    f"'{skeleton.names.get(name, name)}'; models whose blocks share weights cannot be quantized"
                )


def _check_complete(skeleton: Skeleton) -> None:
    """Raise UserError if a parameter of the model has no tensor in the checkpoint."""
    missing = skeleton.missing_parameters()
    if not missing:
        return
    path, converted = skeleton.reader.path, converted_names(skeleton.model, skeleton.reader.tensors)
    if unsupported := [name for name in missing if name in converted]:
        tensors = sorted(converted[unsupported[0]])
        raise UserError(
            f"{path}: parameter '{unsupported[0]}' ({len(unsupported)} such) is not stored as it is: transformers "
            f"builds it from '{tensors[0]}' ({len(tensors)} such), and this version of llmquant cannot; models of type "
            f"'{skeleton.model.config.model_type}' cannot be quantized yet"
        )
    raise UserError(
        f"{path}: no tensor holds parameter '{missing[0]}' ({len(missing)} such): {skeleton.why_missing(missing[0])}"
    )


def _check_windows(options: Options, context: float) -> None:
    """Raise UserError if windows of calibration text cannot be drawn. context: longest input of the model in tokens."""
    if options.num_samples < 1:
        raise UserError(f"samples {options.num_samples}: at least 1 is needed; use --samples 128")
    if options.seq_len < 1:
        raise UserError(f"seq_len {options.seq_len}: at least 1 token is needed; use --seq-len {min(512, context)}")
    if options.seq_len > context:
        raise UserError(f"seq_len {options.seq_len}: the model takes {context} tokens at most; use --seq-len {context}")
    if not -(2**63) <= options.seed < 2**64:
        raise UserError(f"seed {options.seed}: has more than 64 bits; use --seed 0")


def check_tokens(plan: Plan, tokens_SL: Tensor) -> None:
    """Raise UserError if the tokenizer gives ids for which the model has no embedding."""
    vocabulary = weight_of(plan.skeleton.model.get_input_embeddings()).shape[0]
    largest = int(tokens_SL.max())
    if largest >= vocabulary:
        raise UserError(
            f"{plan.path}: the tokenizer gives token {largest}, and the model has {vocabulary} tokens; "
            "the tokenizer belongs to another model, restore its files"
        )
