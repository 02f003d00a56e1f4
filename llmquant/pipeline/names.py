"""What a module is called without its place: `model.layers.7.self_attn.q_proj` is a `self_attn.q_proj`."""

from __future__ import annotations


def kind_of(name: str) -> str:
    """The name behind its first number, further numbers as `*`: what does the same job in every block has one kind.

    A name without a number is its own kind.
    """
    parts = name.split(".")
    first = next((index for index, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join("*" if part.isdigit() else part for part in parts[first + 1 :])


def block_of(name: str) -> int | None:
    """The first number in a name: the index of its block."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)
