"""What `llmquant inspect` shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from llmquant.console.tables import grouped, kinds_of, new_table, print_facts, screen
from llmquant.pipeline.names import kind_of
from llmquant.words import size

if TYPE_CHECKING:
    from llmquant.kernels.dispatch import Choice
    from llmquant.pipeline.inspect import Contents


def print_contents(contents: Contents) -> None:
    """The tables of `llmquant inspect`."""
    table = new_table("part", ">n", ">shape", "stored as", ">size", ">bits")
    for rows in (contents.quantized, contents.kept):
        for row in rows:
            bits = row.bits_per_weight
            cells = (row.kind, str(row.count), " x ".join(map(str, row.shape)), row.storage)
            table.add_row(*cells, size(row.stored_bytes), f"{bits:.3f}".rstrip("0").rstrip("."))
        table.add_section()
    screen().print(table)
    shards = f"{contents.num_shards} file" + ("s" if contents.num_shards > 1 else "")
    facts = [("model", contents.architecture), ("format", contents.format or "not quantized")]
    facts += [("total", f"{size(contents.total_bytes)} in {shards}")]
    if contents.bits_per_weight is not None:
        share = contents.total_bytes / contents.dense_bytes
        facts[-1] = ("total", f"{facts[-1][1]}, {share:.0%} of {size(contents.dense_bytes)} with 16-bit linears")
        facts.append(("bits", f"{contents.bits_per_weight:.3f} per quantized weight"))
    facts += [("note", note) for note in contents.notes]
    print_facts(facts)


def print_backends(choices: Mapping[str, Choice]) -> None:
    """Which kernel runs which kind of linear, and what the other kernels said."""
    kinds = grouped(choices.items(), lambda item: (kind_of(item[0]), item[1].backend.name, item[1].reason))
    table = new_table("linear")
    for heading in ("kernel", "because"):
        table.add_column(heading, overflow="fold")
    for kind, backend, reason in kinds:
        table.add_row(kind, backend, reason)
    screen().print(table)
    refusals = [(name, f"{backend}: {why}") for name, c in choices.items() for backend, why in c.refusals.items()]
    facts = []
    for why, same in grouped(refusals, lambda item: item[1]).items():
        whose = "" if len(same) == len(choices) else f" ({kinds_of(name for name, _ in same)})"
        facts.append(("refused", f"{why}{whose}"))
    print_facts(facts)
