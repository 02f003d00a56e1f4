"""What is in a checkpoint, from its headers alone: the linears by kind with their grids, and everything else.

No weight is read and no model is built, so that it takes no memory and works for models that transformers does not
know.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmquant.checkpoints.quantized import find_quantized_modules, parsed_quantization, storage_notes
from llmquant.checkpoints.reader import CheckpointReader
from llmquant.hub import resolve_model
from llmquant.pipeline.names import kind_of

DENSE_BYTES = 2
"""Bytes of a weight in 16 bit, the size that quantized weights are compared with."""
VECTORS = "norms, biases"


@dataclass(frozen=True)
class Row:
    """Modules or tensors of one kind, shape and storage."""

    kind: str
    count: int
    shape: tuple[int, ...]
    """(out_features, in_features) of a quantized linear, the tensor's own shape otherwise; () for vectors."""
    storage: str
    """The grid of a quantized linear, the dtype otherwise."""
    weights: int
    """Numbers, all of them together."""
    stored_bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.stored_bytes / max(self.weights, 1)


@dataclass(frozen=True)
class Contents:
    """A checkpoint, by kind."""

    path: Path
    architecture: str
    format: str | None
    """Name of the quantized format; None for a plain checkpoint."""
    num_shards: int
    quantized: tuple[Row, ...]
    """The quantized linears."""
    kept: tuple[Row, ...]
    """Everything that is not quantized."""
    notes: tuple[str, ...] = ()
    """What is unusual about the folder, a sentence each."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(row.stored_bytes for row in (*self.quantized, *self.kept))

    @property
    def dense_bytes(self) -> int:
        """The same with the quantized linears in 16 bit."""
        dense = sum(row.weights * DENSE_BYTES for row in self.quantized)
        return dense + sum(row.stored_bytes for row in self.kept)

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits per quantized weight; None for a plain checkpoint."""
        weights = sum(row.weights for row in self.quantized)
        return 8 * sum(row.stored_bytes for row in self.quantized) / weights if weights else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        totals = {name: getattr(self, name) for name in ("total_bytes", "dense_bytes", "bits_per_weight")}
        rows = {
            name: [asdict(row) | {"bits_per_weight": row.bits_per_weight} for row in getattr(self, name)]
            for name in ("quantized", "kept")
        }
        return asdict(self) | {"path": str(self.path)} | rows | totals


def inspect(model: str | Path) -> Contents:
    """The contents of a local folder or hub id, quantized or not; UserError if a header or the config is damaged."""
    reader = CheckpointReader(resolve_model(str(model)))
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
            dtype = str(info.dtype).removeprefix("torch.")
            row = Row(kind, 1, info.shape if matrix else (), dtype, math.prod(info.shape), info.nbytes)
            (matrices if matrix else vectors).append(row)
    return Contents(
        path=reader.path,
        architecture=next(iter(reader.config.get("architectures") or []), "unknown"),
        format=parsed.format.name if parsed else None,
        num_shards=len(reader.shards),
        quantized=tuple(_together(quantized)),
        kept=tuple(_together([*matrices, *vectors])),
        notes=storage_notes(reader),
    )


def _together(rows: Iterable[Row]) -> list[Row]:
    """One row for all that agree in kind, shape and storage, in the order of the first."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.kind, row.shape, row.storage), []).append(row)
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
