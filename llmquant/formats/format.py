"""A storage format: pure functions that convert a `QuantizedWeight` to named tensors and back.

Further functions convert specs to the `quantization_config` in `config.json`, and parse it. A linear called `m` is
stored as tensors `m.<suffix>`; a format defines its suffixes, their dtypes and shapes, and the words in them. It does
not read or write files; `checkpoints/` does. `registry.FORMATS` lists all formats.

Letters: N out_features, K in_features, G groups of group_size columns (the last may be shorter).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmquant.errors import UserError
from llmquant.humanize import dtype_name
from llmquant.spec import SUPPORTED_BITS, QuantSpec
from llmquant.version import __version__
from llmquant.weight import QuantizedWeight, group_of_column

QUANTIZER = f"llmquant:{__version__}"
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

TensorShapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True, kw_only=True)
class ModuleGrid:
    """How one linear is quantized, according to a `quantization_config`."""

    spec: QuantSpec
    """Bits, group size and symmetry of the linear."""
    act_order_groups: bool = False
    """Whether columns are assigned to groups in any order (desc_act). If so, the linear must have a group-index tensor
    (g_idx)."""


@dataclass(frozen=True, kw_only=True)
class ParsedQuantization:
    """A parsed and validated `quantization_config`."""

    format: Format
    """The layout of the packed tensors."""
    default: QuantSpec | None
    """The grid of a linear that no rule names; None if the configuration names every quantized linear."""
    grid_of: Callable[[str], ModuleGrid | None]
    """Module name -> the grid of the linear, or None if it stays in 16 bit. Raises UserError if the patterns of the
    configuration take too long to match."""

    def spec_of(self, module: str) -> QuantSpec | None:
        """Return the grid of a linear, or None if it stays in 16 bit."""
        grid = self.grid_of(module)
        return None if grid is None else grid.spec


@dataclass(frozen=True, kw_only=True)
class Format:
    """One storage format as a record of pure functions."""

    name: str
    """Key of the format in `FORMATS`, and the value of `--format`."""
    suffixes: tuple[str, ...]
    """Suffixes of all tensors that may store a linear, the packed codes first."""
    group_index: str | None
    """Suffix of the tensor with the group of each column (act-order); None if the format has no such tensor."""
    min_zero: int
    """Smallest zero-point that can be stored: 1 for gptq v1, which stores z - 1, and 0 for the other formats."""
    scale_dtype: Callable[[torch.dtype], torch.dtype]
    """(dtype of the model) -> dtype of the stored scales. Scales must be rounded to it before weights are rounded."""
    refuses: Callable[[QuantSpec, int, int, torch.dtype], str | None]
    """(spec, N, K, scale dtype) -> why the format cannot store such a linear, with the remedy; None if it can."""
    tensor_shapes: Callable[[QuantSpec, int, int, torch.dtype], TensorShapes]
    """(spec, N, K, scale dtype) -> {suffix: (dtype, shape)} of the tensors that `pack` returns."""
    pack: Callable[[QuantizedWeight], dict[str, Tensor]]
    """Weight -> its stored tensors by suffix. They hold codes, scales and zero-points exactly; `pack` raises UserError
    if they cannot."""
    features: Callable[[Mapping[str, Tensor], QuantSpec], tuple[int, int]]
    """(tensors, spec) -> (N, K), after checking every dtype and shape. Raises UserError if one is wrong. No
    values are read, so tensors may be on the meta device (except compressed-tensors' `weight_shape`)."""
    unpack: Callable[[Mapping[str, Tensor], QuantSpec, int, int], QuantizedWeight]
    """(tensors, spec, N, K) -> the weight, after checking shapes and values. Raises UserError if one is wrong."""
    config: Callable[..., dict[str, Any]]
    """(default spec, {every linear: spec or None}, act_order_groups=False, meta=None) -> `quantization_config`. Raises
    UserError if the loaders of this format could not distinguish the linears."""
    parse: Callable[[Mapping[str, Any]], ParsedQuantization]
    """`quantization_config` -> its parsed form. Raises UserError for keys that are unknown or contradict each other."""
    mixes_group_sizes: bool = False
    """Whether every engine that loads the format reads a group size per linear. transformers ignores the per-linear
    overrides of the gptq formats, and the awq format has none. If this is False and a linear cannot have the
    requested group size, the plan uses one smaller size, if possible, for all linears whose size no override sets."""
    config_file: str | None = None
    """Name of a second file in which loaders look for the configuration; None if they read config.json only."""


# --- tensors ---------------------------------------------------------------------------------------------------------


def require(tensors: Mapping[str, Tensor], suffix: str) -> Tensor:
    """Return the tensor with this suffix. Raises UserError if it is missing."""
    if suffix not in tensors:
        raise UserError(f"{suffix}: missing, but other tensors of this linear are present; the checkpoint is damaged")
    return tensors[suffix]


def check_matrix(tensors: Mapping[str, Tensor], suffix: str, dtype: torch.dtype = torch.int32) -> tuple[int, int]:
    """Return the shape of a matrix. Raises UserError unless it is non-empty and has this dtype."""
    tensor = require(tensors, suffix)
    if tensor.dtype != dtype or tensor.ndim != 2 or 0 in tensor.shape:
        raise UserError(f"{suffix}: {_describe(tensor)}; must be a non-empty {dtype_name(dtype)} matrix")
    return tensor.shape[0], tensor.shape[1]


def check_tensors(tensors: Mapping[str, Tensor], expected: TensorShapes, scale_suffix: str, spec: QuantSpec) -> None:
    """Raise UserError if a dtype or shape differs from the configuration. Scales may have any of `SCALE_DTYPES`."""
    for suffix, (dtype, shape) in expected.items():
        tensor = require(tensors, suffix)
        allowed = SCALE_DTYPES if suffix == scale_suffix else (dtype,)
        if tensor.dtype not in allowed or tuple(tensor.shape) != shape:
            names = " or ".join(dtype_name(each) for each in allowed)
            raise UserError(
                f"{suffix}: {_describe(tensor)}; quantization_config ({spec.describe()}) requires {names} {list(shape)}"
            )


def check_scales(scale_NG: Tensor, zero_NG: Tensor, spec: QuantSpec, suffix: str) -> None:
    """Raise UserError unless every scale is finite and positive, or negative with the middle zero-point.

    AutoRound writes negative scales. It negates a symmetric group if the weight of largest magnitude is positive,
    because the grid has one more level below zero than above.
    """
    negative = (scale_NG < 0) & (zero_NG != spec.mid_code)
    for wrong, name in ((~torch.isfinite(scale_NG), "NaN or inf"), (negative | (scale_NG == 0), "zero or negative")):
        if count := int(wrong.sum()):
            raise UserError(
                f"{suffix}: {count} of {scale_NG.numel()} scales are {name}; scales must be finite and "
                f"not zero, and positive unless the zero-point is {spec.mid_code}"
            )


def check_zeros(zero_NG: Tensor, spec: QuantSpec, suffix: str) -> None:
    """Raise UserError if a symmetric grid has a zero-point other than the middle code."""
    if spec.symmetric and not bool((zero_NG == spec.mid_code).all()):
        raise UserError(
            f"{suffix}: zero-points from {int(zero_NG.min())} to {int(zero_NG.max())}, but quantization_config says "
            f"symmetric, so every zero-point must be {spec.mid_code}; correct its sym or checkpoint_format"
        )


def check_group_index(index: Tensor, spec: QuantSpec, in_features: int, suffix: str) -> Tensor | None:
    """Return the group of each column as int64 [K], or None if it is `k // group_size`. Raises UserError for a group
    that does not exist."""
    if index.dtype not in (torch.int32, torch.int64) or tuple(index.shape) != (in_features,):
        raise UserError(f"{suffix}: {_describe(index)}; must be int32 [{in_features}]")
    index_K = index.long()
    num_groups = spec.num_groups(in_features)
    lowest, highest = int(index_K.min()), int(index_K.max())
    if lowest < 0 or highest >= num_groups:
        raise UserError(f"{suffix}: groups from {lowest} to {highest}; must lie in 0 … {num_groups - 1}")
    if torch.equal(index_K, group_of_column(in_features, spec.group_size, index_K.device)):
        return None
    return index_K


def cast_scales(scale_NG: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the scales in the stored dtype. Raises UserError if that changes any of them."""
    stored = scale_NG.to(dtype)
    if not torch.equal(stored.to(scale_NG.dtype), scale_NG):
        changed = int((stored.to(scale_NG.dtype) != scale_NG).sum())
        raise UserError(
            f"scales: {changed} of {scale_NG.numel()} {dtype_name(scale_NG.dtype)} scales are not exact in "
            f"{dtype_name(dtype)}, which this format stores; use --format compressed-tensors, which keeps their dtype"
        )
    return stored


def num_features(words: int, bits: int, suffix: str) -> int:
    """Return how many codes fit into `words` words. Raises UserError if it is not a whole number (with 3 bits)."""
    if words * 32 % bits:
        raise UserError(
            f"{suffix}: {words} words do not hold a whole number of {bits}-bit codes; check bits in config.json"
        )
    return words * 32 // bits


def refuse_partial_group(spec: QuantSpec, in_features: int, needed_by: str) -> str | None:
    """Return why a format without partial groups cannot store a linear, or None. needed_by: name of the format."""
    if spec.group_size == -1 or in_features % spec.group_size == 0:
        return None
    return (
        f"in_features {in_features} is not a multiple of group_size {spec.group_size}, which {needed_by} needs; "
        "use a smaller --group-size, or --format gptq"
    )


def check_features(stored: tuple[int, int], out_features: int, in_features: int, suffix: str) -> None:
    """Raise UserError unless `stored`, the size of the stored weight, is (out_features, in_features)."""
    if stored != (out_features, in_features):
        raise UserError(
            f"{suffix}: holds a weight of {list(stored)}, but the model's is [{out_features}, {in_features}]"
        )


def _describe(tensor: Tensor) -> str:
    return f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"


# --- configurations --------------------------------------------------------------------------------------------------


def key_set(names: str) -> frozenset[str]:
    """Return the words of a string as a set."""
    return frozenset(names.split())


def check_keys(config: Mapping[str, Any], known: frozenset[str], foreign: Mapping[str, str], where: str) -> None:
    """Raise UserError for keys of another format, and for unknown keys whose value is not null, false or empty."""
    for key, value in config.items():
        if key in foreign:
            raise UserError(
                f"{where}: {key!r} is a key of {foreign[key]}, not of this format; config.json contradicts itself, "
                "so keep the keys of one format"
            )
        if key not in known and value not in (None, False, "", [], {}):
            raise UserError(
                f"{where}: unknown key {key!r} = {value!r:.60}; it may change what the tensors mean. "
                "Remove it from config.json if it does not"
            )


def make_grid(bits: Any, group_size: Any, symmetric: Any, act_order_groups: Any, where: str) -> ModuleGrid:
    """Return the grid of these values from a file. Raises UserError for a value that is not valid."""
    if type(bits) is not int or bits not in SUPPORTED_BITS:
        raise UserError(f"{where}: bits {bits!r:.40}; must be one of {', '.join(map(str, SUPPORTED_BITS))}")
    if type(group_size) is not int or (group_size < 1 and group_size != -1):
        raise UserError(f"{where}: group_size {group_size!r:.40}; must be a positive number, or -1 for one group")
    for name, flag in (("sym", symmetric), ("desc_act", act_order_groups)):
        if type(flag) is not bool:
            raise UserError(f"{where}: {name} {flag!r:.40}; must be true or false")
    spec = QuantSpec(bits=bits, group_size=group_size, symmetric=symmetric)
    return ModuleGrid(spec=spec, act_order_groups=act_order_groups)


def string_list(value: Any, where: str) -> list[str]:
    """Return a list of strings from a file; null is an empty list. Raises UserError for anything else."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserError(f"{where}: {value!r:.60}; must be a list of strings")
    return value
