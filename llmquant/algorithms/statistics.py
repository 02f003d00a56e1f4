"""Statistics of the input of a linear over the calibration tokens.

All linears that read the same input (q, k and v; gate and up) share one `InputStatistics`. Its sums over tokens are
taken in a fixed order and in pieces of a fixed size, so that the same tokens always give the same bits.

The quantized model and the original run side by side, and the quantized one provides the activations that the stored
model will produce. For a weight W, the error correction (`error_correction.py`) needs this moment of the differences:

    moment = X^T (dX W^T + dh) / T       dX = X_fp - X: drift of the input, original model less quantized model
                                         dh = h_fp - h: drift of the residual stream that the output is added to

If a linear alone reads the input and writes to the residual stream, the moment itself is summed. This takes 2 T K N
products instead of T K^2, and K is usually more than 2 N in the last linear of an MLP. Otherwise dX^T X / T is summed,
and is multiplied by W at the end. Each of two splits of the text has its own sum: a correction on which both agree is
likely to hold on other text.

All sums are float32. The products X^T X (if `exact`) and X^T (dX W^T + dh) are float32 too: a bfloat16 product rounds
its result to 8 bits, and the Hessian is inverted (figures: eval/EXPERIMENTS.md). The drift dX is small, so its products
dX W^T and dX^T X have the dtype of the inputs; bfloat16 is enough for them.

Letters: T tokens, K in_features, N out_features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

# Columns of one panel of the Hessian. Only panels on and above the diagonal are computed; the rest is mirrored.
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
        """writer_NK: weight of the linear if it alone reads this input and writes to the residual stream.

        scale_K: scale that AWQ divided this input by. exact: whether the Hessian's products are computed in float32.
        """
        self._exact = exact
        self.num_tokens = 0
        self.scale_K = scale_K
        """Scale that AWQ divided the input by in the quantized model, and not in the original one."""
        self._hessian_KK = torch.zeros(in_features, in_features, device=device)
        self._abs_K = torch.zeros(in_features, device=device)
        self._writer_NK = writer_NK
        self._moments: list[Tensor | None] = [None, None]
        """Sum of each split: X^T (dX W^T + dh) with a writer, else dX^T X; None before any original input is added."""

    def add(
        self,
        x_TK: Tensor,
        original_x_TK: Tensor | None = None,
        residual_drift_TN: Tensor | None = None,
        *,
        split: int = 0,
    ) -> None:
        """Add the inputs of some tokens. With fewer than a few thousand, adding the products is the larger cost.

        x_TK: the input in the quantized model. original_x_TK: the same in the original model.
        residual_drift_TN: h_fp - h of the stream that the writer's output is added to. split: 0 or 1, the split of the
        text to which the tokens belong.
        """
        exact_TK = x_TK.float()
        self.num_tokens += x_TK.shape[0]
        self._abs_K += exact_TK.abs().sum(0)
        is_rounded = not sums_in_float32(x_TK)
        self._add_products(exact_TK if is_rounded and (self._exact or x_TK.dtype == torch.float16) else x_TK)
        if x_TK.dtype == torch.float16:  # results in float16 would overflow: 300 squared is beyond its range
            x_TK = exact_TK
        drift_TK = None
        if original_x_TK is not None:
            original_TK = original_x_TK.to(x_TK.dtype) if self.scale_K is None else original_x_TK / self.scale_K
            drift_TK = (original_TK - x_TK).to(x_TK.dtype)
        if self._writer_NK is not None:
            drift_TN = None if residual_drift_TN is None else residual_drift_TN.float()
            if drift_TK is not None:
                missing_TN = (drift_TK @ self._writer_NK.to(x_TK.dtype).T).float()
                drift_TN = missing_TN if drift_TN is None else drift_TN + missing_TN
            if drift_TN is not None:
                self._add_moment(split, product_with_float32(x_TK, drift_TN))
        elif drift_TK is not None and sums_in_float32(x_TK):
            sums_KK = torch.zeros(x_TK.shape[1], x_TK.shape[1], device=x_TK.device)
            self._add_moment(split, add_product(sums_KK, drift_TK, x_TK))
        elif drift_TK is not None:
            self._add_moment(split, drift_TK.T @ x_TK)

    def _add_products(self, factor_TK: Tensor) -> None:
        """Add X^T X to the sums, on and above the diagonal."""
        if sums_in_float32(factor_TK):
            add_product(self._hessian_KK, factor_TK, factor_TK)
            return
        in_features = factor_TK.shape[1]
        # A GPU computes the whole product faster than many narrow panels.
        panel = in_features if factor_TK.is_cuda else PANEL_COLUMNS
        for start in range(0, in_features, panel):
            stop = min(start + panel, in_features)
            products_KB, left_BT = self._hessian_KK[:stop, start:stop], factor_TK[:, :stop].T
            if factor_TK.dtype == torch.float32:
                products_KB.addmm_(left_BT, factor_TK[:, start:stop])
            else:
                products_KB += left_BT @ factor_TK[:, start:stop]

    def merge(self, other: InputStatistics) -> None:
        """Add the sums of other tokens of the same input."""
        self.num_tokens += other.num_tokens
        self._hessian_KK += other._hessian_KK
        self._abs_K += other._abs_K
        for split, moment in enumerate(other._moments):
            if moment is not None:
                self._add_moment(split, moment)

    def exchange(self, pass_on: Callable[[Tensor], object]) -> None:
        """Pass every sum to a function that sends it, or that overwrites it with a sum that it receives."""
        shapes = [(0, 0) if moment is None else tuple(moment.shape) for moment in self._moments]
        sizes = torch.tensor([self.num_tokens, *shapes[0], *shapes[1]])
        pass_on(sizes)
        self.num_tokens = int(sizes[0])
        for split, shape in enumerate((sizes[1:3].tolist(), sizes[3:].tolist())):
            if all(shape) and self._moments[split] is None:
                self._moments[split] = torch.zeros(shape, device=self._hessian_KK.device)
        for sums in (self._hessian_KK, self._abs_K, *self._moments):
            if sums is not None:
                pass_on(sums)

    def _add_moment(self, split: int, moment: Tensor) -> None:
        sums = self._moments[split]
        self._moments[split] = moment.float() if sums is None else sums.add_(moment)

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
        """Return X^T (dX W^T + dh) / T of each split, float32 [K, N], for a weight that reads this input.

        They add up to the mean over all T tokens. The list has one entry if all tokens are of one split, and none if no
        input of the original model was added. If there is a writer, weight_KN must be its weight.
        """
        means = [moment / max(self.num_tokens, 1) for moment in self._moments if moment is not None]
        return [mean.T @ weight_KN for mean in means] if self._writer_NK is None else means


def sums_in_float32(x: Tensor) -> bool:
    """Whether products of this tensor with its own dtype can be summed in float32 without being rounded before.

    Matrix units of a GPU compute products of bfloat16 and of float16 exactly and sum them in float32.
    """
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and _has_float32_result(x.device, x.dtype)


@lru_cache(maxsize=64)
def _has_float32_result(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch can multiply 16-bit matrices into a float32 result on this device.

    Its functions have had the argument `out_dtype` since version 2.8 or 2.11, depending on the function and the device.
    So a small product is computed, and compared with that of float32 matrices.
    """
    x_TK = torch.linspace(-1, 1, 32 * 64, device=device).square().view(32, 64).to(dtype)
    expected_KK = torch.addmm(torch.ones(64, 64, device=device), x_TK.float().T, x_TK.float())
    try:
        result_KK = add_product(torch.ones(64, 64, device=device), x_TK, x_TK)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return bool(torch.allclose(result_KK, expected_KK, rtol=1e-5, atol=1e-5))


