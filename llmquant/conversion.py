"""Conversion of a quantized checkpoint to another format, without rounding again.

Codes, scales and zero-points stay the same. If the new format cannot hold them exactly, the conversion is refused, and
the message says what would be lost. The format `dense` stores the dequantized weights.

Every linear is read and checked before anything is written, so that a refusal leaves no files. Then each block is
unpacked and packed again, and the written tensors are read and compared with the source.

Letters: N out_features, K in_features, G groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmquant.checkpoints.copies import check_copies, tensor_digest
from llmquant.checkpoints.manifest import MANIFEST_FILE, read_manifest
from llmquant.checkpoints.out_folder import check_no_overlap
from llmquant.checkpoints.quantized import (
    QuantizedModule,
    check_digests,
    find_quantized_modules,
    parsed_quantization,
    read_quantized,
)
from llmquant.checkpoints.reader import CheckpointReader
from llmquant.checkpoints.storage import without_storage_keys
from llmquant.checkpoints.unfinished import check_out_folder, unfinished_request
from llmquant.checkpoints.writer import PartialCheckpoint, StreamedTensor
from llmquant.errors import UserError
from llmquant.formats.format import Format
from llmquant.formats.registry import FORMATS
from llmquant.hub import resolve_model
from llmquant.humanize import dtype_name
from llmquant.models.blocks import linear_likes_of, linears_of, weight_as_NK
from llmquant.models.skeleton import (
    MODEL_DTYPES,
    build_empty,
    check_num_blocks,
    checkpoint_names,
    name_translator,
    read_config,
)
from llmquant.module_names import block_of
from llmquant.paths import existing_paths, parse_path
from llmquant.pipeline.output import OUTSIDE, as_json_bytes, files_beside, side_files
from llmquant.progress import OnProgress, Phase, Progress, ignore_progress
from llmquant.spec import QuantSpec
from llmquant.version import __version__
from llmquant.weight import QuantizedWeight

DENSE = "dense"
"""The format name for dequantized weights. It is not an entry of `FORMATS`."""


@dataclass(frozen=True)
class Converted:
    """The result of a conversion."""

    out: Path
    source_format: str
    format: str
    num_linears: int
    grids: dict[str, int]
    """Number of linears on each grid."""
    original_bytes: int
    output_bytes: int
    fallbacks: tuple[str, ...]
    """Files beside the weights that could not be copied."""
    notes: tuple[str, ...]
    """Facts to know before the result is served."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict for JSON."""
        return asdict(self) | {"out": str(self.out)}


@dataclass(frozen=True)
class _Conversion:
    """A conversion whose arguments have been checked."""

    reader: CheckpointReader
    modules: dict[str, QuantizedModule]
    """The packed linears, by name in the checkpoint."""
    format: Format | None
    """The new format; None for dense weights."""
    dtype: torch.dtype
    """Dtype of the model that is written."""
    casts: bool
    """Whether tensors that are not packed are cast to that dtype too."""
    model: Any
    """The model on the meta device."""
    linears: dict[str, str]
    """Name of a packed linear in the checkpoint -> its name in the model, for those that are linears of the model."""

    @property
    def unpacked_tensors(self) -> list[str]:
        """The tensors that are not packed, in the order of the checkpoint."""
        packed = {tensor for module in self.modules.values() for tensor in module.tensors.values()}
        return [name for name in self.reader.tensors if name not in packed]

    def read(self, name: str) -> QuantizedWeight:
        return read_quantized(self.reader, self.modules[name])

    def dense(self, name: str, weight: QuantizedWeight) -> Tensor:
        """Dequantize a linear into the layout of its module."""
        weight_NK = weight.dequantize(self.dtype)
        if name in self.linears:
            weight_NK = weight_as_NK(self.model.get_submodule(self.linears[name]), weight_NK)
        return weight_NK.contiguous()

    def part_of(self, name: str) -> str:
        """Return the name of the part for a tensor or linear. Each decoder block has one part."""
        index = block_of(name)
        return OUTSIDE if index is None else f"block-{index:05d}"


