"""Bits to where they help most: one grid for each item, the least loss in all that a budget allows.

A multiple-choice knapsack (Kellerer, Pferschy & Pisinger 2004, chapter 11), solved by dynamic programming over the
budget: with `least_u` the least loss of the items so far at a cost of at most u units,

    least_u  <-  min over the item's choices c of  least_{u - cost_c} + loss_c

The last row is the whole trade-off, loss against cost, of which the budget picks one point. Costs are counted from each
item's cheapest choice, in units of their greatest common divisor, and the result is exact. Where that would make too
many (MAX_CELLS), units are larger and costs are rounded up: the budget holds, and what it is short of the best is at
most one unit an item.

Letters: U units of the budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

MAX_CELLS = 2**25
"""Choices that are remembered: items times units, two bytes each."""


@dataclass(frozen=True)
class Choice:
    """One way to store an item."""

    cost: int
    """In bits, or whatever the budget is in."""
    loss: float
    """What it adds to the total."""


@dataclass(frozen=True)
class Allocation:
    """A choice for every item, and what other budgets would have given."""

    chosen: tuple[int, ...]
    """Index into the choices of each item."""
    cost: int
    loss: float
    curve: tuple[tuple[int, float], ...]
    """(cost, least loss) of every budget at which the loss falls, cheapest first."""


def allocate(items: Sequence[Sequence[Choice]], budget: int, max_units: int | None = None) -> Allocation | None:
    """The choices of least total loss whose costs stay within the budget; None where the cheapest ones do not."""
    max_units = max_units or max(MAX_CELLS // max(len(items), 1), 1)
    cheapest = [min(choice.cost for choice in choices) for choices in items]
    base = sum(cheapest)
    if base > budget:
        return None
    extras = [[choice.cost - least for choice in choices] for choices, least in zip(items, cheapest, strict=True)]
    whole_range = sum(map(max, extras))
    unit = max(math.gcd(*(extra for row in extras for extra in row)), -(-whole_range // max_units), 1)
    num_units = sum(-(-max(row) // unit) for row in extras)
    least_U = torch.zeros(num_units + 1, dtype=torch.float64)
    taken = []
    for choices, row in zip(items, extras, strict=True):
        best_U = torch.full_like(least_U, math.inf)
        taken_U = torch.zeros(num_units + 1, dtype=torch.int16)
        for index in sorted(range(len(row)), key=lambda index: row[index]):
            units = -(-row[index] // unit)
            trial_U = best_U.clone()
            trial_U[units:] = least_U[: num_units + 1 - units] + choices[index].loss
            better_U = trial_U < best_U
            best_U = torch.where(better_U, trial_U, best_U)
            taken_U[better_U] = index
        least_U = best_U
        taken.append(taken_U)
    left = min((budget - base) // unit, num_units)
    chosen = []
    for row, taken_U in zip(reversed(extras), reversed(taken), strict=True):
        chosen.append(int(taken_U[left]))
        left -= -(-row[chosen[-1]] // unit)
    chosen.reverse()
    falls_U = torch.cat([torch.tensor([True]), least_U[1:] < least_U[:-1]])
    return Allocation(
        chosen=tuple(chosen),
        cost=sum(choices[index].cost for choices, index in zip(items, chosen, strict=True)),
        loss=math.fsum(choices[index].loss for choices, index in zip(items, chosen, strict=True)),
        curve=tuple((base + int(at) * unit, least_U[at].item()) for at in falls_U.nonzero()[:, 0]),
    )
