"""Which kernel backend each linear of a checkpoint would get on a device, told from the headers alone; and tiles
measured for their shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from llmquant.checkpoints.quantized import find_quantized_modules, parsed_quantization
from llmquant.checkpoints.reader import CheckpointReader
from llmquant.errors import UserError
from llmquant.hub import resolve_model
from llmquant.kernels.dispatch import BACKENDS, Choice, explain_choice
from llmquant.kernels.layout import LinearShape
from llmquant.kernels.tiles import is_table
from llmquant.kernels.tune import tune
from llmquant.models.blocks import device_of
from llmquant.models.skeleton import DTYPES, read_config, stored_dtype
from llmquant.paths import check_file, typed_path


@dataclass(frozen=True)
class Planned:
    """The quantized linears of a checkpoint, and where and in what dtype they would run."""

    layers: dict[str, LinearShape]
    device: torch.device
    dtype: torch.dtype


def planned_linears(
    model: str | Path, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
) -> Planned:
    """What `load` would make of a checkpoint; UserError if nothing in it is quantized."""
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"dtype '{dtype}': not one of auto, {', '.join(DTYPES)}; use --dtype auto")
    reader = CheckpointReader(resolve_model(str(model), trust_remote_code))
    parsed = parsed_quantization(reader)
    if parsed is None:
        raise UserError(f"{reader.path}: is not quantized, its linears are torch's; give a quantized checkpoint")
    layers = {}
    for name, module in find_quantized_modules(reader, parsed).items():
        grid = parsed.grid_of(name)
        moving = grid is not None and grid.moving_groups
        layers[name] = LinearShape.planned(module.out_features, module.in_features, module.spec, moving)
    runs_in = stored_dtype(read_config(reader.path, trust_remote_code), reader) if dtype == "auto" else DTYPES[dtype]
    return Planned(layers, device_of(device), runs_in)


def explain_backends(
    model: str | Path, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
) -> dict[str, Choice]:
    """The choice for every quantized linear by name, as `load` would make it."""
    planned = planned_linears(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    return {name: explain_choice(layer, planned.device, planned.dtype) for name, layer in planned.layers.items()}


def tune_model(
    model: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    path: Path | None = None,
    trust_remote_code: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Measure the Triton kernel's tiles for every shape of a checkpoint on the GPU that is here; the table's path.

    path: default is the user's own table, which is read before the shipped ones. Raises UserError without a GPU that
    the kernel runs on.
    """
    if path is not None:
        path = typed_path(path)
        check_file(path, "--out", is_table)
    planned = planned_linears(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    for name, layer in planned.layers.items():
        if (why := BACKENDS["triton"].refuses(layer, planned.device, planned.dtype)) is not None:
            raise UserError(f"tune: the Triton kernel cannot run {name} here ({why}); a CPU needs no tuning")
    return tune(list(dict.fromkeys(planned.layers.values())), planned.dtype, planned.device, path=path, report=report)