def convert(
    source: str | Path,
    out: str | Path,
    format: str,
    *,
    dtype: str = "auto",
    overwrite: bool = False,
    restart: bool = False,
    trust_remote_code: bool = False,
    on_progress: OnProgress = ignore_progress,
) -> Converted:
    """Write a quantized checkpoint (a folder or hub id, from any tool) into the folder OUT in another format.

    format: a name of `FORMATS`, or `dense`. dtype: the dtype of a dense result. Raises UserError if something would be
    lost.
    """
    out = parse_path(out)
    check_out_folder(out, overwrite=overwrite, restart=restart, inputs=existing_paths(source))
    conversion = _check_arguments(source, format, dtype, trust_remote_code)
    beside, folder = side_files(conversion.reader, out), conversion.reader.path
    check_no_overlap(out, [folder, *conversion.reader.shards, *(folder / name for name in beside.copied)])
    request = None
    if not restart and unfinished_request(out) is not None:
        request = _request(conversion, format)
        check_out_folder(out, overwrite=overwrite, request=request)
    checked = _check_linears(conversion, on_progress)
    config = _config(conversion, checked.specs, has_act_order_groups=checked.has_act_order_groups)
    request = request or _request(conversion, format)
    with PartialCheckpoint.open(out, request, restart=restart, overwrite=overwrite) as partial:
        order = [] if partial.is_finishing else _write_parts(conversion, checked.specs, partial, on_progress)
        folder = partial.assemble(order, _files(conversion, config), manifest=_manifest(conversion, request))
        if conversion.format is None:
            check_copies(folder, {f"{name}.weight": digest for name, digest in checked.digests.items()})
        else:
            check_digests(folder, checked.digests)
        check_copies(folder, {name: _copied(conversion, name) for name in conversion.unpacked_tensors})
        partial.publish()
    return Converted(
        out=out,
        source_format=next(iter(conversion.modules.values())).format.name,
        format=format,
        num_linears=len(conversion.modules),
        grids=dict(Counter(spec.describe() for spec in checked.specs.values())),
        original_bytes=conversion.reader.total_bytes,
        output_bytes=sum(file.stat().st_size for file in out.glob("*.safetensors")),
        fallbacks=tuple(f"{name}: {what}" for name, what in beside.fallbacks.items()),
        notes=(*conversion.reader.notes, *checked.notes, *([beside.note] if beside.note else [])),
    )


def _request(conversion: _Conversion, format: str) -> dict[str, Any]:
    """Return everything that the result depends on. The source is read once, to hash it."""
    return {
        "llmquant": __version__,
        "convert": format,
        "dtype": dtype_name(conversion.dtype),
        "model": conversion.reader.file_hashes(),
    }


def _check_arguments(source: str | Path, format: str, dtype: str, trust_remote_code: bool) -> _Conversion:
    if format != DENSE and format not in FORMATS:
        raise UserError(f"format '{format}': not one of {', '.join([*FORMATS, DENSE])}; use --format gptq")
    if dtype != "auto" and (dtype not in MODEL_DTYPES or format != DENSE):
        rule = f"not one of auto, {', '.join(MODEL_DTYPES)}" if format == DENSE else "only --format dense has a choice"
        raise UserError(f"dtype '{dtype}': {rule}; use --dtype auto")
    reader = CheckpointReader(resolve_model(str(source), trust_remote_code))
    parsed = parsed_quantization(reader)
    if parsed is None:
        raise UserError(f"{reader.path}: not quantized, so there is nothing to convert; use llmquant quantize")
    modules = find_quantized_modules(reader, parsed)
    config = read_config(reader.path, trust_remote_code)
    stored = config.dtype if config.dtype in MODEL_DTYPES.values() else torch.float16
    check_num_blocks(config, reader)
    model = build_empty(config, stored, trust_remote_code)
    translate, known = name_translator(model), linears_of(model)
    names = {name: (translate(f"{name}.weight") or name).removesuffix(".weight") for name in modules}
    return _Conversion(
        reader=reader,
        modules=modules,
        format=FORMATS.get(format),
        dtype=stored if dtype == "auto" else MODEL_DTYPES[dtype],
        casts=dtype != "auto",
        model=model,
        linears={source: name for source, name in names.items() if name in known},
    )


@dataclass(frozen=True)
class _CheckedLinears:
    """The linears of a conversion, after each has been read and packed once."""

    specs: dict[str, QuantSpec]
    """The grids as they will be stored, by name in the checkpoint."""
    digests: dict[str, str]
    """SHA-256 of the codes, scales, zero-points and groups, or of the dense weight."""
    has_act_order_groups: bool
    """Whether the groups of at least one linear follow the column order of GPTQ's act-order."""
    notes: list[str]


def _check_linears(conversion: _Conversion, on_progress: OnProgress) -> _CheckedLinears:
    """Read and pack every linear. Raises UserError for the first that the format cannot hold exactly."""
    specs, digests = {}, {}
    is_symmetric, has_act_order_groups, num_rounded = True, False, 0
    total = len(conversion.modules)
    for index, (name, module) in enumerate(conversion.modules.items()):
        on_progress(Progress(Phase.CHECKING, index, total))
        weight = conversion.read(name)
        is_symmetric &= bool((weight.zero_NG == module.spec.mid_code).all())
        has_act_order_groups |= weight.group_index_K is not None
        num_rounded += not torch.equal(weight.scale_NG.to(conversion.dtype).float(), weight.scale_NG.float())
        specs[name] = module.spec
        if conversion.format is None:
            digests[name] = tensor_digest(conversion.dense(name, weight))
        else:
            _pack(conversion.format, name, weight)
            digests[name] = weight.digest()
    on_progress(Progress(Phase.CHECKING, total, total))
    if is_symmetric:
        # The AWQ format cannot record that a grid is symmetric, and few engines load asymmetric gptq checkpoints.
        specs = {name: replace(spec, symmetric=True) for name, spec in specs.items()}
    notes = []
    if conversion.format is not None and num_rounded:
        dtype = dtype_name(conversion.dtype)
        notes.append(
            f"{num_rounded} linears have scales that are not exact in {dtype}, the dtype in config.json: an engine "
            f"that computes in {dtype} rounds them when it loads"
        )
    return _CheckedLinears(specs, digests, has_act_order_groups, notes)


