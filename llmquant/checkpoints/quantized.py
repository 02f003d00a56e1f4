"""Find and read the quantized linears of a checkpoint that any tool wrote.

`find_quantized_modules` checks all headers against `quantization_config` without reading weights. `read_quantized`
checks the values of one linear. A linear is quantized if its packed tensor exists: a configuration may also cover
linears that its tool left in 16 bit, but it must not exclude a packed linear.

Letters: N out_features, K in_features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmquant.checkpoints.reader import OLD_CONFIG_FILES, CheckpointReader
from llmquant.checkpoints.storage import packed_tensor, refuse_unsupported_storage
from llmquant.errors import UserError
from llmquant.formats.format import Format, ParsedQuantization
from llmquant.formats.registry import FORMATS, parse_quantization_config
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight


@dataclass(frozen=True, kw_only=True)
class QuantizedModule:
    """A packed linear of a checkpoint, whose tensors have not been read."""

    name: str
    """Module name in the checkpoint."""
    format: Format
    spec: QuantSpec
    out_features: int
    in_features: int
    tensors: dict[str, str]
    """Suffix -> full name of the stored tensor."""


def parsed_quantization(reader: CheckpointReader) -> ParsedQuantization | None:
    """Return the parsed configuration of a checkpoint, or None if no linear is packed.

    Raises UserError if the storage of the weights is not supported, or if the configuration is missing or not valid.
    """
    refuse_unsupported_storage(reader.path, reader.tensors)
    packed = packed_tensor(reader.tensors)
    if packed is None:
        return None
    config = reader.quantization_config
    if config is None:
        raise UserError(
            f"{reader.path}: '{packed}' is packed, but config.json has no quantization_config that says how, and there "
            f"is no {' or '.join(OLD_CONFIG_FILES)}; restore the file that its tool wrote"
        )
    try:
        return parse_quantization_config(config)
    except UserError as error:
        raise UserError(f"{reader.path / reader.quantization_file}: {error}") from None


def refuse_quantized(reader: CheckpointReader) -> None:
    """Raise UserError if the weights of a checkpoint are not plain floating-point numbers of 16 bits or more."""
    refuse_unsupported_storage(reader.path, reader.tensors)
    if (packed := packed_tensor(reader.tensors)) is not None:
        method = (reader.quantization_config or {}).get("quant_method", "unknown")
        raise UserError(
            f"{reader.path}: already quantized (quant_method '{method}'): '{packed}' is packed; give the original "
            "checkpoint"
        )


def storage_notes(reader: CheckpointReader) -> tuple[str, ...]:
    """Return the notes of a reader, plus a note if plain weights contradict a `quantization_config`."""
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
    """Return all packed linears by module name, in the order of the checkpoint. Raises UserError if the headers do
    not agree with the configuration."""
    format = parsed.format
    foreign = _foreign_suffixes(format)
    tensors_of: dict[str, dict[str, str]] = {}
    for name in reader.tensors:
        module, _, suffix = name.rpartition(".")
        if suffix in format.suffixes:
            tensors_of.setdefault(module, {})[suffix] = name
        elif suffix in foreign:
            raise UserError(
                f"{reader.path}: {name} belongs to {foreign[suffix]}, but config.json says {format.name}; "
                "correct quantization_config"
            )
    return {module: _check_module(reader, parsed, module, tensors) for module, tensors in tensors_of.items()}


def read_quantized(
    reader: CheckpointReader, module: QuantizedModule, device: torch.device | str = "cpu"
) -> QuantizedWeight:
    """Read the weight of a packed linear, unpack it on the device, and check its values.

    Raises UserError if a value is invalid.
    """
    tensors = {suffix: reader.read(name).to(device) for suffix, name in module.tensors.items()}
    try:
        return module.format.unpack(tensors, module.spec, module.out_features, module.in_features)
    except UserError as error:
        raise UserError(f"{reader.path}: {module.name}.{error}") from None


def validate_quantized(reader: CheckpointReader) -> dict[str, QuantizedModule]:
    """Check a quantized checkpoint, including all values, and return its packed linears. Reads one linear at a time."""
    parsed = parsed_quantization(reader)
    if parsed is None:
        raise UserError(f"{reader.path}: no tensor is packed; this is not a quantized checkpoint")
    modules = find_quantized_modules(reader, parsed)
    for module in modules.values():
        read_quantized(reader, module)
    return modules


def check_digests(out: Path, digests: Mapping[str, str], device: torch.device | str = "cpu") -> None:
    """Read packed linears of a finished checkpoint and compare them. Raises UserError if one is missing or differs.

    digests: module name in the checkpoint -> `QuantizedWeight.digest()`. device: unpacks the codes.
    """
    reader = CheckpointReader(out)
    parsed = parsed_quantization(reader)
    packed = {} if parsed is None else find_quantized_modules(reader, parsed)
    for name, digest in digests.items():
        if name not in packed or read_quantized(reader, packed[name], device).digest() != digest:
            raise UserError(
                f"{out}: '{name}' read back from the disk differs from the written one; "
                "do not use this folder, check the disk, and begin anew with --restart"
            )


def _check_module(
    reader: CheckpointReader, parsed: ParsedQuantization, module: str, names: dict[str, str]
) -> QuantizedModule:
    try:
        grid = parsed.grid_of(module)
    except UserError as error:
        raise UserError(f"{reader.path / reader.quantization_file}: {error}") from None
    if grid is None:
        raise UserError(
            f"{reader.path}: {next(iter(names.values()))} is packed, but config.json leaves {module} in 16 bit; "
            "correct quantization_config"
        )
    if f"{module}.weight" in reader.tensors:
        raise UserError(f"{reader.path}: {module} has both weight and {next(iter(names.values()))}; remove one of them")
    index = parsed.format.group_index
    if grid.act_order_groups and index not in names:
        raise UserError(
            f"{reader.path}: {module}.{index}: missing, but config.json says that groups are in act-order; "
            "restore the tensor, or correct quantization_config"
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
    """Return meta tensors with the stored dtypes and shapes. A `weight_shape` tensor is small and is read."""
    tensors = {}
    for suffix, name in names.items():
        info = reader.info(name)
        if suffix.endswith("_shape") and info.nbytes <= 64:
            tensors[suffix] = reader.read(name)
        else:
            tensors[suffix] = torch.empty(info.shape, dtype=info.dtype, device="meta")
    return tensors


def _foreign_suffixes(format: Format) -> dict[str, str]:
    """Return suffix -> name of its format, for the suffixes that only other formats use."""
    return {
        suffix: other.name for other in FORMATS.values() for suffix in other.suffixes if suffix not in format.suffixes
    }
