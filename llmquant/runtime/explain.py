"""Which kernel backend each linear of a checkpoint would get on a device, told from the headers alone."""

from __future__ import annotations

from pathlib import Path

from llmquant.checkpoints.quantized import find_quantized_modules, parsed_quantization
from llmquant.checkpoints.reader import CheckpointReader
from llmquant.errors import UserError
from llmquant.hub import resolve_model
from llmquant.kernels.dispatch import Choice, explain_choice
from llmquant.kernels.layout import LinearShape
from llmquant.models.blocks import device_of
from llmquant.models.skeleton import DTYPES, read_config, stored_dtype


def explain_backends(model: str | Path, *, device: str = "auto", dtype: str = "auto") -> dict[str, Choice]:
    """The choice for every quantized linear by name, as `load` would make it; UserError if there is none."""
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"dtype '{dtype}': not one of auto, {', '.join(DTYPES)}; use --dtype auto")
    reader = CheckpointReader(resolve_model(str(model)))
    parsed = parsed_quantization(reader)
    if parsed is None:
        raise UserError(f"{reader.path}: is not quantized, its linears are torch's; leave out --backends")
    target = device_of(device)
    runs_in = stored_dtype(read_config(reader.path), reader) if dtype == "auto" else DTYPES[dtype]
    choices = {}
    for name, module in find_quantized_modules(reader, parsed).items():
        grid = parsed.grid_of(name)
        moving = grid is not None and grid.moving_groups
        layer = LinearShape.planned(module.out_features, module.in_features, module.spec, moving)
        choices[name] = explain_choice(layer, target, runs_in)
    return choices
