"""The output of `llmquant convert`."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from llmquant.console.tables import print_facts, screen
from llmquant.humanize import format_bytes

if TYPE_CHECKING:
    from llmquant.conversion import Converted


def print_converted(converted: Converted) -> None:
    """Print the formats, grids and sizes of a conversion."""
    grids = ", ".join(f"{count} x {grid}" for grid, count in converted.grids.items())
    facts = [
        ("format", f"{converted.source_format} -> {converted.format}"),
        ("linears", f"{grids}: read back, equal"),
        ("size", f"{format_bytes(converted.original_bytes)} -> {format_bytes(converted.output_bytes)}"),
    ]
    facts += [("fallback", fallback) for fallback in converted.fallbacks]
    facts += [("notes", note) for note in converted.notes]
    print_facts(facts)
    screen().print(
        f'\n  llmquant generate {shlex.quote(str(converted.out))} --prompt "Once upon a time"', soft_wrap=True
    )
