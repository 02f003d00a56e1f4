"""Error correction: the weight to round, given the inputs that the quantized model really produces.

The linears before this one are already quantized, so its input X is not the original model's X_fp. The real-valued
weight that best compensates for this is the closed-form solution of a least-squares problem (the asymmetric calibration
of GPTAQ and QEP). If the linear writes to the residual stream, its weight can also correct a part of the error that is
already in the stream:

    W*  = argmin ||W X_fp + (h_fp - h) - W* X||^2
    W*^T = W^T + (H + damping)^-1 (X^T dX W^T + X^T dh) / T        dX = X_fp - X,  dh = h_fp - h

Rounding W* with the same Hessian minimises the error of the output that the next layer reads, at no cost at inference.
But W* is fitted to the calibration tokens, and much of the fit is noise. So only a fraction g of the correction
c = W* - W is added. This shrinkage factor is the best one for other text, estimated from two splits A and B of the
calibration text. If c is fitted to all of the calibration text, the mean squared error on other text changes by

    g^2 <c, H c> - 2 g <c, m>      m is the moment X^T (dX W^T + dh) / T of the other text

The unknown <c, m> is estimated by <c_A, m_B> (c_A and m_B come from different splits, so they are independent). The
error is least at g = <c_A, m_B> / <c, H c>. All linears that read an input share one g, computed from the sums over
these linears, because one linear alone has too few rows for the estimate.

Letters: N out_features, K in_features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from llmquant.algorithms.gptq import InverseFactor, finish_solve, half_solve


@dataclass(frozen=True)
class ShrinkageTerms:
    """Numerator and denominator of the shrinkage factor of one correction."""

    agreement: float | None
    """<c_A, m_B>, how far the two splits of the text agree; None if there is only one split."""
    energy: float
    """<c, H c>, the mean squared change of the output that the correction causes."""


def fit_correction(factor: InverseFactor, moments_KN: Sequence[Tensor]) -> tuple[Tensor, ShrinkageTerms]:
    """Fit the correction c = W* - W, float32 [K, N], to all of the text.

    moments_KN: one moment X^T (dX W^T + dh) / T for all of the text, or two for its splits, which add up to it
    (`InputStatistics.moments_KN`).
    """
    half_solved_KN = [half_solve(factor, moment_KN) for moment_KN in moments_KN]
    sum_KN = sum(half_solved_KN[1:], half_solved_KN[0])
    change_KN = finish_solve(factor, sum_KN)
    # c^T H c, from c^T (H + damping) c = y^T y with y = sum_KN.
    energy = (sum_KN.square().sum() - (change_KN.square() * factor.added_K[:, None]).sum()).item()
    if len(half_solved_KN) < 2:
        return change_KN, ShrinkageTerms(None, energy)
    # Each moment is divided by the tokens of both splits, so it is half of its own split's mean: hence 2 * 2.
    return change_KN, ShrinkageTerms(4 * (half_solved_KN[0] * half_solved_KN[1]).sum().item(), energy)


def shrinkage_of(terms: Iterable[ShrinkageTerms]) -> float:
    """Return the shrinkage factor of the linears of one input: the fraction, 0 to 1, of their corrections to add.

    It is 1 if the text has only one split, and 0 if there is nothing to correct.
    """
    agreement = energy = 0.0
    for each in terms:
        if each.agreement is None:
            return 1.0
        agreement += each.agreement
        energy += each.energy
    return min(max(agreement / energy, 0.0), 1.0) if energy > 0 else 0.0
