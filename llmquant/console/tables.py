"""What all tables are made of."""

from collections.abc import Callable, Iterable
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmquant.pipeline.names import kind_of


def screen() -> Console:
    """Stdout, where numbers and paths get no colours of their own."""
    return Console(highlight=False)


def new_table(*headings: str) -> Table:
    """A table without rows. Only the first column is folded where it is too wide; ">bits" is a column of numbers."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    first, *others = headings
    table.add_column(first, overflow="fold")
    for heading in others:
        is_number = heading.startswith(">")
        table.add_column(heading.removeprefix(">"), justify="right" if is_number else "left", no_wrap=True)
    return table


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Two columns, a name and what is so called; a name that comes again is not repeated."""
    grid = Table.grid(padding=(0, 2, 0, 1), pad_edge=True)
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    said = None
    for name, fact in facts:
        grid.add_row("" if name == said else name, Text(fact))
        said = name
    screen().print(grid)


def grouped(items: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    """Items by their key, in the order in which keys first come."""
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def kinds_of(names: Iterable[str]) -> str:
    """Names by their kind, the first few of them."""
    kinds = list(dict.fromkeys(kind_of(name) or name for name in names))
    return ", ".join(kinds[:4]) + (f" and {len(kinds) - 4} more" if len(kinds) > 4 else "")
