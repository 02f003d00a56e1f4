"""GPTQ across the outputs too: each row's rounding error is made up for by the rows that are rounded after it.

GPTQ takes every output of a linear to matter alike, and by itself. Seldom so: what queries and keys are off by counts
only along the keys and queries that they meet. With G = E[g g^T], g the gradient of what matters at the linear's
outputs, an error E of the weight costs

    tr(G E H E^T)

(the Kronecker form of the curvature, as YAQA has it, Tseng et al. 2025). Let G = R^T R, R lower triangular. The cost is
that of R E under H alone, so rows are rounded part by part, and each part P rounds

    W_P + R_PP^-1 R_P,before E_before

instead of W_P: the target that makes up for the errors of the parts before it. Within a part the rows count as
independent. Important rows (large G_nn) come first, while many are left to take up their errors.

Whether G is more than noise and the metric it was measured in is tested before it is used: two of them, from different
text and for different outputs of the block, must each make the other's cost much smaller (`OutputMoments.feedback`).

Letters: N out_features, K in_features, P rows of a part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise, zip_longest

import torch
from torch import Tensor

from llmquant.algorithms.affine import Grid, values_on_grid
from llmquant.spec import QuantSpec

MOST_ROWS = 1024
"""Rows that are weighed against each other; more are taken in slices, side by side."""
MOST_PARTS, LEAST_ROWS = 16, 16
"""Parts of a slice that are rounded one after the other, and rows of a part: fewer rows or more parts gain little."""
DAMPING = 0.3
"""Added to the diagonal of G, as a fraction of its mean."""


@dataclass(frozen=True)
class RowFactor:
    """What rounding row by row needs of one G."""

    lower_NN: Tensor
    """R of G + damping = R^T R in processing order, float32."""
    order_N: Tensor
    """int64, row processed at each step."""

    def parts(self) -> list[range]:
        """Steps that are processed together, in order."""
        rows = len(self.order_N)
        size = max(LEAST_ROWS, -(-rows // MOST_PARTS))
        return [range(start, min(start + size, rows)) for start in range(0, rows, size)]


def factor_rows(outputs_NN: Tensor, damping: float = DAMPING) -> RowFactor | None:
    """Factor a G, float32 [N, N]; None where it is not finite, or nothing."""
    diagonal_N = outputs_NN.diagonal()
    unit = diagonal_N.mean().item()
    if not torch.isfinite(outputs_NN).all() or unit <= 0:
        return None
    order_N = torch.argsort(diagonal_N, descending=True, stable=True)
    # G = M M^T with M upper triangular, the flipped factor of the flipped matrix; so R = M^T.
    flipped_N = order_N.flip(0)
    flipped_NN = outputs_NN[flipped_N][:, flipped_N].double() / unit
    flipped_NN.diagonal().add_(damping)
    lower_NN, failed = torch.linalg.cholesky_ex(flipped_NN)
    if failed.item():
        return None
    return RowFactor(lower_NN.flip(0, 1).T.float().contiguous(), order_N)


def cost(factor: RowFactor, outputs_NN: Tensor) -> float:
    """What a G makes of errors that were rounded with the feedback of another one, where without it is its trace.

    Of rounding errors that would be independent of each other and alike: with feedback they are R^-1 diag(R_PP) times
    those.
    """
    lower_NN = factor.lower_NN
    own_NN = torch.zeros_like(lower_NN)
    for part in factor.parts():
        inside = slice(part.start, part.stop)
        own_NN[inside, inside] = lower_NN[inside, inside]
    errors_NN = torch.linalg.solve_triangular(lower_NN, own_NN, upper=False)
    ordered_NN = outputs_NN[factor.order_N][:, factor.order_N]
    return ((ordered_NN @ errors_NN) * errors_NN).sum().item()


@dataclass(frozen=True)
class Feedback:
    """How the errors of a linear's rows are made up for by others."""

    factors: tuple[RowFactor, ...]
    """Of each of its `row_slices`."""
    left: float
    """The share of the cost that is left, judged by text and outputs of the block that it was not measured with."""

    def to(self, device: torch.device | str) -> Feedback:
        """The same on another device."""
        moved = (RowFactor(factor.lower_NN.to(device), factor.order_N.to(device)) for factor in self.factors)
        return Feedback(tuple(moved), self.left)


