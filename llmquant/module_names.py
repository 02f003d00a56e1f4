"""Parts of a module's name: `model.layers.7.self_attn.q_proj` has the kind `self_attn.q_proj` and the block index 7."""

from __future__ import annotations


def kind_of(name: str) -> str:
    """Return the part of a name after its first number, with `*` for further numbers.

    Modules with the same role in every block have the same kind. A name without a number is its own kind.
    """
    parts = name.split(".")
    first = next((index for index, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join("*" if part.isdigit() else part for part in parts[first + 1 :])


def block_of(name: str) -> int | None:
    """Return the first number in a name, which is the index of its block, or None if there is none."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)
