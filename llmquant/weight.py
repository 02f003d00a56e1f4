"""`QuantizedWeight`: the logical result of quantizing one linear, and the seam of the whole project.

Algorithms make it, formats store it, kernels run it, and none of the three sees the others. Nothing in it is packed.

Letters: N out_features, K in_features, G groups of group_size columns (the last may be shorter).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from llmquant.spec import QuantSpec


def group_of_column(in_features: int, group_size: int, device: torch.device | None = None) -> Tensor:
    """Group index of every input column, int64 [K]: `k // group_size`, or 0 everywhere for group_size -1."""
    if group_size == -1:
        return torch.zeros(in_features, dtype=torch.int64, device=device)
    return torch.arange(in_features, device=device) // group_size


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """Integer codes and their grid; `weight_NK = scale * (code - zero)`."""

    codes_NK: Tensor
    """uint8 [N, K], values 0 … 2**bits - 1."""
    scale_NG: Tensor
    """Floating [N, G], already rounded to the dtype it is stored in. Never zero; negative only beside the
    middle zero-point, in what other tools made."""
    zero_NG: Tensor
    """uint8 [N, G], values 0 … 2**bits - 1; all 2**(bits-1) when symmetric."""
    spec: QuantSpec
    """The grid."""
    group_index_K: Tensor | None = None
    """int64 [K], group of each column, or None for `k // group_size`. Only checkpoints that other tools wrote with
    moving act-order groups have one; ours never do."""

    def __post_init__(self) -> None:
        out_features, in_features = self.codes_NK.shape
        num_groups = self.spec.num_groups(in_features)
        assert self.codes_NK.dtype == torch.uint8 and self.zero_NG.dtype == torch.uint8
        assert self.scale_NG.is_floating_point()
        assert self.scale_NG.shape == self.zero_NG.shape == (out_features, num_groups), (
            self.scale_NG.shape,
            self.zero_NG.shape,
            (out_features, num_groups),
        )

    @property
    def out_features(self) -> int:
        return self.codes_NK.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes_NK.shape[1]

    @property
    def group_of_column_K(self) -> Tensor:
        """int64 [K]: which group each input column belongs to."""
        if self.group_index_K is not None:
            return self.group_index_K
        return group_of_column(self.in_features, self.spec.group_size, self.codes_NK.device)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [N, K]: `scale * (code - zero)` computed in float32, then rounded once to dtype."""
        group_K = self.group_of_column_K
        step_NK = self.codes_NK.float().sub_(self.zero_NG.float()[:, group_K])
        return step_NK.mul_(self.scale_NG.float()[:, group_K]).to(dtype)

    def digest(self) -> str:
        """SHA-256 of codes, scales and zero-points: equal for equal weights, whatever format they went through."""
        scale_NG = self.scale_NG.float()  # exact, so that a format may store scales in another dtype
        pieces = (self.codes_NK, scale_NG, self.zero_NG, self.group_of_column_K)
        sha = hashlib.sha256()
        for piece in pieces:
            sha.update(piece.cpu().contiguous().numpy().data)
        return sha.hexdigest()

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight on another device."""
        return QuantizedWeight(
            codes_NK=self.codes_NK.to(device),
            scale_NG=self.scale_NG.to(device),
            zero_NG=self.zero_NG.to(device),
            spec=self.spec,
            group_index_K=None if self.group_index_K is None else self.group_index_K.to(device),
        )
