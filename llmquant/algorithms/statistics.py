"""What a calibration pass tells about the input of a linear.

One `InputStatistics` serves all linears that read the same input (q, k and v; gate and up). It is a sum over tokens,
taken in a fixed order and in pieces of a fixed size, so that the same tokens give the same bits whatever else changes.

Two streams run through the network side by side: the quantized one, whose activations the stored model will really see,
and the original one. Their difference is what the corrected targets of `targets.py` need:

    hessian  = X^T X / T                 X: inputs in the quantized network
    drift    = (X_fp - X)^T X / T        X_fp: inputs of the same tokens in the original network
    residual = X^T (h_fp - h) / T        h, h_fp: the residual stream that the linear's output is added to

Everything is accumulated in float32, and the Hessian's products are taken in float32 too: a bfloat16 product rounds its
result to 8 bits, and the Hessian is inverted (KL .106 instead of .096 on SmolLM2-135M, and factorizations that fail).
The moments of differences are small to begin with, so bfloat16 products serve them, where the inputs are bfloat16.

Letters: T tokens, K in_features, R width of the residual stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Columns of one panel of the Hessian: only panels on and above the diagonal are multiplied, the rest is mirrored.
PANEL_COLUMNS = 128


class InputStatistics:
    """Sums over the calibration tokens of one input. Read the properties only after the last `add`."""

    def __init__(
        self,
        in_features: int,
        device: torch.device,
        *,
        drift: bool = False,
        residual_width: int = 0,
        scale_K: Tensor | None = None,
    ) -> None:
        self.num_tokens = 0
        self.scale_K = scale_K
        """What AWQ divided the input by in the quantized network, and not in the original one."""
        self._hessian_KK = torch.zeros(in_features, in_features, device=device)
        self._abs_K = torch.zeros(in_features, device=device)
        self._drift_KK = torch.zeros_like(self._hessian_KK) if drift else None
        self._residual_KR = torch.zeros(in_features, residual_width, device=device) if residual_width else None

    def add(
        self,
        x_TK: Tensor,
        original_x_TK: Tensor | None = None,
        residual_gap_TR: Tensor | None = None,
    ) -> None:
        """Count some tokens: a few thousand at a time keep the sums from costing more than the products.

        x_TK: the input in the quantized network. original_x_TK: the same in the original network (needed for drift).
        residual_gap_TR: h_fp - h at the stream the linear writes to (needed for the residual moment).
        """
        if x_TK.dtype == torch.float16:  # its products would overflow: 300 squared is beyond its range
            x_TK = x_TK.float()
        exact_TK = x_TK.float()
        self.num_tokens += x_TK.shape[0]
        self._abs_K += torch.linalg.vector_norm(x_TK, ord=1, dim=0, dtype=torch.float32)
        in_features = x_TK.shape[1]
        for start in range(0, in_features, PANEL_COLUMNS):
            stop = min(start + PANEL_COLUMNS, in_features)
            self._hessian_KK[:stop, start:stop].addmm_(exact_TK[:, :stop].T, exact_TK[:, start:stop])
        if self._drift_KK is not None:
            assert original_x_TK is not None
            original_TK = original_x_TK.float() if self.scale_K is None else original_x_TK / self.scale_K
            self._drift_KK += (original_TK - exact_TK).to(x_TK.dtype).T @ x_TK
        if self._residual_KR is not None:
            assert residual_gap_TR is not None
            self._residual_KR += x_TK.T @ residual_gap_TR.to(x_TK.dtype)

    @property
    def hessian_KK(self) -> Tensor:
        """Mean second moment of the input, float32 [K, K], symmetric."""
        upper_KK = self._hessian_KK.triu()
        return (upper_KK + upper_KK.triu(1).T) / max(self.num_tokens, 1)

    @property
    def mean_abs_K(self) -> Tensor:
        """Mean absolute input of each column, float32 [K]."""
        return self._abs_K / max(self.num_tokens, 1)

    @property
    def drift_KK(self) -> Tensor | None:
        """Mean of (x_fp - x) x^T, float32 [K, K], or None when it was not asked for."""
        return None if self._drift_KK is None else self._drift_KK / max(self.num_tokens, 1)

    @property
    def residual_KR(self) -> Tensor | None:
        """Mean of x (h_fp - h)^T, float32 [K, R], or None when it was not asked for."""
        return None if self._residual_KR is None else self._residual_KR / max(self.num_tokens, 1)
