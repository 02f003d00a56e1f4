"""What `llmquant convert` shows at the end."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from llmquant.console.tables import print_facts, screen
from llmquant.words import size

if TYPE_CHECKING:
    from llmquant.pipeline.convert import Converted


def print_converted(converted: Converted) -> None:
    """What was converted into what, and how large it is."""
    grids = ", ".join(f"{count} x {grid}" for grid, count in converted.grids.items())
    facts = [
        ("format", f"{converted.source_format} -> {converted.format}"),
        ("linears", f"{grids}: read back, equal"),
        ("size", f"{size(converted.original_bytes)} -> {size(converted.output_bytes)}"),
    ]
    facts += [("incident", incident) for incident in converted.incidents]
    facts += [("remarks", remark) for remark in converted.remarks]
    print_facts(facts)
    screen().print(
        f'\n  llmquant generate {shlex.quote(str(converted.out))} --prompt "Once upon a time"', soft_wrap=True
    )
