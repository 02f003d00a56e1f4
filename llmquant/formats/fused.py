"""Linears that the engines run as one: vLLM and SGLang put their weights side by side at load.

Parts of one such set must have one grid, or be left in 16 bit together; and where a configuration names linears, an
engine may look up the fused name. The names are those of transformers' models; a model that fuses them itself (a
`qkv_proj` on disk) has nothing to put together.
"""

from __future__ import annotations

from collections.abc import Mapping

from llmquant.spec import QuantSpec

FUSED: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
"""Name in an engine -> names of its parts, side by side under one parent."""


def fused_sets(names: Mapping[str, object]) -> dict[str, tuple[str, ...]]:
    """Full fused name -> full names of its parts, of every set that is complete among these linears."""
    parents = dict.fromkeys(name.rpartition(".")[0] for name in names)
    candidates = {
        f"{parent}.{fused}": tuple(f"{parent}.{part}" for part in parts)
        for parent in parents
        for fused, parts in FUSED.items()
    }
    return {fused: parts for fused, parts in candidates.items() if all(part in names for part in parts)}


def with_fused_names(specs: Mapping[str, QuantSpec | None]) -> dict[str, QuantSpec | None]:
    """The grids of all linears, and under its fused name that of every set whose parts agree."""
    fused = fused_sets(specs)
    agreed = {name: specs[parts[0]] for name, parts in fused.items() if len({specs[part] for part in parts}) == 1}
    return {**specs, **agreed}
