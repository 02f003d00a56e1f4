"""From one format to another without a new rounding: codes, scales and zero-points stay what they are, or the
conversion is refused and says what would be lost. `dense` expands a checkpoint of any tool to plain weights.

Everything is read once before anything is written, so that a refusal costs no disk; then block after block is unpacked
and packed again, and the finished checkpoint is reopened and compared with what was read.

Letters: N out_features, K in_features, G groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmquant import __version__
from llmquant.checkpoints.copies import check_copies, tensor_digest
from llmquant.checkpoints.manifest import MANIFEST_FILE, read_manifest
from llmquant.checkpoints.out_folder import check_apart
from llmquant.checkpoints.quantized import (
    QuantizedModule,
    check_digests,
    find_quantized_modules,
    parsed_quantization,
    read_quantized,
)
from llmquant.checkpoints.reader import CheckpointReader
from llmquant.checkpoints.storage import without_storage_keys
from llmquant.checkpoints.writer import PartialCheckpoint, TensorStream, begun_request, check_out
from llmquant.errors import UserError
from llmquant.formats.format import Format
from llmquant.formats.registry import FORMATS
from llmquant.hub import resolve_model
from llmquant.models.blocks import linear_likes_of, linears_of, weight_as_NK
from llmquant.models.skeleton import DTYPES, build_empty, check_size, checkpoint_names, name_translator, read_config
from llmquant.paths import typed_inputs, typed_path
from llmquant.pipeline.names import block_of
from llmquant.pipeline.parts import OUTSIDE, as_json_bytes, files_beside, side_files
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

DENSE = "dense"
"""Not a format: plain weights."""

OnStep = Callable[[str, int, int], None]
"""(what is being done, linears done, linears in all)."""


@dataclass(frozen=True)
class Converted:
    """What a conversion did."""

    out: Path
    source_format: str
    format: str
    num_linears: int
    grids: dict[str, int]
    """Linears by their grid."""
    original_bytes: int
    output_bytes: int
    incidents: tuple[str, ...]
    """What did not go as asked."""
    remarks: tuple[str, ...]
    """What is worth knowing before the result is served."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"out": str(self.out)}


@dataclass(frozen=True)
class _Conversion:
    """A conversion, settled."""

    reader: CheckpointReader
    modules: dict[str, QuantizedModule]
    """The packed linears by their name in the checkpoint."""
    format: Format | None
    """None: plain weights."""
    dtype: torch.dtype
    """Of the model that is written."""
    casts: bool
    """What is not packed gets that dtype too."""
    model: Any
    """The model on the meta device."""
    linears: dict[str, str]
    """Name of a packed linear in the checkpoint -> its name in the model, where the model has it as a linear."""

    @property
    def kept(self) -> list[str]:
        """The tensors that are not packed, in the order of the checkpoint."""
        packed = {tensor for module in self.modules.values() for tensor in module.tensors.values()}
        return [name for name in self.reader.tensors if name not in packed]

    def read(self, name: str) -> QuantizedWeight:
        return read_quantized(self.reader, self.modules[name])

    def dense(self, name: str, weight: QuantizedWeight) -> Tensor:
        """The weight a linear's codes stand for, laid out as its module wants it."""
        weight_NK = weight.dequantize(self.dtype)
        if name in self.linears:
            weight_NK = weight_as_NK(self.model.get_submodule(self.linears[name]), weight_NK)
        return weight_NK.contiguous()

    def part_of(self, name: str) -> str:
        """The part that a tensor is written in: that of its block."""
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
    on_step: OnStep | None = None,
) -> Converted:
    """Write a quantized checkpoint (a folder or hub id, of any tool) into the folder OUT in another format.

    format: a name of `FORMATS`, or `dense`. dtype: of a dense result. Raises UserError where something would be lost.
    """
    out, step = typed_path(out), on_step or (lambda *_: None)
    check_out(out, overwrite=overwrite, restart=restart, reads=typed_inputs(source))
    plan = _settle(source, format, dtype, trust_remote_code)
    beside, folder = side_files(plan.reader, out), plan.reader.path
    check_apart(out, [folder, *plan.reader.shards, *(folder / name for name in beside.kept)])
    request = None
    if not restart and begun_request(out) is not None:
        request = _request(plan, format)
        check_out(out, overwrite=overwrite, request=request)
    specs, digests, moving, remarks = _check(plan, step)
    config = _config(plan, specs, moving)
    request = request or _request(plan, format)
    with PartialCheckpoint.open(out, request, restart=restart, overwrite=overwrite) as partial:
        order = [] if partial.is_finishing else _write_parts(plan, specs, partial, step)
        folder = partial.assemble(order, _files(plan, config), manifest=_manifest(plan, request))
        if plan.format is None:
            check_copies(folder, {f"{name}.weight": digest for name, digest in digests.items()})
        else:
            check_digests(folder, digests)
        check_copies(folder, {name: _kept(plan, name) for name in plan.kept})
        partial.publish()
    return Converted(
        out=out,
        source_format=next(iter(plan.modules.values())).format.name,
        format=format,
        num_linears=len(plan.modules),
        grids=dict(Counter(spec.describe() for spec in specs.values())),
        original_bytes=plan.reader.total_bytes,
        output_bytes=sum(file.stat().st_size for file in out.glob("*.safetensors")),
        incidents=tuple(f"{name}: {what}" for name, what in beside.incidents.items()),
        remarks=(*plan.reader.notes, *remarks, *([beside.remark] if beside.remark else [])),
    )


