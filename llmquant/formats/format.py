"""What a format is: pure functions between `QuantizedWeight` and named tensors, and between specs and `config.json`.

A linear called `m` is stored as tensors `m.<suffix>`; a format knows its suffixes, their dtypes and shapes, and the
words in them. It does not know files, modules or models: `checkpoints/` adds those. `registry.FORMATS` has the entries.

Letters: N out_features, K in_features, G groups of group_size columns (the last may be shorter).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmquant import __version__
from llmquant.errors import UserError
from llmquant.spec import SUPPORTED_BITS, QuantSpec
from llmquant.weight import QuantizedWeight, group_of_column

QUANTIZER = f"llmquant:{__version__}"
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

TensorShapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True, kw_only=True)
class ModuleGrid:
    """What a `quantization_config` says about one linear."""

    spec: QuantSpec
    """The grid."""
    moving_groups: bool = False
    """Columns belong to groups in any order, so a group-index tensor must be there."""


@dataclass(frozen=True, kw_only=True)
class ParsedQuantization:
    """A `quantization_config`, understood."""

    format: Format
    """How the tensors are laid out."""
    default: QuantSpec | None
    """The grid of a linear that no rule names; None where every rule names its linears."""
    grid_of: Callable[[str], ModuleGrid | None]
    """Module name -> its grid, or None for a linear that stays in 16 bit."""

    def spec_of(self, module: str) -> QuantSpec | None:
        """The grid of a linear, or None if it stays in 16 bit."""
        grid = self.grid_of(module)
        return None if grid is None else grid.spec


@dataclass(frozen=True, kw_only=True)
class Format:
    """One on-disk format, as pure functions."""

    name: str
    """Its key in `FORMATS`, and the value of `--format`."""
    suffixes: tuple[str, ...]
    """Every tensor that a linear may be stored as, the packed codes first."""
    group_index: str | None
    """The suffix that holds the group of each column when groups move; None if the format has no such tensor."""
    min_zero: int
    """Smallest zero-point that can be stored: 1 for gptq v1, whose stored zero is z - 1; 0 elsewhere."""
    scale_dtype: Callable[[torch.dtype], torch.dtype]
    """(dtype of the model) -> dtype in which scales are stored. Round scales to it before rounding weights."""
    refuses: Callable[[QuantSpec, int, int, torch.dtype], str | None]
    """(spec, N, K, scale dtype) -> why such a linear cannot be held, with the remedy; None if it can."""
    tensor_shapes: Callable[[QuantSpec, int, int, torch.dtype], TensorShapes]
    """(spec, N, K, scale dtype) -> suffix -> (dtype, shape) of what `pack` returns."""
    pack: Callable[[QuantizedWeight], dict[str, Tensor]]
    """The stored tensors by suffix. Codes, scales and zeros are kept exactly, or a UserError says what would not be."""
    features: Callable[[Mapping[str, Tensor], QuantSpec], tuple[int, int]]
    """(tensors, spec) -> (N, K), after checking every dtype and shape; UserError names the tensor. Reads no values, so
    tensors may be on the meta device (except compressed-tensors' `weight_shape`)."""
    unpack: Callable[[Mapping[str, Tensor], QuantSpec, int, int], QuantizedWeight]
    """(tensors, spec, N, K) -> the weight. Checks shapes and values; UserError names the tensor."""
    config: Callable[..., dict[str, Any]]
    """(default spec, {every linear: spec or None}, moving_groups=False, meta={}) -> `quantization_config`. UserError if
    the loaders of this format could not tell the linears apart."""
    parse: Callable[[Mapping[str, Any]], ParsedQuantization]
    """`quantization_config` -> what it means. UserError on keys that are unknown or contradict each other."""
    mixes_group_sizes: bool = False
    """Whether every engine that loads the format reads a group size per linear. transformers ignores the exceptions of
    the gptq formats, and the awq format has none: a linear that needs smaller groups gives them to all the others."""
    config_file: str | None = None
    """A file of its own in which loaders also look for the configuration."""


# --- tensors ---------------------------------------------------------------------------------------------------------


def require(tensors: Mapping[str, Tensor], suffix: str) -> Tensor:
    """The tensor of that suffix; UserError if it is missing."""
    if suffix not in tensors:
        raise UserError(
            f"{suffix}: missing, though the other tensors of this linear are there; the checkpoint is damaged"
        )
    return tensors[suffix]


def check_matrix(tensors: Mapping[str, Tensor], suffix: str, dtype: torch.dtype = torch.int32) -> tuple[int, int]:
    """Shape of a non-empty matrix of that dtype; UserError otherwise."""
    tensor = require(tensors, suffix)
    if tensor.dtype != dtype or tensor.ndim != 2 or 0 in tensor.shape:
        raise UserError(f"{suffix}: {_describe(tensor)}; must be a non-empty {_name(dtype)} matrix")
    return tensor.shape[0], tensor.shape[1]


def check_tensors(tensors: Mapping[str, Tensor], expected: TensorShapes, scale_suffix: str, spec: QuantSpec) -> None:
    """Compares dtypes and shapes with what the configuration asks for; scales may have any of `SCALE_DTYPES`."""
    for suffix, (dtype, shape) in expected.items():
        tensor = require(tensors, suffix)
        allowed = SCALE_DTYPES if suffix == scale_suffix else (dtype,)
        if tensor.dtype not in allowed or tuple(tensor.shape) != shape:
            names = " or ".join(_name(each) for each in allowed)
            raise UserError(
                f"{suffix}: {_describe(tensor)}; quantization_config ({spec.describe()}) asks for {names} {list(shape)}"
            )


def check_scales(scale_NG: Tensor, zero_NG: Tensor, spec: QuantSpec, suffix: str) -> None:
    """UserError unless every scale is finite and positive. One below zero may stand beside the middle zero-point.

    AutoRound writes those: it turns a symmetric group around where its largest weight is positive, since codes reach
    one step further down than up.
    """
    negative = (scale_NG < 0) & (zero_NG != spec.mid_code)
    for wrong, name in ((~torch.isfinite(scale_NG), "NaN or inf"), (negative | (scale_NG == 0), "zero or negative")):
        if count := int(wrong.sum()):
            raise UserError(
                f"{suffix}: {count} of {scale_NG.numel()} scales are {name}; scales must be finite and positive"
            )


def check_zeros(zero_NG: Tensor, spec: QuantSpec, suffix: str) -> None:
    """UserError if a symmetric grid has a zero-point that is not the middle code."""
    if spec.symmetric and not bool((zero_NG == spec.mid_code).all()):
        raise UserError(
            f"{suffix}: zero-points from {int(zero_NG.min())} to {int(zero_NG.max())}, but quantization_config says "
            f"symmetric, which means {spec.mid_code}; correct its sym or checkpoint_format"
        )


def check_group_index(index: Tensor, spec: QuantSpec, in_features: int, suffix: str) -> Tensor | None:
    """The group of each column, int64 [K], or None if it is `k // group_size`; UserError if it is not a valid group."""
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
    """The scales in the stored dtype; UserError if any of them would change."""
    stored = scale_NG.to(dtype)
    if not torch.equal(stored.to(scale_NG.dtype), scale_NG):
        changed = int((stored.to(scale_NG.dtype) != scale_NG).sum())
        raise UserError(
            f"scales: {changed} of {scale_NG.numel()} {_name(scale_NG.dtype)} scales are not exact in {_name(dtype)}, "
            "which this format stores; use --format compressed-tensors, which keeps their dtype"
        )
    return stored


def num_features(words: int, bits: int, suffix: str) -> int:
    """How many codes a dimension of whole words holds; UserError if it is not a whole number (3 bits)."""
    if words * 32 % bits:
        raise UserError(
            f"{suffix}: {words} words do not hold a whole number of {bits}-bit codes; check bits in config.json"
        )
    return words * 32 // bits


def refuse_partial_group(spec: QuantSpec, in_features: int, needed_by: str) -> str | None:
    """Why a format whose readers divide in_features by group_size cannot hold a linear, or None where it can."""
    if spec.group_size == -1 or in_features % spec.group_size == 0:
        return None
    return (
        f"in_features {in_features} is not a multiple of group_size {spec.group_size}, which {needed_by} needs; "
        "use a smaller --group-size, or --format gptq"
    )


def check_features(found: tuple[int, int], out_features: int, in_features: int, suffix: str) -> None:
    """UserError unless the tensors hold an [N, K] weight."""
    if found != (out_features, in_features):
        raise UserError(
            f"{suffix}: holds a weight of {list(found)}, but the model's is [{out_features}, {in_features}]"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _describe(tensor: Tensor) -> str:
    return f"{_name(tensor.dtype)} {list(tensor.shape)}"


# --- configurations --------------------------------------------------------------------------------------------------


def key_set(names: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(names.split())


def check_keys(config: Mapping[str, Any], known: frozenset[str], foreign: Mapping[str, str], where: str) -> None:
    """Refuses keys of another format, and keys that nobody knows unless they are switched off (null, false, empty)."""
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


def make_grid(bits: Any, group_size: Any, symmetric: Any, moving_groups: Any, where: str) -> ModuleGrid:
    """Checks the values that came from a file, and builds the grid."""
    if type(bits) is not int or bits not in SUPPORTED_BITS:
        raise UserError(f"{where}: bits {bits!r:.40}; must be one of {', '.join(map(str, SUPPORTED_BITS))}")
    if type(group_size) is not int or (group_size < 1 and group_size != -1):
        raise UserError(f"{where}: group_size {group_size!r:.40}; must be a positive number, or -1 for one group")
    for name, flag in (("sym", symmetric), ("desc_act", moving_groups)):
        if type(flag) is not bool:
            raise UserError(f"{where}: {name} {flag!r:.40}; must be true or false")
    spec = QuantSpec(bits=bits, group_size=group_size, symmetric=symmetric)
    return ModuleGrid(spec=spec, moving_groups=moving_groups)


MAX_REPEATS = 6
"""Repetitions without end in one alternative of a regular expression."""


def compile_pattern(pattern: str, where: str) -> re.Pattern[str]:
    """A regular expression from a file; UserError if it is not one, or one that could match for ever."""
    if runs_away(pattern):
        raise UserError(
            f"{where}: {pattern!r:.60} repeats a group, or has more than {MAX_REPEATS} repetitions in one alternative: "
            "matching it could take for ever; write it without"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a later version of Python may read otherwise
            return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"{where}: {pattern!r:.60} is not a regular expression ({error})") from None


def runs_away(pattern: str) -> bool:
    """Whether backtracking could take exponential time (a repeated group), or a high power of the name's length. The
    names of linears need neither."""
    if re.search(r"\(\?(#|[aiLmsu]*x)", pattern):
        return True  # comments, which could hide what follows from the scan below
    # Per open group: repetitions of the longest alternative so far, and of the one that is read.
    longest, current = [0], [0]
    in_set, previous = False, ""
    characters = iter(pattern)
    for character in characters:
        if character == "\\":
            next(characters, None)
        elif in_set:
            in_set = character != "]"
        elif character == "[":
            in_set = True
        elif character == "(":
            longest.append(0)
            current.append(0)
        elif character == "|":
            longest[-1], current[-1] = max(longest[-1], current[-1]), 0
        elif character == ")" and len(current) > 1:
            inside = max(longest.pop(), current.pop())
            current[-1] += inside
        elif character in "*+{":
            if previous == ")":
                return True
            current[-1] += 1
        previous = character
    return any(max(pair) > MAX_REPEATS for pair in zip(longest, current, strict=True))


def string_list(value: Any, where: str) -> list[str]:
    """A list of strings (or null: an empty one) from a file; UserError if it is anything else."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserError(f"{where}: {value!r:.60}; must be a list of strings")
    return value
