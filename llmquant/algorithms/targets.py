"""Better targets than the weight itself: what GPTQ should round, given the inputs the stored model will really see.

The linears before this one are already quantized, so its input X is not the original network's X_fp. The real-valued
weight that makes up for that best is a least-squares problem with a closed form (the asymmetric-calibration idea of
GPTAQ and QEP), and so is the part of the error already in the residual stream that a linear writing to it can absorb:

    W*  = argmin ||W X_fp + (h_fp - h) - W* X||^2
    W*^T = W^T + (H + damping)^-1 (X^T dX W^T + X^T dh) / T        dX = X_fp - X,  dh = h_fp - h

Rounding W* with the same Hessian minimises the error of the output that the next layer reads, at no cost when the model
runs. It is a fit to the calibration tokens, and much of it fits what is peculiar to them. So only a share of it is
taken: the one that is best on text it was not fitted to, estimated from two halves A and B of the calibration text.
With c = W* - W fitted to all of it, and m_B the moment of half B, the mean squared error on other text changes by

    g^2 <c, H c> - 2 g <c, m>      <c, m> is estimated by <c_A, m_B>, which are independent

and is least at g = <c_A, m_B> / <c, H c>: one share for all linears that read an input, taken from the sums over them.
Each has too few rows to tell its own well.

Letters: N out_features, K in_features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from llmquant.algorithms.gptq import InverseFactor, finish_solve, half_solve


@dataclass(frozen=True)
class Evidence:
    """What tells how much of a correction holds on other text."""

    common: float | None
    """<c_A, m_B>, what the two halves of the text agree on; None where there is but one."""
    whole: float
    """<c, H c>."""


def correction(factor: InverseFactor, moments_KN: Sequence[Tensor]) -> tuple[Tensor, Evidence]:
    """c = W* - W, float32 [K, N], fitted to all of the text.

    moments_KN: X^T (dX W^T + dh) / T of two halves of the text, which add up to the mean, or of all of it
    (`InputStatistics.moments_KN`).
    """
    halves_KN = [half_solve(factor, moment_KN) for moment_KN in moments_KN]
    half_KN = sum(halves_KN[1:], halves_KN[0])
    change_KN = finish_solve(factor, half_KN)
    # c^T H c, from c^T (H + damping) c = y^T y.
    whole = (half_KN.square().sum() - (change_KN.square() * factor.added_K[:, None]).sum()).item()
    if len(halves_KN) < 2:
        return change_KN, Evidence(None, whole)
    # Each is of half the tokens over all of them: half of the half's own mean.
    return change_KN, Evidence(4 * (halves_KN[0] * halves_KN[1]).sum().item(), whole)


def share_of(evidence: Iterable[Evidence]) -> float:
    """The share to take of the corrections of linears that read one input, 0 to 1: 1 where there is but one half of a
    text, 0 where there is nothing to correct."""
    common = whole = 0.0
    for each in evidence:
        if each.common is None:
            return 1.0
        common += each.common
        whole += each.whole
    return min(max(common / whole, 0.0), 1.0) if whole > 0 else 0.0
