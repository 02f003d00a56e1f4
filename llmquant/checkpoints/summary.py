"""Summarize a checkpoint from its headers: the quantized linears by kind with their grids, and all other tensors.

No weight is read and no model is built, so a summary needs little memory, and it works for models that transformers
does not support.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmquant.checkpoints.quantized import find_quantized_modules, parsed_quantization, storage_notes
from llmquant.checkpoints.reader import CheckpointReader
from llmquant.grouping import grouped
from llmquant.humanize import dtype_name
from llmquant.module_names import kind_of

DENSE_BYTES = 2
"""Bytes of a 16-bit weight, for comparison with the quantized size."""
VECTORS = "norms, biases"
"""Kind of all tensors with fewer than two dimensions."""


@dataclass(frozen=True)
class Row:
    """All modules or tensors of the same kind, shape and storage."""

    kind: str
    """Module name without block index, such as "mlp.down_proj"."""
    count: int
    shape: tuple[int, ...]
    """(out_features, in_features) of a quantized linear, the shape of another tensor, or () for vectors."""
    storage: str
    """The grid of a quantized linear, such as "4-bit g128 sym", or the dtype of another tensor."""
    weights: int
    """Number of weights in all modules or tensors of the row."""
    stored_bytes: int
    """Bytes on disk of all modules or tensors of the row."""

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.stored_bytes / max(self.weights, 1)


@dataclass(frozen=True)
class Contents:
    """The contents of a checkpoint, grouped by kind."""

    path: Path
    architecture: str
    format: str | None
    """Name of the quantized format; None for a checkpoint that is not quantized."""
    num_shards: int
    quantized: tuple[Row, ...]
    """The quantized linears."""
    unquantized: tuple[Row, ...]
    """All other tensors."""
    notes: tuple[str, ...] = ()
    """Unusual facts about the folder, one sentence each."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(row.stored_bytes for row in (*self.quantized, *self.unquantized))

    @property
    def dense_bytes(self) -> int:
        """Bytes of all tensors if the quantized linears were stored in 16 bit."""
        dense = sum(row.weights * DENSE_BYTES for row in self.quantized)
        return dense + sum(row.stored_bytes for row in self.unquantized)

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits per quantized weight; None for a checkpoint that is not quantized."""
        weights = sum(row.weights for row in self.quantized)
        return 8 * sum(row.stored_bytes for row in self.quantized) / weights if weights else None

    def to_dict(self) -> dict[str, Any]:
        """Return the contents as JSON values."""
        totals = {name: getattr(self, name) for name in ("total_bytes", "dense_bytes", "bits_per_weight")}
        rows = {
            name: [asdict(row) | {"bits_per_weight": row.bits_per_weight} for row in getattr(self, name)]
            for name in ("quantized", "unquantized")
        }
        return asdict(self) | {"path": str(self.path)} | rows | totals


def inspect(folder: Path) -> Contents:
    """Summarize a local folder, quantized or not. Raises UserError if a header or the configuration is damaged."""
    reader = CheckpointReader(folder)
    parsed = parsed_quantization(reader)
    modules = find_quantized_modules(reader, parsed) if parsed else {}
    quantized, packed = [], set()
    for module in modules.values():
        packed |= set(module.tensors.values())
        quantized.append(
            Row(
                kind_of(module.name),
                1,
                (module.out_features, module.in_features),
                module.spec.describe(),
                module.out_features * module.in_features,
                sum(reader.info(tensor).nbytes for tensor in module.tensors.values()),
            )
        )
    matrices: list[Row] = []
    vectors: list[Row] = []
    for name, info in reader.tensors.items():
        if name not in packed:
            matrix = len(info.shape) > 1
            kind = kind_of(name.removesuffix(".weight")) if matrix else VECTORS
            dtype = dtype_name(info.dtype)
            row = Row(kind, 1, info.shape if matrix else (), dtype, math.prod(info.shape), info.nbytes)
            (matrices if matrix else vectors).append(row)
    return Contents(
        path=reader.path,
        architecture=next(iter(reader.config.get("architectures") or []), "unknown"),
        format=parsed.format.name if parsed else None,
        num_shards=len(reader.shards),
        quantized=tuple(_merge_rows(quantized)),
        unquantized=tuple(_merge_rows([*matrices, *vectors])),
        notes=storage_notes(reader),
    )


def _merge_rows(rows: Iterable[Row]) -> list[Row]:
    """Merge the rows of the same kind, shape and storage, in the order of their first occurrence."""
    groups = grouped(rows, lambda row: (row.kind, row.shape, row.storage))
    return [
        Row(
            kind,
            sum(row.count for row in group),
            shape,
            storage,
            sum(row.weights for row in group),
            sum(row.stored_bytes for row in group),
        )
        for (kind, shape, storage), group in groups.items()
    ]
