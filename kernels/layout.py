"""What a kernel needs to know about one linear before it sees its tensors.

Letters, here and in all of `kernels/`: M rows of x (tokens), N out_features, K in_features, G groups along K.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from functools import lru_cache

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
