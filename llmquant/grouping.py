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
