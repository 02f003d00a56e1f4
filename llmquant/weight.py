"""`QuantizedWeight`: the result of quantizing one linear, independent of any storage format.

Algorithms create it, formats store it and kernels multiply by it. It is their common interface: none of the three
imports the others. Its tensors are not packed.

Letters: N out_features, K in_features, G groups of group_size columns (the last may be shorter).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from llmquant.spec import QuantSpec


def group_of_column(in_features: int, group_size: int, device: torch.device | None = None) -> Tensor:
    """Return the group index of every input column, int64 [K]: `k // group_size`, or 0 for group_size -1."""
    if group_size == -1:
        return torch.zeros(in_features, dtype=torch.int64, device=device)
    return torch.arange(in_features, device=device) // group_size


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """Integer codes and their grid; `weight_NK = scale * (code - zero)`."""

    codes_NK: Tensor
    """Integer codes, uint8 [N, K], values 0 … 2**bits - 1."""
    scale_NG: Tensor
    """Scales, floating point [N, G], already rounded to the dtype they are stored in. They are never zero, and negative
    only with the middle zero-point, in checkpoints that other tools wrote."""
    zero_NG: Tensor
    """Zero-points, uint8 [N, G], values 0 … 2**bits - 1; all 2**(bits-1) if symmetric."""
    spec: QuantSpec
    """Bits, group size and symmetry of the grid."""
    group_index_K: Tensor | None = None
    """Group of each column, int64 [K], or None for `k // group_size`. It comes from a checkpoint with act-order groups
    (g_idx); quantization with llmquant never creates it."""

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
        """Group index of each input column, int64 [K]."""
        if self.group_index_K is not None:
            return self.group_index_K
        return group_of_column(self.in_features, self.spec.group_size, self.codes_NK.device)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the dense weight [N, K]: `scale * (code - zero)` computed in float32, then rounded once to dtype."""
        group_K = self.group_of_column_K
        q_NK = self.codes_NK.float().sub_(self.zero_NG.float()[:, group_K])
        return q_NK.mul_(self.scale_NG.float()[:, group_K]).to(dtype)

    def digest(self) -> str:
        """Return the SHA-256 of codes, scales, zero-points and groups. It does not depend on the format."""
        scale_NG = self.scale_NG.float()  # exact, so that a format may store scales in another dtype
        pieces = (self.codes_NK, scale_NG, self.zero_NG, self.group_of_column_K)
        sha = hashlib.sha256()
        for piece in pieces:
            sha.update(piece.cpu().contiguous().numpy().data)
        return sha.hexdigest()

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """Return the same weight on another device."""
        return QuantizedWeight(
            codes_NK=self.codes_NK.to(device),
            scale_NG=self.scale_NG.to(device),
            zero_NG=self.zero_NG.to(device),
            spec=self.spec,
            group_index_K=None if self.group_index_K is None else self.group_index_K.to(device),
        )
