"""Building blocks of all tables."""

from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmquant.module_names import kind_of


def screen() -> Console:
    """Return a console on stdout, without automatic colours for numbers and paths."""
    return Console(highlight=False)


def new_table(*headings: str) -> Table:
    """Return a table without rows. Headings with ">" mark columns of numbers. Only the first column wraps."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    first, *others = headings
    table.add_column(first, overflow="fold")
    for heading in others:
        is_number = heading.startswith(">")
        table.add_column(heading.removeprefix(">"), justify="right" if is_number else "left", no_wrap=True)
    return table


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Print two columns of names and values. A name that is equal to the one above it is left out."""
    grid = Table.grid(padding=(0, 2, 0, 1), pad_edge=True)
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    previous = None
    for name, fact in facts:
        grid.add_row("" if name == previous else name, Text(fact))
        previous = name
    screen().print(grid)


def kinds_of(names: Iterable[str]) -> str:
    """Return the kinds of some modules in one line. At most four kinds are named."""
    kinds = list(dict.fromkeys(kind_of(name) or name for name in names))
    return ", ".join(kinds[:4]) + (f" and {len(kinds) - 4} more" if len(kinds) > 4 else "")
