"""Grouping of items by a key."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any


def grouped(items: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    """Group items by key, in the order of each key's first item."""
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def grouped_within(
    items: Iterable[Any], outer: Callable[[Any], Any], inner: Callable[[Any], Any]
) -> dict[Any, list[Any]]:
    """Group items by (outer, inner) key; groups with the same outer key stand together."""
    together = [item for same in grouped(items, outer).values() for item in same]
    return grouped(together, lambda item: (outer(item), inner(item)))