class OutputMoments:
    """Running sums of g g^T at the outputs of one linear, float32, apart for two halves of what they are taken from."""

    def __init__(self, out_features: int, device: torch.device | str = "cpu") -> None:
        self._slices = row_slices(out_features)
        self._halves = [
            [torch.zeros(rows.stop - rows.start, rows.stop - rows.start, device=device) for rows in self._slices]
            for _ in range(2)
        ]

    def add(self, gradient_TN: Tensor, half: int) -> None:
        """Count gradients at the outputs, floating point [T, N], to half 0 or 1."""
        for rows, sum_NN in zip(self._slices, self._halves[half], strict=True):
            some_TN = gradient_TN[:, rows].float()
            sum_NN.addmm_(some_TN.T, some_TN)

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name, for a file."""
        return {f"{half}.{number}": sum_NN for half, number, sum_NN in self._numbered()}

    def add_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Add sums of the same linear that `tensors` gave."""
        for half, number, sum_NN in self._numbered():
            sum_NN += tensors[f"{half}.{number}"].to(sum_NN.device)

    def _numbered(self) -> Iterator[tuple[int, int, Tensor]]:
        for half, sums in enumerate(self._halves):
            for number, sum_NN in enumerate(sums):
                yield half, number, sum_NN

    @property
    def is_finite(self) -> bool:
        """Whether no gradient was too large to be counted."""
        return all(bool(torch.isfinite(sum_NN).all()) for _, _, sum_NN in self._numbered())

    def feedback(self, most_left: float) -> Feedback | None:
        """From all of it; None where the two halves do not bear each other out: where the factor of one leaves more of
        the other's cost than most_left."""
        judged = 2 * len(self._slices)
        costs = 0.0
        for one, other in (self._halves, self._halves[::-1]):
            for one_NN, other_NN in zip(one, other, strict=True):
                factor = factor_rows(one_NN)
                if factor is None:
                    return None
                costs += cost(factor, other_NN) / other_NN.diagonal().sum().clamp(min=1e-30).item()
                if not costs < most_left * judged:
                    return None
        both = [factor_rows(one_NN + other_NN) for one_NN, other_NN in zip(*self._halves, strict=True)]
        factors = tuple(factor for factor in both if factor is not None)
        return Feedback(factors, costs / judged) if len(factors) == len(self._slices) else None


def row_slices(out_features: int) -> list[slice]:
    """Rows of a linear that are weighed against each other: as few and as even slices as `MOST_ROWS` lets them be."""
    count = -(-out_features // MOST_ROWS)
    return [slice(*bounds) for bounds in pairwise(out_features * number // count for number in range(count + 1))]


def round_rows(
    target_KN: Tensor,
    feedback: Feedback,
    spec: QuantSpec,
    search: Callable[[Tensor], tuple[Tensor, Grid]],
) -> tuple[Tensor, Grid, Tensor]:
    """Round part after part: signed steps [K, N], their grid, and wanted_KN, what was rounded in place of the target.

    search: chooses steps and grid for a target [K, P].
    """
    steps_KN, wanted_KN, error_KN = torch.empty_like(target_KN), target_KN.clone(), torch.zeros_like(target_KN)
    scale_GN = zero_GN = None
    starts = [rows.start for rows in row_slices(target_KN.shape[1])]
    for parts in zip_longest(*(factor.parts() for factor in feedback.factors)):
        chosen = []
        for start, part, factor in zip(starts, parts, feedback.factors, strict=True):
            if part is None:
                continue
            row_N = factor.order_N + start
            now_P, before_N = row_N[part.start : part.stop], row_N[: part.start]
            if part.start:
                lower_PN = factor.lower_NN[part.start : part.stop]
                weight_PN = torch.linalg.solve_triangular(
                    lower_PN[:, part.start : part.stop], lower_PN[:, : part.start], upper=False
                )
                wanted_KN[:, now_P] += error_KN[:, before_N] @ weight_PN.T.to(target_KN.dtype)
            chosen.append(now_P)
        rows_P = torch.cat(chosen)
        steps_KP, grid = search(wanted_KN[:, rows_P])
        if scale_GN is None or zero_GN is None:
            scale_GN = grid.scale_GN.new_empty(len(grid.scale_GN), target_KN.shape[1])
            zero_GN = grid.zero_GN.new_empty(len(grid.zero_GN), target_KN.shape[1])
        steps_KN[:, rows_P], scale_GN[:, rows_P], zero_GN[:, rows_P] = steps_KP, grid.scale_GN, grid.zero_GN
        error_KN[:, rows_P] = target_KN[:, rows_P] - values_on_grid(steps_KP, grid, spec)
    assert scale_GN is not None and zero_GN is not None
    return steps_KN, Grid(scale_GN, zero_GN), wanted_KN