def _request(plan: _Conversion, format: str) -> dict[str, Any]:
    """Everything that the result depends on. Reads the source once, to hash it."""
    return {
        "llmquant": __version__,
        "convert": format,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "model": plan.reader.file_hashes(),
    }


def _settle(source: str | Path, format: str, dtype: str, trust_remote_code: bool) -> _Conversion:
    if format != DENSE and format not in FORMATS:
        raise UserError(f"format '{format}': not one of {', '.join([*FORMATS, DENSE])}; use --format gptq")
    if dtype != "auto" and (dtype not in DTYPES or format != DENSE):
        rule = f"not one of auto, {', '.join(DTYPES)}" if format == DENSE else "only --format dense has a choice"
        raise UserError(f"dtype '{dtype}': {rule}; use --dtype auto")
    reader = CheckpointReader(resolve_model(str(source), trust_remote_code))
    parsed = parsed_quantization(reader)
    if parsed is None:
        raise UserError(f"{reader.path}: not quantized, so there is nothing to convert; use llmquant quantize")
    modules = find_quantized_modules(reader, parsed)
    config = read_config(reader.path, trust_remote_code)
    stored = config.dtype if config.dtype in DTYPES.values() else torch.float16
    check_size(config, reader)
    model = build_empty(config, stored, trust_remote_code)
    translate, known = name_translator(model), linears_of(model)
    names = {name: (translate(f"{name}.weight") or name).removesuffix(".weight") for name in modules}
    return _Conversion(
        reader=reader,
        modules=modules,
        format=FORMATS.get(format),
        dtype=stored if dtype == "auto" else DTYPES[dtype],
        casts=dtype != "auto",
        model=model,
        linears={source: name for source, name in names.items() if name in known},
    )


def _check(plan: _Conversion, step: OnStep) -> tuple[dict[str, QuantSpec], dict[str, str], bool, list[str]]:
    """Read every linear: its grid as it will be stored, its digest, whether groups move, and what to remark.

    UserError names the first linear that the format cannot hold exactly.
    """
    specs, digests = {}, {}
    symmetric, moving, rounded = True, False, 0
    for index, (name, module) in enumerate(plan.modules.items()):
        step("checking", index, len(plan.modules))
        weight = plan.read(name)
        symmetric &= bool((weight.zero_NG == module.spec.mid_code).all())
        moving |= weight.group_index_K is not None
        rounded += not torch.equal(weight.scale_NG.to(plan.dtype).float(), weight.scale_NG.float())
        specs[name] = module.spec
        if plan.format is None:
            digests[name] = tensor_digest(plan.dense(name, weight))
        else:
            _pack(plan.format, name, weight)
            digests[name] = weight.digest()
    step("checking", len(plan.modules), len(plan.modules))
    if symmetric:
        # AWQ cannot say that its zero-points are all in the middle, and few engines load gptq unless it is said.
        specs = {name: replace(spec, symmetric=True) for name, spec in specs.items()}
    remarks = []
    if plan.format is not None and rounded:
        dtype = str(plan.dtype).removeprefix("torch.")
        remarks.append(
            f"{rounded} linears have scales that are not exact in {dtype}, the dtype in config.json: an engine that "
            f"computes in {dtype} rounds them when it loads"
        )
    return specs, digests, moving, remarks


