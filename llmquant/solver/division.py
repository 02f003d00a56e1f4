"""The division of a run's work among ranks: consecutive pieces of the samples, and the linears of an input group."""

from __future__ import annotations

from collections.abc import Mapping

from llmquant.solver.reduction import NUM_PIECES


def pieces_of_rank(rank: int, size: int) -> range:
    """Return the pieces of the samples (`reduction.py`) that one of `size` ranks sums."""
    return range(NUM_PIECES * rank // size, NUM_PIECES * (rank + 1) // size)


def divide_tasks(costs: Mapping[str, int], size: int) -> list[list[str]]:
    """Return the tasks of each rank. The most expensive come first, each to the rank with the least work so far."""
    tasks: list[list[str]] = [[] for _ in range(size)]
    loads = [0] * size
    for name in sorted(costs, key=lambda name: -costs[name]):
        rank = loads.index(min(loads))
        tasks[rank].append(name)
        loads[rank] += costs[name]
    return tasks
