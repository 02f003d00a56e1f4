"""The output of `llmquant inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from llmquant.console.tables import kinds_of, new_table, print_facts, screen
from llmquant.grouping import grouped
from llmquant.humanize import format_bytes
from llmquant.module_names import kind_of

if TYPE_CHECKING:
    from llmquant.checkpoints.summary import Contents
    from llmquant.kernels.dispatch import BackendChoice


def print_contents(contents: Contents) -> None:
    """Print the tensors by kind, and the totals."""
    table = new_table("part", ">n", ">shape", "stored as", ">size", ">bits")
    for rows in (contents.quantized, contents.unquantized):
        for row in rows:
            bits = row.bits_per_weight
            cells = (row.kind, str(row.count), " x ".join(map(str, row.shape)), row.storage)
            table.add_row(*cells, format_bytes(row.stored_bytes), f"{bits:.3f}".rstrip("0").rstrip("."))
        table.add_section()
    screen().print(table)
    shards = f"{contents.num_shards} file" + ("s" if contents.num_shards > 1 else "")
    facts = [("model", contents.architecture), ("format", contents.format or "not quantized")]
    facts += [("total", f"{format_bytes(contents.total_bytes)} in {shards}")]
    if contents.bits_per_weight is not None:
        share = contents.total_bytes / contents.dense_bytes
        facts[-1] = (
            "total",
            f"{facts[-1][1]}, {share:.0%} of {format_bytes(contents.dense_bytes)} with 16-bit linears",
        )
        facts.append(("bits", f"{contents.bits_per_weight:.3f} per quantized weight"))
    facts += [("note", note) for note in contents.notes]
    print_facts(facts)


def print_backends(choices: Mapping[str, BackendChoice]) -> None:
    """Print the kernel of each kind of linear, the reason for it, and why the other kernels cannot run."""
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
        kinds_text = "" if len(same) == len(choices) else f" ({kinds_of(name for name, _ in same)})"
        facts.append(("refused", f"{why}{kinds_text}"))
    print_facts(facts)