def _pack(format: Format, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """The stored tensors by their full names; UserError names the linear."""
    try:
        return {f"{name}.{suffix}": tensor for suffix, tensor in format.pack(weight).items()}
    except UserError as error:
        raise UserError(f"{name}: cannot be converted to {format.name} exactly: {error}") from None


def _write_parts(
    plan: _Conversion, specs: Mapping[str, QuantSpec], partial: PartialCheckpoint, step: OnStep
) -> list[str]:
    """Write the parts that are not there yet; their names in order."""
    kept: dict[str, list[str]] = {OUTSIDE: []}
    linears: dict[str, list[str]] = {OUTSIDE: []}
    for name in plan.kept:
        kept.setdefault(plan.part_of(name), []).append(name)
    for name in plan.modules:
        linears.setdefault(plan.part_of(name), []).append(name)
    order = [OUTSIDE, *sorted((kept.keys() | linears.keys()) - {OUTSIDE})]
    done = 0
    for part in order:
        names = linears.get(part, [])
        if not partial.has_part(part):
            tensors: dict[str, Tensor | TensorStream] = {name: _kept(plan, name) for name in kept.get(part, [])}
            for name in names:
                step("converting", done, len(plan.modules))
                weight = replace(plan.read(name), spec=specs[name])
                if plan.format is None:
                    tensors[f"{name}.weight"] = plan.dense(name, weight)
                else:
                    tensors |= _pack(plan.format, name, weight)
                done += 1
            partial.add_part(part, tensors)
        else:
            done += len(names)
    step("converting", done, len(plan.modules))
    return order


def _kept(plan: _Conversion, name: str) -> TensorStream:
    """A tensor that is not packed: copied piece by piece, or cast."""
    info = plan.reader.info(name)
    if not plan.casts or info.dtype not in DTYPES.values():
        return TensorStream(dtype=info.dtype, shape=info.shape, chunks=lambda: plan.reader.chunks(name))

    def cast() -> Iterator[memoryview]:
        for piece in plan.reader.chunks(name):
            yield torch.frombuffer(piece, dtype=info.dtype).to(plan.dtype).view(torch.uint8).numpy().data

    return TensorStream(dtype=plan.dtype, shape=info.shape, chunks=cast)


def _config(plan: _Conversion, specs: Mapping[str, QuantSpec], moving: bool) -> dict[str, Any] | None:
    """The new `quantization_config`; UserError if the loaders of the format could not tell the linears apart."""
    if plan.format is None:
        return None
    sources = {name: source for source, name in plan.linears.items()}
    stored = checkpoint_names(plan.model, plan.reader.tensors)
    uses = Counter(stored.values())
    every: dict[str, QuantSpec | None] = {}
    for name in linear_likes_of(plan.model):
        weight = stored.get(f"{name}.weight")
        if name in sources:
            every[sources[name]] = specs[sources[name]]
        else:
            # A tied head has no tensor of its own to be named after.
            every[weight.removesuffix(".weight") if weight and uses[weight] == 1 else name] = None
    every |= {name: spec for name, spec in specs.items() if name not in every}
    ((default, _),) = Counter(specs.values()).most_common(1)
    return plan.format.config(default, every, **({"moving_groups": True} if moving else {}))


def _files(plan: _Conversion, quantization: dict[str, Any] | None) -> dict[str, bytes]:
    """Everything of OUT that is not weights."""
    config = without_storage_keys(plan.reader.config)
    if plan.casts:
        for key in {"dtype", "torch_dtype"} & config.keys():
            config[key] = str(plan.dtype).removeprefix("torch.")
    files = files_beside(plan.reader)
    if quantization is not None:
        config["quantization_config"] = quantization
        assert plan.format is not None
        if plan.format.config_file is not None:
            files[plan.format.config_file] = as_json_bytes(quantization)
    return files | {"config.json": as_json_bytes(config)}


def _manifest(plan: _Conversion, request: dict[str, Any]) -> dict[str, Any]:
    """How OUT was made; and how what it was made of was made, where that is known."""
    if not (plan.reader.path / MANIFEST_FILE).is_file():
        return {"request": request}
    source = read_manifest(plan.reader.path)
    del source["files"]
    return {"request": request, "source": source}
