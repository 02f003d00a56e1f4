"""Histograms of the weights and codes of the linears with the largest errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llmquant.checkpoints.quantized import find_quantized_modules, parsed_quantization, read_quantized
from llmquant.checkpoints.reader import CheckpointReader
from llmquant.planning.plan import Plan

NUM_LINEARS, NUM_BINS = 3, 48
"""Number of linears with histograms, and bins of a weight histogram."""


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """The histograms of one linear."""

    name: str
    """Module name in the model."""
    largest: float
    """Largest absolute weight of the original. The bins cover -largest to largest evenly."""
    weights: tuple[int, ...]
    """Number of original weights in each of NUM_BINS bins."""
    codes: tuple[int, ...]
    """Number of uses of each code from 0 to 2**bits - 1."""


def histograms(folder: Path, plan: Plan, names: Sequence[str]) -> tuple[Histogram, ...]:
    """Return the histograms of linears of a finished folder. names: module names in the model."""
    reader = CheckpointReader(folder)
    parsed = parsed_quantization(reader)
    assert parsed is not None
    packed = find_quantized_modules(reader, parsed)
    linears = {linear.name: linear for linear in plan.quantized}
    drawn = []
    for name in names:
        weight = plan.reader.read(f"{linears[name].checkpoint_name}.weight").float()
        largest = max(weight.abs().max().item(), 1e-30)
        codes_NK = read_quantized(reader, packed[linears[name].checkpoint_name]).codes_NK
        counts = torch.bincount(codes_NK.flatten(), minlength=2 ** linears[name].quant_spec.bits)
        drawn.append(
            Histogram(
                name=name,
                largest=largest,
                weights=tuple(int(n) for n in torch.histc(weight, NUM_BINS, -largest, largest)),
                codes=tuple(counts.tolist()),
            )
        )
    return tuple(drawn)
