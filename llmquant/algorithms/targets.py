"""Better targets than the weight itself: what GPTQ should round, given the inputs the stored model will really see.

The linears before this one are already quantized, so its input X is not the original network's X_fp. The real-valued
weight that makes up for that best is a least-squares problem with a closed form (the asymmetric-calibration idea of
GPTAQ and QEP), and so is the part of the error already in the residual stream that a linear writing to it can absorb:

    W*  = argmin ||W X_fp + (h_fp - h) - W* X||^2
    W*^T = W^T + (H + damping)^-1 (X^T dX W^T + X^T dh) / T        dX = X_fp - X,  dh = h_fp - h

Rounding W* with the same Hessian minimises the error of the output that the next layer reads, at no cost when the model
runs. It is a fit to the calibration tokens, so the damping decides what it is worth (CONTRIBUTING.md has the figures).

Letters: N out_features, K in_features.
"""

from __future__ import annotations

from torch import Tensor

from llmquant.algorithms.gptq import InverseFactor, solve_with_hessian


def corrected_target(weight_KN: Tensor, factor: InverseFactor, moment_KN: Tensor) -> Tensor:
    """The weight to round instead of weight_KN, float32 [K, N].

    moment_KN: mean of X^T (dX W^T + dh) (`InputStatistics.moment_KN`).
    """
    return weight_KN + solve_with_hessian(factor, moment_KN)
