"""What a kernel needs to know about one linear before it sees its tensors.

Letters, here and in all of `kernels/`: M rows of x (tokens), N out_features, K in_features, G groups along K.
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
    """Size and grid of one quantized linear: plain ints, so that it can travel through a torch operator."""

    out_features: int
    in_features: int
    bits: int
    group_size: int
    """Columns of a full group, already resolved: -1 has become in_features."""
    symmetric: bool
    moving_groups: bool = False
    """Columns name their group one by one (act-order checkpoints of other tools) instead of `k // group_size`."""

    @classmethod
    def of(cls, weight: QuantizedWeight) -> LinearShape:
        """The shape of a weight that is there."""
        return cls.planned(weight.out_features, weight.in_features, weight.spec, weight.group_index_K is not None)

    @classmethod
    def planned(cls, out_features: int, in_features: int, spec: QuantSpec, moving_groups: bool = False) -> LinearShape:
        """The shape of a weight that is only planned (`llmquant inspect --backends`)."""
        group_size = spec.effective_group_size(in_features)
        return cls(out_features, in_features, spec.bits, group_size, spec.symmetric, moving_groups)

    @property
    def num_groups(self) -> int:
        return -(-self.in_features // self.group_size)

    def as_ints(self) -> list[int]:
        """The fields as ints, for the schema of a torch operator; `from_ints` is the way back."""
        return [int(field) for field in astuple(self)]

    @staticmethod
    def from_ints(fields: list[int]) -> LinearShape:
        return _from_ints(*fields)

    def describe(self) -> str:
        """Short human form, as in `576x1536 4-bit g64 sym`."""
        symmetry = "sym" if self.symmetric else "asym"
        order = " act-order" if self.moving_groups else ""
        return f"{self.in_features}x{self.out_features} {self.bits}-bit g{self.group_size} {symmetry}{order}"


@lru_cache(maxsize=4096)
def _from_ints(out_features: int, in_features: int, bits: int, group_size: int, sym: int, moving: int) -> LinearShape:
    return LinearShape(out_features, in_features, bits, group_size, bool(sym), bool(moving))


@dataclass(frozen=True)
class Slots:
    """Where the input columns go so that every group fills whole blocks of a kernel.

    A kernel reads S >= K slots in blocks of equal width; all columns of a block share one group. Slots left over hold
    weight 0, and read a zero of x.
    """

    column_S: Tensor
    """int64 [S]: the input column in each slot, K for a slot that is padding."""
    group_B: Tensor
    """int64 [B]: the group of each block."""
    in_features: int

    @property
    def padded(self) -> int:
        """S, the number of slots."""
        return len(self.column_S)

    @property
    def is_prefix(self) -> bool:
        """Columns keep their place: x needs at most zeros at its end."""
        places = torch.arange(self.in_features, device=self.column_S.device)
        return torch.equal(self.column_S[: self.in_features], places)

    def to(self, device: torch.device) -> Slots:
        """The same on another device."""
        return Slots(self.column_S.to(device), self.group_B.to(device), self.in_features)

    def spread(self, values_NK: Tensor, padding: int) -> Tensor:
        """[N, K] -> [N, S], `padding` where a slot is empty."""
        if self.is_prefix:
            return F.pad(values_NK, (0, self.padded - self.in_features), value=padding)
        return F.pad(values_NK, (0, 1), value=padding)[:, self.column_S]


def arrange_slots(weight: QuantizedWeight, block: int, multiple: int) -> Slots:
    """The slots of a weight for blocks of `block` columns, their number rounded up so that S % multiple == 0.

    Columns are ordered by group (their own order inside it), and each group is filled up to whole blocks; for groups
    that are a multiple of the block wide and stand in order, nothing moves.
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
    """int64 [G]: blocks that the columns of each group fill."""
    return -(-torch.bincount(group_K, minlength=num_groups) // block)


def _group_of_block(blocks_G: Tensor, num_blocks: int) -> Tensor:
    """int64 [B]: the group of each block; 0 for blocks that are padding."""
    group_B = torch.repeat_interleave(torch.arange(len(blocks_G)), blocks_G)
    return F.pad(group_B, (0, num_blocks - len(group_B)))


def gather_groups(
    scale_NB: Tensor, zero_NB: Tensor, group_K: Tensor, layer: LinearShape, block: int
) -> tuple[Tensor, Tensor]:
    """Scales and zero-points of the blocks of `arrange_slots` -> scale_NG and zero_NG, the inverse of `[:, group_B]`.

    group_K: int64 [K], the group of each column. A group without columns gets scale 1 and the middle zero-point.
    """
    blocks_G = _blocks_of_groups(group_K.cpu(), layer.num_groups, block)
    group_B = _group_of_block(blocks_G, scale_NB.shape[1]).to(scale_NB.device)
    scale_NG = scale_NB.new_ones(layer.out_features, layer.num_groups)
    zero_NG = zero_NB.new_full((layer.out_features, layer.num_groups), 2 ** (layer.bits - 1))
    scale_NG[:, group_B], zero_NG[:, group_B] = scale_NB, zero_NB
    return scale_NG, zero_NG


def join_planes(codes_NP: Tensor, scale_NP: Tensor, zero_NP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """8-bit codes, their scales and zero-points from two planes of 4 bits, one behind the other along the last axis.

    The first plane has the high halves, uint8; scales are those of the second, whose unit is that of the whole code.
    """
    (high_NS, low_NS), (_, scale_NB) = codes_NP.chunk(2, dim=1), scale_NP.chunk(2, dim=1)
    high_NB, low_NB = zero_NP.chunk(2, dim=1)
    return (high_NS << 4) | low_NS, scale_NB, (high_NB << 4) | low_NB


def gather_columns(x_MK: Tensor, column_S: Tensor, num_slots: int) -> Tensor:
    """x in slot order [M, S]. An empty column_S says that columns keep their place, with zeros after them."""
    if column_S.numel():
        return F.pad(x_MK, (0, 1)).index_select(1, column_S)
    if num_slots != x_MK.shape[1]:
        return F.pad(x_MK, (0, num_slots - x_MK.shape[1]))
    return x_MK


def ungather_columns(weight_NS: Tensor, column_S: Tensor, in_features: int) -> Tensor:
    """A weight in slot order -> [N, K], the way back from what `gather_columns` did to x."""
    if not column_S.numel():
        return weight_NS[:, :in_features].contiguous()
    weight_NK = weight_NS.new_empty(weight_NS.shape[0], in_features + 1)
    weight_NK[:, column_S] = weight_NS
    return weight_NK[:, :-1].contiguous()


def check_width(x: Tensor, in_features: int) -> None:
    """Raises RuntimeError, as torch's linear does, where x has another number of columns."""
    if x.shape[-1] != in_features:
        raise RuntimeError(f"x is {list(x.shape)}, its last dimension has to be {in_features}")
