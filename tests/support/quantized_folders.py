"""Fixture of the tests of saving: folders with quantized tiny models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llmquant
from llmquant import Options, Override, QuantSpec, Recipe


@pytest.fixture(scope="session")
def quantized(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function: `quantized("llama", "gptq", bits=…, symmetric=…, overrides=…, dtype=…, seed=…)` -> folder.

    Tests share the folders and must not write into them.
    """
    folders: dict[object, Path] = {}

    def make(
        architecture: str = "llama",
        format: str = "gptq",
        *,
        bits: int = 4,
        symmetric: bool = True,
        overrides: tuple[Override, ...] = (),
        dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
    ) -> Path:
        key = (architecture, format, bits, symmetric, overrides, dtype, seed)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("quantized") / "out"
            spec = QuantSpec(bits=bits, group_size=32, symmetric=symmetric)
            recipe = Recipe(method="rtn", spec=spec, overrides=overrides)
            model = tiny_model(architecture, dtype=dtype, seed=seed)
            llmquant.quantize(model, folders[key], recipe, Options(format=format, verify=False))
        return folders[key]

    return make
