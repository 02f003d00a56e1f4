"""What is said at the end of a run of how its codes were chosen: corrections, and rows that plain rounding won."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmquant.pipeline.report import LinearReport


def rounding_facts(linears: Sequence[LinearReport]) -> list[tuple[str, str]]:
    """Lines for the end of a run; none where nothing was corrected and no row is plain rounding's."""
    facts = []
    shares: dict[str, list[float]] = {}
    for linear in linears:
        if linear.correction_share is not None:
            shares.setdefault(linear.kind.rpartition(".")[2], []).append(linear.correction_share)
    if shares:
        told = ", ".join(f"{kind} {sum(taken) / len(taken):.0%}" for kind, taken in shares.items())
        facts.append(("corrections", f"share taken, mean: {told}"))
    if won := sum(linear.rtn_rows or 0 for linear in linears):
        rows = sum(linear.rows for linear in linears if linear.rtn_rows is not None)
        facts.append(("RTN rows", f"{won} of {rows} rows are plain rounding's, which measured better there"))
    return facts