def add_product(sums_KN: Tensor, x_TK: Tensor, y_TN: Tensor) -> Tensor:
    """Add X^T Y of two 16-bit matrices on a GPU to float32 sums, in place, without rounding the product."""
    return torch.addmm(sums_KN, x_TK.T, y_TN, out_dtype=torch.float32, out=sums_KN)


def product_with_float32(x_TK: Tensor, y_TN: Tensor) -> Tensor:
    """Return X^T Y in float32, [K, N], for a float32 Y.

    If X has 16 bits and the GPU can sum its products in float32, Y is split into two bfloat16 pieces. Together they
    hold 16 significant bits of Y, more than X has.
    """
    if not sums_in_float32(x_TK) or x_TK.dtype != torch.bfloat16:
        return x_TK.float().T @ y_TN
    high_TN = y_TN.to(x_TK.dtype)
    low_TN = (y_TN - high_TN.float()).to(x_TK.dtype)
    sums_KN = add_product(torch.zeros(x_TK.shape[1], y_TN.shape[1], device=x_TK.device), x_TK, high_TN)
    return add_product(sums_KN, x_TK, low_TN)


def output_errors(error_KN: Tensor, hessian_KK: Tensor) -> Tensor:
    """Return the mean squared error of each output over the calibration tokens, diag(E^T H E), float32 [N].

    error_KN: error of the weight.
    """
    return (error_KN * (hessian_KK @ error_KN)).sum(0)
