"""The files of a run: the parts that it writes block by block, and the files beside the weights.

A part holds all tensors of one decoder block as they are stored. The tensors that belong to no block (embeddings, the
last norm, the head) form one more part, which is copied piece by piece.
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
from llmquant.checkpoints.writer import StreamedTensor
from llmquant.errors import UserError
from llmquant.humanize import dtype_name
from llmquant.models.blocks import weight_as_NK
from llmquant.models.finite import all_finite, check_finite, read_finite
from llmquant.paths import partial_folder, real_path
from llmquant.pipeline.run import Run
from llmquant.planning.linears import LinearPlan
from llmquant.planning.plan import Plan
from llmquant.report.run_log import RunLog
from llmquant.solver.quantize_linear import LinearResult, round_without_data, storage_limits
from llmquant.weight import QuantizedWeight

OUTSIDE = "outside"
"""The name of the part with the tensors that belong to no block."""


def part_names(plan: Plan) -> list[str]:
    """Return the name of each block's part, in order."""
    return [f"block-{index:05d}" for index in range(len(plan.block_names))]


def pack_part(
    plan: Plan,
    index: int,
    linears: Mapping[str, LinearPlan],
    results: Mapping[str, LinearResult],
    folded: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return all tensors of a block as they are stored: packed linears, and the rest in `Plan.unquantized_dtype`.

    folded: the parameters that AWQ's scales changed, which replace those of the checkpoint, by name in the model.
    """
    tensors = packed_tensors(plan, linears, results)
    replaced = {plan.skeleton.names[name]: value.to("cpu") for name, value in (folded or {}).items()}
    packed = {f"{linear.checkpoint_name}.weight" for linear in linears.values()}
    for name in plan.tensors_of_block(index):
        if name not in packed:
            tensors[name] = (
                replaced[name] if name in replaced else converted(plan, name, read_finite(plan.skeleton, name))
            )
    return tensors


def packed_tensors(
    plan: Plan, linears: Mapping[str, LinearPlan], results: Mapping[str, LinearResult]
) -> dict[str, Tensor]:
    """Return the stored tensors of quantized linears, by tensor name, in CPU memory; they are packed on the device."""
    device = plan.skeleton.device
    return {
        f"{linear.checkpoint_name}.{suffix}": tensor.to("cpu")
        for name, linear in linears.items()
        for suffix, tensor in plan.format.pack(results[name].weight.to(device)).items()
    }


def unpack_part(
    plan: Plan, linears: Mapping[str, LinearPlan], tensors: Mapping[str, Tensor]
) -> dict[str, QuantizedWeight]:
    """Return the quantized linears of a part that an earlier run has written."""
    weights = {}
    for name, linear in linears.items():
        own = {
            suffix: tensors[f"{linear.checkpoint_name}.{suffix}"]
            for suffix in plan.format.suffixes
            if f"{linear.checkpoint_name}.{suffix}" in tensors
        }
        weights[name] = plan.format.unpack(own, linear.quant_spec, linear.out_features, linear.in_features)
    return weights


def install_dequantized(plan: Plan, linears: Mapping[str, LinearPlan], weights: Mapping[str, QuantizedWeight]) -> None:
    """Put the dequantized weights into the model, so that later layers get their inputs from quantized layers."""
    for name, value in dense_weights(plan, linears, weights).items():
        owner = plan.skeleton.model.get_submodule(name.removesuffix(".weight"))
        plan.skeleton.put(name, owner, "weight", value)


def dense_weights(
    plan: Plan, linears: Mapping[str, LinearPlan], weights: Mapping[str, QuantizedWeight]
) -> dict[str, Tensor]:
    """Dequantize weights. Returns dense tensors by parameter name, in the dtype and layout of the modules."""
    dense = {}
    for name, weight in weights.items():
        full = linears[name].name
        weight_NK = weight.to(plan.skeleton.device).dequantize(plan.skeleton.dtypes[f"{full}.weight"])
        dense[f"{full}.weight"] = weight_as_NK(plan.skeleton.model.get_submodule(full), weight_NK).contiguous()
    return dense


def converted(plan: Plan, name: str, tensor: Tensor) -> Tensor:
    """Cast a copied tensor, or a piece of it, to its stored dtype. Raises UserError if values are too large for it."""
    cast = tensor.to(plan.unquantized_dtype(plan.reader.info(name)))
    overflows = cast.dtype != tensor.dtype and all_finite(tensor) and not all_finite(cast)
    if overflows and name in plan.skeleton.used_tensors:
        dtype = dtype_name(cast.dtype)
        raise UserError(
            f"{plan.path}: tensor '{name}' has values up to {tensor.abs().max():.3g}, which {dtype} cannot hold; use "
            "--dtype auto or bfloat16, with --restart"
        )
    return cast


def write_outside(run: Run) -> None:
    """Copy the tensors that belong to no block, one after the other: embeddings, the last norm, the head.

    If an override quantizes a linear among them, the linear is rounded to nearest: its input is known only after the
    last block, and this part is written before the first.
    """
    plan, partial, log = run.plan, run.checkpoint, run.log
    if partial.has_part(OUTSIDE):
        log.restore(partial.part_note(OUTSIDE))
        return
    linears = plan.quantized_outside_blocks
    results = {}
    for name, linear in linears.items():
        with log.timed("solving"):
            results[name] = round_alone(plan, linear)
        run.record_linear(linear, results[name], results[name].weight.digest())
        if plan.recipe.needs_data:
            log.note(name, "outside the decoder blocks: rounded to nearest, without calibration")
    with log.timed("writing"):
        streams: dict[str, Tensor | StreamedTensor] = {**packed_tensors(plan, linears, results)}
        replaced = {f"{linear.checkpoint_name}.weight" for linear in linears.values()}
        streams |= {name: copied(plan, name) for name in plan.tensors_outside() if name not in replaced}
        partial.add_part(OUTSIDE, streams, log.record_of(linears.values()))


def copied(plan: Plan, name: str) -> StreamedTensor:
    """Return an unquantized tensor as it is written, to be read piece by piece."""
    info = plan.reader.info(name)

    def pieces() -> Iterator[memoryview]:
        for piece_P in _pieces(plan, name):
            yield piece_P.view(torch.uint8).numpy().data

    return StreamedTensor(dtype=plan.unquantized_dtype(info), shape=tuple(info.shape), chunks=pieces)


def verify_copies(folder: Path, plan: Plan, folded: Mapping[str, str]) -> None:
    """Reopen a finished folder and compare every unquantized tensor with the one to be written, byte for byte.

    folded: SHA-256 of the parameters that AWQ's scales changed, by tensor name. Raises UserError if one differs.
    """
    replaced = {f"{linear.checkpoint_name}.weight" for linear in plan.quantized}
    kept = [name for name in plan.reader.tensors if name not in replaced]
    check_copies(folder, {name: folded[name] if name in folded else copied(plan, name) for name in kept})


def rounded_at_load(plan: Plan) -> dict[str, str]:
    """Return the unquantized tensors whose values change when the model is loaded: tensor name -> explanation.

    A float32 tensor in a bfloat16 model is written in float32. transformers loads it in bfloat16, so calibration and
    comparison use rounded values, while an engine may use the exact ones.
    """
    replaced = {f"{linear.checkpoint_name}.weight" for linear in plan.quantized}
    rounded = {}
    for name, source in plan.skeleton.names.items():
        info, loaded = plan.reader.info(source), plan.skeleton.dtypes[name]
        stored = plan.unquantized_dtype(info)
        fits = not stored.is_floating_point or torch.promote_types(stored, loaded) == loaded
        if source in replaced or fits:
            continue
        if not all(_is_exact(piece_P, loaded) for piece_P in _pieces(plan, source)):
            rounded[source] = (
                f"stored in {dtype_name(stored)}; calibration and comparison used it rounded to {dtype_name(loaded)}, "
                "as transformers loads it"
            )
    return rounded


def _pieces(plan: Plan, name: str) -> Iterator[Tensor]:
    """Yield the pieces [P] of a copied tensor in its stored dtype. Raises UserError if the tensor is damaged."""
    info = plan.reader.info(name)
    for piece in plan.reader.chunks(name):
        tensor_P = torch.frombuffer(piece, dtype=info.dtype)
        check_finite(plan.skeleton, name, tensor_P)
        yield converted(plan, name, tensor_P)


def _is_exact(values: Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(values.to(dtype).to(values.dtype), values)


def round_alone(plan: Plan, linear: LinearPlan) -> LinearResult:
    """Read a linear's weight from the checkpoint and round it to nearest on the device."""
    weight = read_finite(plan.skeleton, f"{linear.checkpoint_name}.weight").to(plan.skeleton.device)
    weight_NK = weight_as_NK(plan.skeleton.model.get_submodule(linear.name), weight)
    return round_without_data(weight_NK, linear.quant_spec, storage_limits(plan))


def side_files(reader: CheckpointReader, out: Path) -> SideFiles:
    """Return the files of a checkpoint's folder beside its weights. OUT is not listed if it is a sub-folder.

    Raises UserError if a file to copy is unreadable, or if a file that loaders read is a link out of the folder.
    """
    folder = Path(os.path.realpath(reader.path))
    created = (reader.path / path.name for path in (real_path(out), partial_folder(out)) if path.parent == folder)
    found = find_side_files(reader.path, reader.check_link, tuple(created))
    for name in found.copied:
        if not os.access(reader.path / name, os.R_OK):
            raise UserError(f"{reader.path / name}: cannot be read; check its permissions")
    return found


def files_beside(reader: CheckpointReader) -> dict[str, bytes]:
    """Return the contents of the model's files that do not describe the storage of its weights, by name."""
    kept = find_side_files(reader.path, reader.check_link).copied
    try:
        return {name: (reader.path / name).read_bytes() for name in kept}
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions") from None


def note_side_files(report: RunLog, found: SideFiles) -> None:
    """Record which files beside the weights are not copied into OUT."""
    for name, what in found.fallbacks.items():
        report.fallback(name, what)
    if found.note:
        report.note("beside the weights", found.note)


def extra_files(plan: Plan) -> dict[str, bytes]:
    """Return the contents of OUT's configuration files and of the files copied into it, by name."""
    files = files_beside(plan.reader)
    quantization = quantization_config(plan)
    config = without_storage_keys(plan.reader.config) | {"quantization_config": quantization}
    for key in {"dtype", "torch_dtype"} & config.keys() or {"dtype"}:
        config[key] = dtype_name(plan.dtype)
    files["config.json"] = as_json_bytes(config)
    if plan.format.config_file is not None:
        files[plan.format.config_file] = as_json_bytes(quantization)
    return files


def quantization_config(plan: Plan) -> dict[str, Any]:
    """Return the `quantization_config`. Raises UserError if it cannot describe the grids to the format's loaders.

    Its default is the most frequent grid, because some loaders read only the default.
    """
    uses = Counter(plan.skeleton.names.values())
    # A tied head has no tensor of its own, so its module name is used.
    specs = {
        linear.checkpoint_name if uses[f"{linear.checkpoint_name}.weight"] == 1 else linear.name: linear.spec
        for linear in plan.linears
    }
    ((default, _),) = Counter(linear.quant_spec for linear in plan.quantized).most_common(1)
    damping = {"damp_percent": plan.recipe.damping, "static_groups": True} if plan.recipe.uses_gptq else {}
    return plan.format.config(default, specs, meta=damping)


def as_json_bytes(content: Any) -> bytes:
    """Return indented JSON with a final newline, in UTF-8, or in ASCII if a lone surrogate does not fit UTF-8."""
    try:
        return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(content, indent=2).encode() + b"\n"
