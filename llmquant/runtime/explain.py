"""Report the kernel backend of each linear of a checkpoint on a device, and tune the Triton kernel for its shapes.

Only the headers of the checkpoint are read, not the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llmquant.checkpoints.quantized import find_quantized_modules, parsed_quantization
from llmquant.checkpoints.reader import CheckpointReader
from llmquant.errors import UserError
from llmquant.hub import resolve_model
from llmquant.kernels.dispatch import BACKENDS, BackendChoice, explain_choice
from llmquant.kernels.layout import LinearShape
from llmquant.kernels.tiles import ROW_BUCKETS, buckets_of, is_table
from llmquant.kernels.tune import tune_tiles
from llmquant.models.blocks import parse_device
from llmquant.models.skeleton import MODEL_DTYPES, read_config, stored_dtype
from llmquant.paths import check_output_file, parse_path


@dataclass(frozen=True)
class PlannedLinears:
    """The quantized linears that `load` would create from a checkpoint."""

    shapes: dict[str, LinearShape]
    """Shape and grid of each linear, by its name in the checkpoint."""
    device: torch.device
    """The device on which they would run."""
    dtype: torch.dtype
    """The dtype in which they would compute."""


def planned_linears(
    model: str | Path, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
) -> PlannedLinears:
    """Return the quantized linears that `load` would create. Raises UserError if the checkpoint is not quantized."""
    if dtype != "auto" and dtype not in MODEL_DTYPES:
        raise UserError(f"dtype '{dtype}': not one of auto, {', '.join(MODEL_DTYPES)}; use --dtype auto")
    reader = CheckpointReader(resolve_model(str(model), trust_remote_code))
    parsed = parsed_quantization(reader)
    if parsed is None:
        raise UserError(
            f"{reader.path}: is not quantized, and backends run quantized linears only; give a quantized checkpoint"
        )
    shapes = {}
    for name, module in find_quantized_modules(reader, parsed).items():
        grid = parsed.grid_of(name)
        act_order_groups = grid is not None and grid.act_order_groups
        shapes[name] = LinearShape.of_sizes(module.out_features, module.in_features, module.spec, act_order_groups)
    if dtype == "auto":
        model_dtype = stored_dtype(read_config(reader.path, trust_remote_code), reader)
    else:
        model_dtype = MODEL_DTYPES[dtype]
    return PlannedLinears(shapes, parse_device(device), model_dtype)


def explain_backends(
    model: str | Path, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
) -> dict[str, BackendChoice]:
    """Return the backend that `load` would choose for each quantized linear of a checkpoint, by the linear's name."""
    planned = planned_linears(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    return {name: explain_choice(shape, planned.device, planned.dtype) for name, shape in planned.shapes.items()}


def parse_rows(text: str | None) -> tuple[int, ...]:
    """Return the numbers of rows of a list such as `1,16,64`; all buckets for None. Raises UserError for other text."""
    if text is None:
        return ROW_BUCKETS
    numbers = text.split(",")
    if not all(number.strip().isdecimal() and int(number) > 0 for number in numbers):
        raise UserError(f"--rows {text}: must be numbers from 1 up, separated by commas; use --rows 1,16,64")
    return tuple(map(int, numbers))


def tune_model(
    model: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    rows: Sequence[int] = ROW_BUCKETS,
    max_seconds: float | None = None,
    path: Path | None = None,
    trust_remote_code: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Find the fastest tiles of the Triton kernel for every shape of a checkpoint on this GPU.

    The tiles are written to a table, whose path is returned.

    rows: numbers of rows of x to tune for. max_seconds: start no measurement after this time; None for no limit. path:
    file to write; the default is the user's table for this GPU, which later runs read. report: called with each line of
    output. Raises UserError if the kernel cannot run here.
    """
    if max_seconds is not None and not max_seconds > 0:
        raise UserError(f"seconds {max_seconds}: must be above 0; use --seconds 60, or leave it out for no limit")
    if path is not None:
        path = parse_path(path)
        check_output_file(path, "--out", is_table)
    planned = planned_linears(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    for name, shape in planned.shapes.items():
        if (refusal := BACKENDS["triton"].refuses(shape, planned.device, planned.dtype)) is not None:
            raise UserError(f"tune: the Triton kernel cannot run {name} here ({refusal}); a CPU needs no tuning")
    return tune_tiles(
        list(dict.fromkeys(planned.shapes.values())),
        planned.dtype,
        planned.device,
        buckets=buckets_of(rows),
        max_seconds=max_seconds,
        path=path,
        report=report,
    )
