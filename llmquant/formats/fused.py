"""Linears that engines fuse: vLLM and SGLang concatenate their weights when they load a model.

All linears of a fused set must have the same grid, or all must stay in 16 bit. If a configuration names linears, an
engine may look up the fused name in it. The names in this module are those of transformers' models. Models that store
a fused linear (a `qkv_proj` on disk) are not affected.
"""

from __future__ import annotations

from collections.abc import Mapping

from llmquant.spec import QuantSpec

FUSED: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
"""Name of the fused linear in an engine -> names of the linears that it replaces, all in one parent module."""


def fused_sets(names: Mapping[str, object]) -> dict[str, tuple[str, ...]]:
    """Return {full fused name: full names of its linears} for every fused set whose linears are all in `names`."""
    parents = dict.fromkeys(name.rpartition(".")[0] for name in names)
    candidates = {
        f"{parent}.{fused}": tuple(f"{parent}.{name}" for name in linears)
        for parent in parents
        for fused, linears in FUSED.items()
    }
    return {fused: linears for fused, linears in candidates.items() if all(name in names for name in linears)}


def with_fused_names(specs: Mapping[str, QuantSpec | None]) -> dict[str, QuantSpec | None]:
    """Return the grids of all linears, and a grid under the fused name for every fused set with a single grid."""
    fused = fused_sets(specs)
    agreed = {name: specs[linears[0]] for name, linears in fused.items() if len({specs[each] for each in linears}) == 1}
    return {**specs, **agreed}
