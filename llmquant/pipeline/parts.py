"""What a run puts on the disk: the parts it writes block by block, and the files that stand beside the weights.

A part holds all tensors of one decoder block as they are stored. What belongs to no block (embeddings, the last norm,
the head) is one part too, copied piece by piece.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from llmquant.checkpoints.writer import PartialCheckpoint, TensorStream
from llmquant.models.blocks import weight_as_NK
from llmquant.models.skeleton import DTYPES
from llmquant.pipeline.plan import LinearPlan, Plan, check_finite, read_finite
from llmquant.pipeline.report import ReportBuilder
from llmquant.pipeline.solve import Solved

# Files beside the weights that belong to the model: tokenizer, generation settings, licence; code only if it is used.
KEPT_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken")
KEPT_NAMES = ("LICENSE", "LICENSE.md", "NOTICE", "USE_POLICY.md")


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
    """All tensors of one block as they are stored: packed linears, and the rest in the model's dtype.

    folded: by name in the model, what replaces the checkpoint's values.
    """
    tensors: dict[str, Tensor] = {}
    replaced = {plan.skeleton.names[name]: value.to("cpu") for name, value in (folded or {}).items()}
    packed = {f"{linear.source}.weight" for linear in linears.values()}
    for name in plan.tensors_of_block(index):
        if name not in packed:
            tensors[name] = replaced[name] if name in replaced else converted(plan, read_finite(plan, name))
    for name, linear in linears.items():
        for suffix, tensor in plan.format.pack(solved[name].weight.to("cpu")).items():
            tensors[f"{linear.source}.{suffix}"] = tensor
    return tensors


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
        weight_NK = result.weight.to(plan.skeleton.device).dequantize(plan.skeleton.dtype)
        dense[f"{full}.weight"] = weight_as_NK(plan.skeleton.model.get_submodule(full), weight_NK).contiguous()
    return dense


def converted(plan: Plan, tensor: Tensor) -> Tensor:
    """A tensor that is kept, in the dtype of the model that is written."""
    return tensor.to(plan.dtype) if tensor.dtype in DTYPES.values() else tensor


def write_outside(plan: Plan, partial: PartialCheckpoint, report: ReportBuilder) -> None:
    """Copy the tensors that belong to no block, one after the other: embeddings, the last norm, the head."""
    if partial.has_part("outside"):
        return

    def pieces(name: str, dtype: torch.dtype) -> Callable[[], Iterable[memoryview]]:
        def read() -> Iterable[memoryview]:
            for piece in plan.reader.chunks(name):
                tensor_P = torch.frombuffer(piece, dtype=dtype)
                check_finite(plan, name, tensor_P)
                yield converted(plan, tensor_P).view(torch.uint8).numpy().data

        return read

    with report.timed("writing"):
        streams = {}
        for name, info in plan.tensors_outside().items():
            dtype = plan.dtype if info.dtype in DTYPES.values() else info.dtype
            streams[name] = TensorStream(dtype=dtype, shape=tuple(info.shape), chunks=pieces(name, info.dtype))
        partial.add_part("outside", streams)


def extra_files(plan: Plan) -> dict[str, bytes]:
    """Everything of OUT that is not weights."""
    files = {}
    for file in sorted(plan.path.iterdir()):
        kept = file.suffix in KEPT_SUFFIXES or file.name in KEPT_NAMES
        if kept and file.is_file() and not file.name.endswith(".index.json"):
            files[file.name] = file.read_bytes()
    if plan.reader.config.get("auto_map"):
        files |= {file.name: file.read_bytes() for file in sorted(plan.path.glob("*.py"))}
    quantization = quantization_config(plan)
    config = plan.reader.config | {"quantization_config": quantization}
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = str(plan.dtype).removeprefix("torch.")
    files["config.json"] = as_json_bytes(config)
    if plan.format.config_file is not None:
        files[plan.format.config_file] = as_json_bytes(quantization)
    return files


def quantization_config(plan: Plan) -> dict[str, Any]:
    """What config.json will say; UserError if the loaders of the format could not tell the linears apart."""
    specs = {linear.source: linear.spec for linear in plan.linears}
    damping = {"damp_percent": plan.recipe.damping, "static_groups": True} if plan.recipe.compensates else {}
    return plan.format.config(plan.recipe.spec, specs, meta=damping)


def as_json_bytes(content: Any) -> bytes:
    """Indented JSON with a newline at the end."""
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"
