"""The quantized linears of a checkpoint, whichever tool wrote it.

Finding them checks every header against `quantization_config` without reading weights; reading one checks its values.
A linear counts as quantized if its packed tensor is there: configurations also cover linears that their tool left in
16 bit without saying so, but none may exclude a linear that is packed.

Letters: N out_features, K in_features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmquant.checkpoints.reader import OLD_CONFIG_FILES, CheckpointReader
from llmquant.checkpoints.storage import packed_tensor, refuse_other_storage
from llmquant.errors import UserError
from llmquant.formats.format import Format, ParsedQuantization
from llmquant.formats.registry import FORMATS, parse_quantization_config
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight


@dataclass(frozen=True, kw_only=True)
class QuantizedModule:
    """A linear as it lies on disk."""

    name: str
    format: Format
    spec: QuantSpec
    out_features: int
    in_features: int
    tensors: dict[str, str]
    """Suffix -> name of the tensor."""


def parsed_quantization(reader: CheckpointReader) -> ParsedQuantization | None:
    """What the checkpoint's configuration says about its packed linears, or None if none is packed.

    UserError if its weights are stored in a way that is not decoded here, if nothing says how they are packed, or if
    the configuration cannot be understood.
    """
    refuse_other_storage(reader.path, reader.tensors)
    packed = packed_tensor(reader.tensors)
    if packed is None:
        return None
    config = reader.quantization_config
    if config is None:
        raise UserError(
            f"{reader.path}: '{packed}' is packed, but config.json has no quantization_config that says how, nor is "
            f"there {' or '.join(OLD_CONFIG_FILES)}; restore the one that its tool wrote"
        )
    try:
        return parse_quantization_config(config)
    except UserError as error:
        raise UserError(f"{reader.path / reader.quantization_file}: {error}") from None


def refuse_quantized(reader: CheckpointReader) -> None:
    """UserError if the weights of a checkpoint are not plain floating-point numbers of 16 bits or more."""
    refuse_other_storage(reader.path, reader.tensors)
    if (packed := packed_tensor(reader.tensors)) is not None:
        method = (reader.quantization_config or {}).get("quant_method", "unknown")
        raise UserError(
            f"{reader.path}: already quantized (quant_method '{method}'): '{packed}' is packed; give the original "
            "checkpoint"
        )


def storage_notes(reader: CheckpointReader) -> tuple[str, ...]:
    """The notes of a reader, and one about a `quantization_config` that its plain weights contradict."""
    config = reader.quantization_config
    if config is None or packed_tensor(reader.tensors) is not None:
        return reader.notes
    method = config.get("quant_method", "unknown")
    return (
        *reader.notes,
        f"{reader.quantization_file} describes a quantization (quant_method '{method}'), but the weights are not "
        "packed: it is ignored, and the checkpoint is read as not quantized",
    )


def find_quantized_modules(reader: CheckpointReader, parsed: ParsedQuantization) -> dict[str, QuantizedModule]:
    """Every packed linear by module name, in the order of the checkpoint, with dtypes and shapes checked."""
    format = parsed.format
    own, foreign = set(format.suffixes), _foreign_suffixes(format)
    found: dict[str, dict[str, str]] = {}
    for name in reader.tensors:
        module, _, suffix = name.rpartition(".")
        if suffix in own:
            found.setdefault(module, {})[suffix] = name
        elif suffix in foreign:
            raise UserError(
                f"{reader.path}: {name} belongs to {foreign[suffix]}, but config.json says {format.name}; "
                "correct quantization_config"
            )
    return {module: _check_module(reader, parsed, module, tensors) for module, tensors in found.items()}


def read_quantized(reader: CheckpointReader, module: QuantizedModule) -> QuantizedWeight:
    """The weight of a packed linear, with its values checked; UserError names the tensor."""
    tensors = {suffix: reader.read(name) for suffix, name in module.tensors.items()}
    try:
        return module.format.unpack(tensors, module.spec, module.out_features, module.in_features)
    except UserError as error:
        raise UserError(f"{reader.path}: {module.name}.{error}") from None


def validate_quantized(reader: CheckpointReader) -> dict[str, QuantizedModule]:
    """Checks everything about a quantized checkpoint, values too (reads all of it, one linear at a time)."""
    parsed = parsed_quantization(reader)
    if parsed is None:
        raise UserError(f"{reader.path}: no tensor is packed; this is not a quantized checkpoint")
    modules = find_quantized_modules(reader, parsed)
    for module in modules.values():
        read_quantized(reader, module)
    return modules


def check_digests(out: Path, digests: Mapping[str, str]) -> None:
    """Reopen a checkpoint as any reader would and compare its packed linears with what they should be; UserError if one
    differs. digests: name in the checkpoint -> `QuantizedWeight.digest()`."""
    reader = CheckpointReader(out)
    parsed = parsed_quantization(reader)
    packed = {} if parsed is None else find_quantized_modules(reader, parsed)
    for name, digest in digests.items():
        if name not in packed or read_quantized(reader, packed[name]).digest() != digest:
            raise UserError(
                f"{out}: '{name}' does not come back from the disk as it was solved; "
                "do not use this folder, check the disk, and begin anew with --restart"
            )


def _check_module(
    reader: CheckpointReader, parsed: ParsedQuantization, module: str, names: dict[str, str]
) -> QuantizedModule:
    grid = parsed.grid_of(module)
    if grid is None:
        raise UserError(
            f"{reader.path}: {next(iter(names.values()))} is packed, but config.json leaves {module} in 16 bit; "
            "correct quantization_config"
        )
    if f"{module}.weight" in reader.tensors:
        raise UserError(
            f"{reader.path}: {module} has both weight and {next(iter(names.values()))}; one of them must go"
        )
    index = parsed.format.group_index
    if grid.moving_groups and index not in names:
        raise UserError(
            f"{reader.path}: {module}.{index}: missing, though config.json says that groups move (act-order)"
        )
    try:
        out_features, in_features = parsed.format.features(_headers(reader, names), grid.spec)
    except UserError as error:
        raise UserError(f"{reader.path}: {module}.{error}") from None
    return QuantizedModule(
        name=module,
        format=parsed.format,
        spec=grid.spec,
        out_features=out_features,
        in_features=in_features,
        tensors=names,
    )


def _headers(reader: CheckpointReader, names: dict[str, str]) -> dict[str, Tensor]:
    """Stand-ins without memory; a tensor that tells a shape is tiny, and is read."""
    tensors = {}
    for suffix, name in names.items():
        info = reader.info(name)
        if suffix.endswith("_shape") and info.nbytes <= 64:
            tensors[suffix] = reader.read(name)
        else:
            tensors[suffix] = torch.empty(info.shape, dtype=info.dtype, device="meta")
    return tensors


def _foreign_suffixes(format: Format) -> dict[str, str]:
    return {
        suffix: other.name for other in FORMATS.values() for suffix in other.suffixes if suffix not in format.suffixes
    }
