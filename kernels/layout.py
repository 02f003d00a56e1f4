"""Shapes and column layouts of quantized linears, which all kernels share.

Letters, here and for all linear kernels: M rows of x (tokens), N out_features, K in_features, G groups along K.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight


@dataclass(frozen=True)
class LinearShape:
    """Sizes and grid of one quantized linear. All fields are ints or bools, so that a torch operator can take them."""

    out_features: int
    in_features: int
    bits: int
    group_size: int
    """Columns of a full group; in_features if there is one group per row (-1 in a `QuantSpec`)."""
    symmetric: bool
    act_order_groups: bool = False
    """Whether a tensor gives the group of each column (act-order checkpoints of other tools) instead of
    `k // group_size`."""

    @classmethod
    def of(cls, weight: QuantizedWeight) -> LinearShape:
        """Return the shape of a weight."""
        return cls.of_sizes(weight.out_features, weight.in_features, weight.spec, weight.group_index_K is not None)

    @classmethod
    def of_sizes(
        cls, out_features: int, in_features: int, spec: QuantSpec, act_order_groups: bool = False
    ) -> LinearShape:
        """Return the shape of a weight of these sizes, which need not be loaded."""
        group_size = spec.effective_group_size(in_features)
        return cls(out_features, in_features, spec.bits, group_size, spec.symmetric, act_order_groups)

    @property
    def num_groups(self) -> int:
        """G, the number of groups along K."""
        return -(-self.in_features // self.group_size)

    def as_ints(self) -> list[int]:
        """Return the fields as ints, for the schema of a torch operator."""
        return [int(field) for field in astuple(self)]

    @staticmethod
    def from_ints(fields: list[int]) -> LinearShape:
        """Return the shape with these fields, the inverse of `as_ints`."""
        return _from_ints(*fields)

    def describe(self) -> str:
        """Return a short description, such as `576x1536 4-bit g64 sym`."""
        symmetry = "sym" if self.symmetric else "asym"
        order = " act-order" if self.act_order_groups else ""
        return f"{self.in_features}x{self.out_features} {self.bits}-bit g{self.group_size} {symmetry}{order}"


@lru_cache(maxsize=4096)
def _from_ints(
    out_features: int, in_features: int, bits: int, group_size: int, sym: int, act_order_groups: int
) -> LinearShape:
    return LinearShape(out_features, in_features, bits, group_size, bool(sym), bool(act_order_groups))


@dataclass(frozen=True)
class Slots:
    """An arrangement of the input columns in which every group fills whole blocks of a kernel.

    A kernel reads S >= K slots in blocks of equal width; all columns of a block share one group. A slot without a
    column is padding, where the kernel reads a zero in place of x.
    """

    column_S: Tensor
    """Input column in each slot, int64 [S]; K for padding."""
    group_B: Tensor
    """Group of each block, int64 [B]."""
    in_features: int
    """K, the number of input columns."""

    @property
    def num_slots(self) -> int:
        """S, the number of slots."""
        return len(self.column_S)

    @property
    def keeps_order(self) -> bool:
        """Whether the columns keep their order. x then needs no rearrangement, only zeros at its end."""
        places = torch.arange(self.in_features, device=self.column_S.device)
        return torch.equal(self.column_S[: self.in_features], places)

    def to(self, device: torch.device) -> Slots:
        """Return the same slots on another device."""
        return Slots(self.column_S.to(device), self.group_B.to(device), self.in_features)

    def spread(self, values_NK: Tensor, fill: int) -> Tensor:
        """Rearrange [N, K] into slots [N, S]; padding gets the value `fill`."""
        if self.keeps_order:
            return F.pad(values_NK, (0, self.num_slots - self.in_features), value=fill)
        return F.pad(values_NK, (0, 1), value=fill)[:, self.column_S]


def arrange_slots(weight: QuantizedWeight, block: int, multiple: int) -> Slots:
    """Return the slots of a weight for blocks of `block` columns; S is rounded up to a multiple of `multiple`.

    Columns are sorted by group, stably, and each group is padded to whole blocks. Columns keep their order if the
    groups are in order and their width is a multiple of the block.
    """
    group_K = weight.group_of_column_K.cpu()
    num_groups = weight.scale_NG.shape[1]
    order_K = torch.argsort(group_K, stable=True)
    blocks_G = _blocks_of_groups(group_K, num_groups, block)
    first_slot_G = (blocks_G.cumsum(0) - blocks_G) * block
    first_column_G = torch.searchsorted(group_K[order_K], torch.arange(num_groups))
    sorted_group_K = group_K[order_K]
    slot_K = first_slot_G[sorted_group_K] + torch.arange(weight.in_features) - first_column_G[sorted_group_K]
    num_blocks = -(-int(blocks_G.sum()) * block // multiple) * multiple // block
    column_S = torch.full((num_blocks * block,), weight.in_features)
    column_S[slot_K] = order_K
    return Slots(column_S, _group_of_block(blocks_G, num_blocks), weight.in_features)


def _blocks_of_groups(group_K: Tensor, num_groups: int, block: int) -> Tensor:
    """Return the number of blocks of each group, int64 [G]."""
    return -(-torch.bincount(group_K, minlength=num_groups) // block)


def _group_of_block(blocks_G: Tensor, num_blocks: int) -> Tensor:
    """Return the group of each block, int64 [B]; 0 for blocks of padding."""
    group_B = torch.repeat_interleave(torch.arange(len(blocks_G)), blocks_G)
    return F.pad(group_B, (0, num_blocks - len(group_B)))


def gather_groups(
    scale_NB: Tensor, zero_NB: Tensor, group_K: Tensor, shape: LinearShape, block: int
) -> tuple[Tensor, Tensor]:
    """Return scale_NG and zero_NG from the scales and zero-points of the blocks of `arrange_slots`.

    This is the inverse of indexing by `[:, group_B]`. group_K: the group of each column, int64 [K]. A group without
    columns gets scale 1 and the middle zero-point.
    """
    blocks_G = _blocks_of_groups(group_K.cpu(), shape.num_groups, block)
    group_B = _group_of_block(blocks_G, scale_NB.shape[1]).to(scale_NB.device)
    scale_NG = scale_NB.new_ones(shape.out_features, shape.num_groups)
    zero_NG = zero_NB.new_full((shape.out_features, shape.num_groups), 2 ** (shape.bits - 1))
    scale_NG[:, group_B], zero_NG[:, group_B] = scale_NB, zero_NB
    return scale_NG, zero_NG


def join_planes(codes_NP: Tensor, scale_NP: Tensor, zero_NP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Join two planes of 4-bit codes, which follow each other along dimension 1, into 8-bit codes.

    The first plane holds the high nibbles. The second plane holds the low nibbles, and its scales are those of the
    result. Returns codes, scales and zero-points.
    """
    (high_NS, low_NS), (_, scale_NB) = codes_NP.chunk(2, dim=1), scale_NP.chunk(2, dim=1)
    high_NB, low_NB = zero_NP.chunk(2, dim=1)
    return (high_NS << 4) | low_NS, scale_NB, (high_NB << 4) | low_NB


def gather_columns(x_MK: Tensor, column_S: Tensor, num_slots: int) -> Tensor:
    """Return x in slot order [M, S]. If column_S is empty, the columns keep their order and zeros follow them."""
    if column_S.numel():
        return F.pad(x_MK, (0, 1)).index_select(1, column_S)
    if num_slots != x_MK.shape[1]:
        return F.pad(x_MK, (0, num_slots - x_MK.shape[1]))
    return x_MK


def ungather_columns(weight_NS: Tensor, column_S: Tensor, in_features: int) -> Tensor:
    """Return a weight in slot order [N, S] in column order [N, K]; the inverse of `gather_columns`."""
    if not column_S.numel():
        return weight_NS[:, :in_features].contiguous()
    weight_NK = weight_NS.new_empty(weight_NS.shape[0], in_features + 1)
    weight_NK[:, column_S] = weight_NS
    return weight_NK[:, :-1].contiguous()


def check_width(x: Tensor, in_features: int) -> None:
    """Raise RuntimeError if the last dimension of x is not in_features, as torch's linear does."""
    if x.shape[-1] != in_features:
        raise RuntimeError(f"x is {list(x.shape)}, its last dimension has to be {in_features}")
