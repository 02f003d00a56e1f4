"""The model that a quantized checkpoint stands for, without llmquant's loader and kernels."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from llmquant.checkpoints.quantized import read_quantized, validate_quantized
from llmquant.checkpoints.reader import CheckpointReader
from llmquant.models.blocks import linears_of, weight_as_NK


def dequantized(original: Path, quantized: Path) -> torch.nn.Module:
    """Load the original model with transformers and put the dequantized weights of the checkpoint into it."""
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).eval()
    reader = CheckpointReader(quantized)
    linears = linears_of(model)
    replaced = 0
    for source, packed in validate_quantized(reader).items():
        name = next(name for name in linears if name == source or name.endswith(f".{source}"))
        dense = read_quantized(reader, packed).dequantize()
        with torch.no_grad():
            linears[name].weight.copy_(weight_as_NK(linears[name], dense))
        replaced += 1
    assert replaced
    return model
