"""What is said of grids that were chosen to a budget, and how a size is read."""

from __future__ import annotations

import re
from typing import Any

from llmquant.errors import UserError
from llmquant.spec import QuantSpec

_UNITS = {"": 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def parse_size(text: str) -> int:
    """Bytes, from 5GB, 750MB or 4.5GiB; UserError otherwise."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2] not in _UNITS:
        raise UserError(f"target_size '{text}': not a size; use --target-size 5GB, or 750MB, or 4.5GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def allocation_facts(allocation: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines for the end of a run: what was chosen, and beside it what one grid for all would be."""
    chosen = allocation["chosen"]
    facts = [
        (
            "budget",
            f"{chosen['bits_per_weight']:.3f} of {allocation['target_bits_per_weight']:.3f} bits per weight, "
            f"estimated loss {chosen['loss']:.4g}",
        )
    ]
    for one in allocation["uniform"]:
        spec = QuantSpec(**{key: one[key] for key in ("bits", "group_size", "symmetric")})
        bits = f"{one['bits_per_weight']:.3f} bits"
        facts.append(("budget", f"{spec.describe()} everywhere: {bits}, estimated loss {one['loss']:.4g}"))
    return facts
