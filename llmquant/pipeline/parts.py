"""What a run puts on the disk: the parts it writes block by block, and the files that stand beside the weights.

A part holds all tensors of one decoder block as they are stored. What belongs to no block (embeddings, the last norm,
the head) is one part too, copied piece by piece.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmquant.checkpoints.copies import check_copies
from llmquant.checkpoints.reader import CheckpointReader
from llmquant.checkpoints.side_files import SideFiles, find_side_files
from llmquant.checkpoints.storage import without_storage_keys
from llmquant.checkpoints.writer import PartialCheckpoint, TensorStream
from llmquant.errors import UserError
from llmquant.models.blocks import weight_as_NK
from llmquant.paths import partial_folder, real_path
from llmquant.pipeline.plan import LinearPlan, Plan, all_finite, check_finite, read_finite
from llmquant.pipeline.report import ReportBuilder
from llmquant.pipeline.solve import Solved, Stored, solve_without_data

OUTSIDE = "outside"
"""The part of what belongs to no block."""


def part_names(plan: Plan) -> list[str]:
    """The part of each block, in order."""
    return [f"block-{index:05d}" for index in range(len(plan.block_names))]


def pack_part(
    plan: Plan,
    index: int,
    linears: Mapping[str, LinearPlan],
    solved: Mapping[str, Solved],
    folded: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """All tensors of one block as they are stored: packed linears, and the rest in `Plan.kept_dtype`.

    folded: by name in the model, what replaces the checkpoint's values.
    """
    tensors = packed_tensors(plan, linears, solved)
    replaced = {plan.skeleton.names[name]: value.to("cpu") for name, value in (folded or {}).items()}
    packed = {f"{linear.source}.weight" for linear in linears.values()}
    for name in plan.tensors_of_block(index):
        if name not in packed:
            tensors[name] = replaced[name] if name in replaced else converted(plan, name, read_finite(plan, name))
    return tensors


def packed_tensors(plan: Plan, linears: Mapping[str, LinearPlan], solved: Mapping[str, Solved]) -> dict[str, Tensor]:
    """Quantized linears as they are stored, by the names of the tensors."""
    return {
        f"{linear.source}.{suffix}": tensor
        for name, linear in linears.items()
        for suffix, tensor in plan.format.pack(solved[name].weight.to("cpu")).items()
    }


def unpack_part(plan: Plan, linears: Mapping[str, LinearPlan], tensors: Mapping[str, Tensor]) -> dict[str, Solved]:
    """The quantized linears of a part that an earlier run wrote, without their errors."""
    solved = {}
    for name, linear in linears.items():
        own = {
            suffix: tensors[f"{linear.source}.{suffix}"]
            for suffix in plan.format.suffixes
            if f"{linear.source}.{suffix}" in tensors
        }
        weight = plan.format.unpack(own, linear.grid, linear.out_features, linear.in_features)
        solved[name] = Solved(weight, float("nan"), float("nan"))
    return solved


def put_back(plan: Plan, linears: Mapping[str, LinearPlan], solved: Mapping[str, Solved]) -> None:
    """Let the network go on with the quantized weights."""
    for name, value in replacements(plan, linears, solved).items():
        owner = plan.skeleton.model.get_submodule(name.removesuffix(".weight"))
        plan.skeleton.put(name, owner, "weight", value)


def replacements(plan: Plan, linears: Mapping[str, LinearPlan], solved: Mapping[str, Solved]) -> dict[str, Tensor]:
    """The dense weights that the stored codes stand for, by parameter name, laid out as the modules want them."""
    dense = {}
    for name, result in solved.items():
        full = linears[name].name
        weight_NK = result.weight.to(plan.skeleton.device).dequantize(plan.skeleton.dtypes[f"{full}.weight"])
        dense[f"{full}.weight"] = weight_as_NK(plan.skeleton.model.get_submodule(full), weight_NK).contiguous()
    return dense


def converted(plan: Plan, name: str, tensor: Tensor) -> Tensor:
    """A tensor that is copied, or a piece of it, in the dtype it is written in; UserError if that cannot hold it."""
    cast = tensor.to(plan.kept_dtype(plan.reader.info(name)))
    overflows = cast.dtype != tensor.dtype and all_finite(tensor) and not all_finite(cast)
    if overflows and name in plan.read_by_model:
        dtype = str(cast.dtype).removeprefix("torch.")
        raise UserError(
            f"{plan.path}: tensor '{name}' has values up to {tensor.abs().max():.3g}, which {dtype} cannot hold; use "
            "--dtype auto or bfloat16, with --restart"
        )
    return cast


def write_outside(plan: Plan, partial: PartialCheckpoint, report: ReportBuilder) -> None:
    """Copy the tensors that belong to no block, one after the other: embeddings, the last norm, the head.

    A linear among them that an override quantizes is rounded to nearest: what it reads is known only when the last
    block is done, and by then this part is written.
    """
    if partial.has_part(OUTSIDE):
        report.recall(partial.part_note(OUTSIDE))
        return
    linears = plan.outside
    solved = {}
    for name, linear in linears.items():
        with report.timed("solving"):
            solved[name] = round_alone(plan, linear)
        report.linear(linear, solved[name])
        if plan.recipe.needs_data:
            report.remark(name, "outside the decoder blocks: rounded to nearest, without calibration")
    with report.timed("writing"):
        streams: dict[str, Tensor | TensorStream] = {**packed_tensors(plan, linears, solved)}
        replaced = {f"{linear.source}.weight" for linear in linears.values()}
        streams |= {name: copied(plan, name) for name in plan.tensors_outside() if name not in replaced}
        partial.add_part(OUTSIDE, streams, report.note(linears.values()))


def copied(plan: Plan, name: str) -> TensorStream:
    """A tensor of the checkpoint as it is written where it is not quantized, read piece by piece."""
    info = plan.reader.info(name)

    def pieces() -> Iterator[memoryview]:
        for piece_P in _pieces(plan, name):
            yield piece_P.view(torch.uint8).numpy().data

    return TensorStream(dtype=plan.kept_dtype(info), shape=tuple(info.shape), chunks=pieces)


def verify_copies(folder: Path, plan: Plan, folded: Mapping[str, str]) -> None:
    """Reopen a finished folder and compare every tensor that is not quantized with the original's, byte for byte.

    folded: SHA-256 of parameters that AWQ's scales changed, by tensor name. UserError if one differs.
    """
    replaced = {f"{linear.source}.weight" for linear in plan.quantized}
    kept = [name for name in plan.reader.tensors if name not in replaced]
    check_copies(folder, {name: folded[name] if name in folded else copied(plan, name) for name in kept})


def rounded_at_load(plan: Plan) -> dict[str, str]:
    """Kept tensors whose values change when the model is loaded, by name -> what happened to them.

    A tensor in float32 beside bfloat16 ones is written as it is. transformers loads it in bfloat16, so calibration and
    comparison see it rounded, and an engine may not.
    """
    replaced = {f"{linear.source}.weight" for linear in plan.quantized}
    rounded = {}
    for name, source in plan.skeleton.names.items():
        info, loaded = plan.reader.info(source), plan.skeleton.dtypes[name]
        kept = plan.kept_dtype(info)
        fits = not kept.is_floating_point or torch.promote_types(kept, loaded) == loaded
        if source in replaced or fits:
            continue
        if not all(_is_exact(piece_P, loaded) for piece_P in _pieces(plan, source)):
            stored, narrow = (str(dtype).removeprefix("torch.") for dtype in (kept, loaded))
            rounded[source] = (
                f"kept in {stored}; calibration and comparison ran with it rounded to {narrow}, as transformers loads "
                "it"
            )
    return rounded


def _pieces(plan: Plan, name: str) -> Iterator[Tensor]:
    """A tensor of the checkpoint as it is written, piece by piece, [P] each; UserError if it is damaged."""
    info = plan.reader.info(name)
    for piece in plan.reader.chunks(name):
        tensor_P = torch.frombuffer(piece, dtype=info.dtype)
        check_finite(plan, name, tensor_P)
        yield converted(plan, name, tensor_P)


def _is_exact(values: Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(values.to(dtype).to(values.dtype), values)


def round_alone(plan: Plan, linear: LinearPlan) -> Solved:
    """A linear's own weight, read from the checkpoint and rounded to nearest."""
    weight = read_finite(plan, f"{linear.source}.weight")
    weight_NK = weight_as_NK(plan.skeleton.model.get_submodule(linear.name), weight)
    return solve_without_data(weight_NK, linear.grid, stored_numbers(plan))