def _pack(format: Format, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return the stored tensors of a linear, by full name. Raises UserError if the format cannot hold it exactly."""
    try:
        return {f"{name}.{suffix}": tensor for suffix, tensor in format.pack(weight).items()}
    except UserError as error:
        raise UserError(f"{name}: cannot be converted to {format.name} exactly: {error}") from None


def _write_parts(
    conversion: _Conversion, specs: Mapping[str, QuantSpec], partial: PartialCheckpoint, on_progress: OnProgress
) -> list[str]:
    """Write the parts that are missing, and return the names of all parts in order."""
    copied: dict[str, list[str]] = {OUTSIDE: []}
    linears: dict[str, list[str]] = {OUTSIDE: []}
    for name in conversion.unpacked_tensors:
        copied.setdefault(conversion.part_of(name), []).append(name)
    for name in conversion.modules:
        linears.setdefault(conversion.part_of(name), []).append(name)
    order = [OUTSIDE, *sorted((copied.keys() | linears.keys()) - {OUTSIDE})]
    done = 0
    for part in order:
        names = linears.get(part, [])
        if not partial.has_part(part):
            tensors: dict[str, Tensor | StreamedTensor] = {
                name: _copied(conversion, name) for name in copied.get(part, [])
            }
            for name in names:
                on_progress(Progress(Phase.CONVERTING, done, len(conversion.modules)))
                weight = replace(conversion.read(name), spec=specs[name])
                if conversion.format is None:
                    tensors[f"{name}.weight"] = conversion.dense(name, weight)
                else:
                    tensors |= _pack(conversion.format, name, weight)
                done += 1
            partial.add_part(part, tensors)
        else:
            done += len(names)
    on_progress(Progress(Phase.CONVERTING, done, len(conversion.modules)))
    return order


def _copied(conversion: _Conversion, name: str) -> StreamedTensor:
    """Return a tensor that is not packed, to be copied or cast in chunks."""
    info = conversion.reader.info(name)
    if not conversion.casts or info.dtype not in MODEL_DTYPES.values():
        return StreamedTensor(dtype=info.dtype, shape=info.shape, chunks=lambda: conversion.reader.chunks(name))

    def cast() -> Iterator[memoryview]:
        for piece in conversion.reader.chunks(name):
            yield torch.frombuffer(piece, dtype=info.dtype).to(conversion.dtype).view(torch.uint8).numpy().data

    return StreamedTensor(dtype=conversion.dtype, shape=info.shape, chunks=cast)


def _config(
    conversion: _Conversion, specs: Mapping[str, QuantSpec], *, has_act_order_groups: bool
) -> dict[str, Any] | None:
    """Return the new `quantization_config`. Raises UserError if loaders could not distinguish the linears."""
    if conversion.format is None:
        return None
    sources = {name: source for source, name in conversion.linears.items()}
    stored = checkpoint_names(conversion.model, conversion.reader.tensors)
    uses = Counter(stored.values())
    every: dict[str, QuantSpec | None] = {}
    for name in linear_likes_of(conversion.model):
        weight = stored.get(f"{name}.weight")
        if name in sources:
            every[sources[name]] = specs[sources[name]]
        else:
            # A tied head has no tensor of its own, so it is listed under its name in the model.
            every[weight.removesuffix(".weight") if weight and uses[weight] == 1 else name] = None
    every |= {name: spec for name, spec in specs.items() if name not in every}
    ((default, _),) = Counter(specs.values()).most_common(1)
    return conversion.format.config(default, every, **({"act_order_groups": True} if has_act_order_groups else {}))


def _files(conversion: _Conversion, quantization: dict[str, Any] | None) -> dict[str, bytes]:
    """Return the contents of all files of OUT but the weights, by name."""
    config = without_storage_keys(conversion.reader.config)
    if conversion.casts:
        for key in {"dtype", "torch_dtype"} & config.keys():
            config[key] = dtype_name(conversion.dtype)
    files = files_beside(conversion.reader)
    if quantization is not None:
        config["quantization_config"] = quantization
        assert conversion.format is not None
        if conversion.format.config_file is not None:
            files[conversion.format.config_file] = as_json_bytes(quantization)
    return files | {"config.json": as_json_bytes(config)}


def _manifest(conversion: _Conversion, request: dict[str, Any]) -> dict[str, Any]:
    """Return the request of the conversion, and the manifest of the source if it has one."""
    if not (conversion.reader.path / MANIFEST_FILE).is_file():
        return {"request": request}
    source = read_manifest(conversion.reader.path)
    del source["files"]
    return {"request": request, "source": source}
