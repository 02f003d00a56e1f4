"""What a calibration pass tells about the input of a linear.

One `InputStatistics` serves all linears that read the same input (q, k and v; gate and up). It is a sum over tokens,
taken in a fixed order and in pieces of a fixed size, so that the same tokens give the same bits whatever else changes.

Two streams run through the network side by side: the quantized one, whose activations the stored model will really see,
and the original one. What the corrected targets of `targets.py` need of their difference is, for a weight W,

    moment = X^T (dX W^T + dh) / T       dX = X_fp - X: inputs in the original network less those in the quantized one
                                         dh = h_fp - h: the same of the residual stream the linear's output is added to

Where W is one linear that writes to the residual stream, this is summed up as it stands: T K N products twice, instead
of T K^2, and K is the larger for the last linear of an MLP. Where several linears share the input, the drift
dX^T X / T is, and W comes in at the end. Two such sums are kept, one of each half of the text: what they agree on is
what the text has in common with other text.

Everything is accumulated in float32, and the Hessian's products are taken in float32 too, unless asked otherwise: a
bfloat16 product rounds its result to 8 bits, and the Hessian is inverted (CONTRIBUTING.md has the figures). So does the
moment of a writer. A drift is small to begin with, and bfloat16 products serve it, where the inputs are bfloat16.

Letters: T tokens, K in_features, N out_features.
"""

from __future__ import annotations

from collections.abc import Callable

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
        writer_NK: Tensor | None = None,
        scale_K: Tensor | None = None,
        exact: bool = True,
    ) -> None:
        """writer_NK: the weight of the one linear that reads this input, where it writes to the residual stream. exact:
        multiply for the Hessian in float32."""
        self._exact = exact
        self.num_tokens = 0
        self.scale_K = scale_K
        """What AWQ divided the input by in the quantized network, and not in the original one."""
        self._hessian_KK = torch.zeros(in_features, in_features, device=device)
        self._abs_K = torch.zeros(in_features, device=device)
        self._writer_NK = writer_NK
        self.half = 0
        """The half of the text, 0 or 1, that is being counted."""
        self._moments: list[Tensor | None] = [None, None]
        """Of each half, once the original network's inputs are known: with a writer [K, N], else the drift [K, K]."""

    def add(
        self,
        x_TK: Tensor,
        original_x_TK: Tensor | None = None,
        residual_gap_TN: Tensor | None = None,
    ) -> None:
        """Count some tokens: a few thousand at a time keep the sums from costing more than the products.

        x_TK: the input in the quantized network. original_x_TK: the same in the original network.
        residual_gap_TN: h_fp - h at the stream the writer's output is added to.
        """
        if x_TK.dtype == torch.float16:  # its products would overflow: 300 squared is beyond its range
            x_TK = x_TK.float()
        exact_TK = x_TK.float()
        factor_TK = exact_TK if self._exact else x_TK
        self.num_tokens += x_TK.shape[0]
        self._abs_K += exact_TK.abs().sum(0)
        in_features = x_TK.shape[1]
        for start in range(0, in_features, PANEL_COLUMNS):
            stop = min(start + PANEL_COLUMNS, in_features)
            products_KB, left_BT = self._hessian_KK[:stop, start:stop], factor_TK[:, :stop].T
            if factor_TK.dtype == torch.float32:
                products_KB.addmm_(left_BT, factor_TK[:, start:stop])
            else:
                products_KB += left_BT @ factor_TK[:, start:stop]
        drift_TK = None
        if original_x_TK is not None:
            original_TK = original_x_TK.to(x_TK.dtype) if self.scale_K is None else original_x_TK / self.scale_K
            drift_TK = (original_TK - x_TK).to(x_TK.dtype)
        if self._writer_NK is not None:
            gap_TN = None if residual_gap_TN is None else residual_gap_TN.float()
            if drift_TK is not None:
                missing_TN = (drift_TK @ self._writer_NK.to(x_TK.dtype).T).float()
                gap_TN = missing_TN if gap_TN is None else gap_TN + missing_TN
            if gap_TN is not None:
                self._count(self.half, exact_TK.T @ gap_TN)
        elif drift_TK is not None:
            self._count(self.half, drift_TK.T @ x_TK)

    def merge(self, other: InputStatistics) -> None:
        """Add the sums of other tokens of the same input."""
        self.num_tokens += other.num_tokens
        self._hessian_KK += other._hessian_KK
        self._abs_K += other._abs_K
        for half, moment in enumerate(other._moments):
            if moment is not None:
                self._count(half, moment)

    def exchange(self, pass_on: Callable[[Tensor], object]) -> None:
        """Hand every sum to a function that sends it away, or that fills it with what it has received."""
        shapes = [(0, 0) if moment is None else tuple(moment.shape) for moment in self._moments]
        sizes = torch.tensor([self.num_tokens, *shapes[0], *shapes[1]])
        pass_on(sizes)
        self.num_tokens = int(sizes[0])
        for half, shape in enumerate((sizes[1:3].tolist(), sizes[3:].tolist())):
            if all(shape) and self._moments[half] is None:
                self._moments[half] = torch.zeros(shape, device=self._hessian_KK.device)
        for sums in (self._hessian_KK, self._abs_K, *self._moments):
            if sums is not None:
                pass_on(sums)

    def _count(self, half: int, moment: Tensor) -> None:
        sums = self._moments[half]
        self._moments[half] = moment.float() if sums is None else sums.add_(moment)

    @property
    def hessian_KK(self) -> Tensor:
        """Mean second moment of the input, float32 [K, K], symmetric."""
        hessian_KK = self._hessian_KK.triu()
        return hessian_KK.add_(hessian_KK.triu(1).T).div_(max(self.num_tokens, 1))

    @property
    def mean_abs_K(self) -> Tensor:
        """Mean absolute input of each column, float32 [K]."""
        return self._abs_K / max(self.num_tokens, 1)

    def moments_KN(self, weight_KN: Tensor) -> list[Tensor]:
        """X^T (dX W^T + dh) / T of each half of the text, for a weight that reads this input, float32 [K, N] each; they
        add up to the mean over all T tokens. Only one where there is but one half, none where nothing is known
        of the original network. Where there is a writer, weight_KN has to be that."""
        means = [moment / max(self.num_tokens, 1) for moment in self._moments if moment is not None]
        return [mean.T @ weight_KN for mean in means] if self._writer_NK is None else means


def output_errors(error_KN: Tensor, hessian_KK: Tensor) -> Tensor:
    """Mean squared error of each output over the calibration tokens when a weight is off by error_KN, float32 [N]:
    diag(E^T H E)."""
    return (error_KN * (hessian_KK @ error_KN)).sum(0)