def stored_numbers(plan: Plan) -> Stored:
    """How the format of a run wants its numbers."""
    return Stored(plan.scale_dtype, plan.format.min_zero)


def side_files(reader: CheckpointReader, out: Path) -> SideFiles:
    """What the folder of a checkpoint holds beside its weights; OUT may be one of its sub-folders. UserError for a file
    that loaders read and that cannot be read, or that is a link out of the folder."""
    folder = Path(os.path.realpath(reader.path))
    made = (reader.path / path.name for path in (real_path(out), partial_folder(out)) if path.parent == folder)
    found = find_side_files(reader.path, reader.check_link, tuple(made))
    for name in found.kept:
        if not os.access(reader.path / name, os.R_OK):
            raise UserError(f"{reader.path / name}: cannot be read; check its permissions")
    return found


def files_beside(reader: CheckpointReader) -> dict[str, bytes]:
    """The files of a checkpoint that belong to the model and say nothing about how its weights are stored."""
    kept = find_side_files(reader.path, reader.check_link).kept
    try:
        return {name: (reader.path / name).read_bytes() for name in kept}
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions") from None


def note_side_files(report: ReportBuilder, found: SideFiles) -> None:
    """Note which files beside the weights are not copied into OUT."""
    for name, what in found.incidents.items():
        report.incident(name, what)
    if found.remark:
        report.remark("beside the weights", found.remark)


def extra_files(plan: Plan) -> dict[str, bytes]:
    """Everything of OUT that is not weights."""
    files = files_beside(plan.reader)
    quantization = quantization_config(plan)
    config = without_storage_keys(plan.reader.config) | {"quantization_config": quantization}
    for key in {"dtype", "torch_dtype"} & config.keys() or {"dtype"}:
        config[key] = str(plan.dtype).removeprefix("torch.")
    files["config.json"] = as_json_bytes(config)
    if plan.format.config_file is not None:
        files[plan.format.config_file] = as_json_bytes(quantization)
    return files


def quantization_config(plan: Plan) -> dict[str, Any]:
    """What config.json will say; UserError if the loaders of the format could not tell the linears apart.

    Its default is the grid that most linears have: some loaders know no other.
    """
    uses = Counter(plan.skeleton.names.values())
    # The head of a model that ties it has no tensor of its own to be named after.
    specs = {
        linear.source if uses[f"{linear.source}.weight"] == 1 else linear.name: linear.spec for linear in plan.linears
    }
    ((default, _),) = Counter(linear.grid for linear in plan.quantized).most_common(1)
    damping = {"damp_percent": plan.recipe.damping, "static_groups": True} if plan.recipe.compensates else {}
    return plan.format.config(default, specs, meta=damping)


def as_json_bytes(content: Any) -> bytes:
    """Indented JSON in UTF-8, with a newline at the end; text that UTF-8 cannot hold, a lone surrogate, is escaped."""
    try:
        return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(content, indent=2).encode() + b"\n"
