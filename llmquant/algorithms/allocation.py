"""Bit allocation under a budget: choose one grid for each item so that the total loss is as small as the budget allows.

This is a multiple-choice knapsack (Kellerer, Pferschy & Pisinger 2004, chapter 11), solved by dynamic programming over
the budget. `least_u` is the least loss of the items so far at a cost of at most u units:

    least_u  <-  min over the item's options c of  least_{u - cost_c} + loss_c

The last row holds the least loss for every cost; the budget selects one entry. An option's cost is counted from the
item's cheapest option, in units of the greatest common divisor of all such differences. The result is then exact. If
the table would have more than MAX_CELLS cells, a larger unit is used and costs are rounded up. The result then still
fits the budget, and is no worse than the best one for a budget that is smaller by one unit per item.

Letters: U units of the budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

MAX_CELLS = 2**25
"""Maximum number of cells of the table, items times units; each takes two bytes."""


@dataclass(frozen=True)
class GridOption:
    """One grid that an item can get."""

    cost: int
    """Cost of the option in the unit of the budget, such as bits."""
    loss: float
    """Loss that the option adds to the total."""


@dataclass(frozen=True)
class Allocation:
    """The chosen option of every item, and the least loss for other budgets."""

    chosen: tuple[int, ...]
    """Index of the chosen option of each item."""
    cost: int
    """Total cost of the chosen options."""
    loss: float
    """Total loss of the chosen options."""
    curve: tuple[tuple[int, float], ...]
    """(cost, least loss) at every cost at which the least loss falls, cheapest first."""


def allocate(items: Sequence[Sequence[GridOption]], budget: int, max_units: int | None = None) -> Allocation | None:
    """Return the options of least total loss whose costs fit the budget, or None if even the cheapest do not fit.

    max_units: maximum number of units that the range of costs is divided into; None derives it from MAX_CELLS.
    """
    max_units = max_units or max(MAX_CELLS // max(len(items), 1), 1)
    cheapest = [min(option.cost for option in options) for options in items]
    base = sum(cheapest)
    if base > budget:
        return None
    extras = [[option.cost - least for option in options] for options, least in zip(items, cheapest, strict=True)]
    whole_range = sum(map(max, extras))
    unit = max(math.gcd(*(extra for row in extras for extra in row)), -(-whole_range // max_units), 1)
    num_units = sum(-(-max(row) // unit) for row in extras)
    least_U = torch.zeros(num_units + 1, dtype=torch.float64)
    taken = []
    for options, row in zip(items, extras, strict=True):
        best_U = torch.full_like(least_U, math.inf)
        taken_U = torch.zeros(num_units + 1, dtype=torch.int16)
        for index in sorted(range(len(row)), key=lambda index: row[index]):
            units = -(-row[index] // unit)
            trial_U = best_U.clone()
            trial_U[units:] = least_U[: num_units + 1 - units] + options[index].loss
            better_U = trial_U < best_U
            best_U = torch.where(better_U, trial_U, best_U)
            taken_U[better_U] = index
        least_U = best_U
        taken.append(taken_U)
    remaining = min((budget - base) // unit, num_units)
    chosen = []
    for row, taken_U in zip(reversed(extras), reversed(taken), strict=True):
        chosen.append(int(taken_U[remaining]))
        remaining -= -(-row[chosen[-1]] // unit)
    chosen.reverse()
    falls_U = torch.cat([torch.tensor([True]), least_U[1:] < least_U[:-1]])
    return Allocation(
        chosen=tuple(chosen),
        cost=sum(options[index].cost for options, index in zip(items, chosen, strict=True)),
        loss=math.fsum(options[index].loss for options, index in zip(items, chosen, strict=True)),
        curve=tuple((base + int(at) * unit, least_U[at].item()) for at in falls_U.nonzero()[:, 0]),
    )
