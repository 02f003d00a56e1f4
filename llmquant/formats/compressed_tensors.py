"""The `pack-quantized` layout of compressed-tensors, which llm-compressor writes and vLLM maintains.

| tensor | dtype | shape | content |
|---|---|---|---|
| weight_packed | int32 | [N, ceil(K*b/32)] | codes, packed along K, tail bits 0 |
| weight_scale | dtype of the model | [N, G] | |
| weight_shape | int64 | [2] | (N, K) |
| weight_zero_point | int32 | [ceil(N*b/32), G] | zero-points, packed along N; asymmetric grids only |
| weight_g_idx | int32 | [K] | group of each column (act-order); found in old files only, never written |

The documentation of the format counts codes from -2**(b-1) and adds 2**(b-1) to store them. The stored codes are
therefore those of a `QuantizedWeight`, 0 … 2**b - 1.

Letters: N out_features, K in_features, G groups of group_size columns, b bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmquant.errors import UserError
from llmquant.formats.bitpack import num_words, pack_bits, unpack_bits
from llmquant.formats.format import (
    Format,
    ModuleGrid,
    ParsedQuantization,
    TensorShapes,
    check_features,
    check_group_index,
    check_keys,
    check_matrix,
    check_scales,
    check_tensors,
    check_zeros,
    key_set,
    make_grid,
    refuse_partial_group,
    require,
    string_list,
)
from llmquant.formats.patterns import MatchTimer, Pattern
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

SUFFIXES = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")

KNOWN_KEYS = key_set(
    "quant_method format quantization_status config_groups ignore kv_cache_scheme global_compression_ratio "
    "sparsity_config transform_config version"
)
GROUP_KEYS = key_set("targets weights input_activations output_activations format")
WEIGHT_KEYS = key_set(
    "num_bits type symmetric strategy group_size dynamic actorder block_structure scale_dtype zp_dtype "
    # The keys below describe how the range was found. They do not affect the tensors.
    "observer observer_kwargs"
)
FOREIGN_KEYS = {
    **dict.fromkeys(("bits", "group_size", "desc_act", "sym", "checkpoint_format", "dynamic"), "gptq"),
    **dict.fromkeys(("zero_point", "w_bit", "q_group_size", "modules_to_not_convert"), "awq"),
}


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the model, unchanged."""
    return dtype


def refuses(spec: QuantSpec, out_features: int, in_features: int, dtype: torch.dtype) -> str | None:
    """Return why a linear cannot be stored, or None. It needs whole groups: loaders divide K by group_size."""
    return refuse_partial_group(spec, in_features, "compressed-tensors")


def tensor_shapes(spec: QuantSpec, out_features: int, in_features: int, dtype: torch.dtype) -> TensorShapes:
    num_groups = spec.num_groups(in_features)
    shapes: TensorShapes = {
        "weight_packed": (torch.int32, (out_features, num_words(in_features, spec.bits))),
        "weight_scale": (dtype, (out_features, num_groups)),
        "weight_shape": (torch.int64, (2,)),
    }
    if not spec.symmetric:
        shapes["weight_zero_point"] = (torch.int32, (num_words(out_features, spec.bits), num_groups))
    return shapes


def pack(weight: QuantizedWeight) -> dict[str, Tensor]:
    spec = weight.spec
    if reason := refuses(spec, weight.out_features, weight.in_features, weight.scale_NG.dtype):
        raise UserError(reason)
    if weight.group_index_K is not None:
        raise UserError("weight_g_idx: engines no longer load act-order groups in this format; use --format gptq")
    tensors = {
        "weight_packed": pack_bits(weight.codes_NK, spec.bits, dim=1),
        "weight_scale": weight.scale_NG.contiguous(),
        "weight_shape": torch.tensor([weight.out_features, weight.in_features], dtype=torch.int64),
    }
    if not spec.symmetric:
        tensors["weight_zero_point"] = pack_bits(weight.zero_NG, spec.bits, dim=0)
    return tensors


def features(tensors: Mapping[str, Tensor], spec: QuantSpec) -> tuple[int, int]:
    out_features, words = check_matrix(tensors, "weight_packed")
    shape = require(tensors, "weight_shape")
    if shape.dtype not in (torch.int64, torch.int32) or tuple(shape.shape) != (2,):
        raise UserError(f"weight_shape: {shape.dtype} {list(shape.shape)}; must be int64 or int32 [2]")
    rows, in_features = shape.tolist()
    if rows != out_features or in_features < 1 or num_words(in_features, spec.bits) != words:
        raise UserError(
            f"weight_shape: [{rows}, {in_features}] does not fit {spec.bits}-bit weight_packed {[out_features, words]}"
        )
    expected = tensor_shapes(spec, out_features, in_features, torch.float16)
    expected["weight_shape"] = (shape.dtype, (2,))
    zero = tensors.get("weight_zero_point")
    if zero is not None:
        packed = (torch.int32, (num_words(out_features, spec.bits), spec.num_groups(in_features)))
        # Tools stored one signed byte per zero-point until 2025.
        legacy = (torch.int8, (out_features, spec.num_groups(in_features)))
        expected["weight_zero_point"] = legacy if zero.dtype == torch.int8 else packed
    check_tensors(tensors, expected, "weight_scale", spec)
    if reason := refuses(spec, out_features, in_features, torch.float16):
        raise UserError(f"weight_scale: {reason}")
    return out_features, in_features


def unpack(tensors: Mapping[str, Tensor], spec: QuantSpec, out_features: int, in_features: int) -> QuantizedWeight:
    check_features(features(tensors, spec), out_features, in_features, "weight_packed")
    zero = tensors.get("weight_zero_point")
    if zero is None:
        zero_NG = torch.full_like(tensors["weight_scale"], spec.mid_code, dtype=torch.uint8)
    elif zero.dtype == torch.int8:
        shifted = zero.int() + spec.mid_code
        if bool(((shifted < 0) | (shifted > spec.max_code)).any()):
            raise UserError(
                f"weight_zero_point: outside {-spec.mid_code} … {spec.mid_code - 1}, the range of {spec.bits} bits"
            )
        zero_NG = shifted.to(torch.uint8)
    else:
        zero_NG = unpack_bits(zero, spec.bits, 0, out_features)
    check_zeros(zero_NG, spec, "weight_zero_point")
    check_scales(tensors["weight_scale"], zero_NG, spec, "weight_scale")
    index = tensors.get("weight_g_idx")
    return QuantizedWeight(
        codes_NK=unpack_bits(tensors["weight_packed"], spec.bits, 1, in_features),
        scale_NG=tensors["weight_scale"],
        zero_NG=zero_NG,
        spec=spec,
        group_index_K=None if index is None else check_group_index(index, spec, in_features, "weight_g_idx"),
    )


# --- configuration ---------------------------------------------------------------------------------------------------


def config(
    default: QuantSpec,
    specs: Mapping[str, QuantSpec | None],
    *,
    act_order_groups: bool = False,
    meta: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the `quantization_config`, with one config group per grid.

    A single config group targets the class Linear. Several config groups name all their linears: an engine that fuses
    q, k and v looks up the class before the three names, so a config group for Linear would apply to all of them.
    `meta` is not used, because the loader rejects unknown keys.
    """
    assert not act_order_groups
    groups: dict[QuantSpec, list[str]] = {default: []}
    for name, spec in specs.items():
        if spec is not None:
            groups.setdefault(spec, []).append(name)
    used = {spec: names for spec, names in groups.items() if names} or groups
    if len(used) == 1:
        used = {spec: ["Linear"] for spec in used}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": {
                "targets": names,
                "input_activations": None,
                "output_activations": None,
                "weights": _weights(spec),
            }
            for index, (spec, names) in enumerate(used.items())
        },
        "ignore": [name for name, spec in specs.items() if spec is None],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _weights(spec: QuantSpec) -> dict[str, Any]:
    per_channel = spec.group_size == -1
    return {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": spec.symmetric,
        "strategy": "channel" if per_channel else "group",
        "group_size": None if per_channel else spec.group_size,
        "dynamic": False,
    }


def parse(config: Mapping[str, Any]) -> ParsedQuantization:
    """Parse a configuration of llm-compressor or llmquant.

    `ignore` takes precedence over all targets. Otherwise, a target that names the linear (exactly, or by a `re:`
    pattern from its start) takes precedence over a target of its class, Linear.
    """
    where = "quantization_config (compressed-tensors)"
    check_keys(config, KNOWN_KEYS, FOREIGN_KEYS, where)
    layout = config.get("format", "pack-quantized")
    if layout not in ("pack-quantized", "mixed-precision"):
        raise UserError(f"{where}: format {layout!r:.40}; only pack-quantized can be read")
    if config.get("quantization_status", "compressed") != "compressed":
        raise UserError(f"{where}: quantization_status {config['quantization_status']!r:.40}; must be compressed")
    if config.get("kv_cache_scheme"):
        raise UserError(f"{where}: kv_cache_scheme is set; a quantized key-value cache cannot be read")
    sparsity = config.get("sparsity_config") or {}
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        raise UserError(f"{where}: sparsity_config is set; sparse weights cannot be read")
    transform = config.get("transform_config") or {}
    if not isinstance(transform, dict) or transform.get("config_groups"):
        raise UserError(f"{where}: transform_config is set; weights under a transform cannot be read")
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise UserError(f"{where}: config_groups {groups!r:.40}; must be an object with at least one group")

    timer = MatchTimer()
    rules: list[tuple[_Matcher, ModuleGrid]] = []
    for name, group in groups.items():
        group_where = f"{where}: {name}"
        if not isinstance(group, dict):
            raise UserError(f"{group_where}: {group!r:.40}; must be an object")
        grid = _group_grid(group, layout, group_where)
        targets = string_list(group.get("targets"), f"{group_where}: targets")
        rules.append((_Matcher(targets, group_where, timer), grid))
    ignore = _Matcher(string_list(config.get("ignore"), f"{where}: ignore"), f"{where}: ignore", timer)
    by_class = [grid for matcher, grid in rules if matcher.matches_class]
    if len(set(by_class)) > 1:
        raise UserError(
            f"{where}: two config_groups target Linear with different grids; config.json contradicts itself"
        )
    default = by_class[0] if by_class else None

    def grid_of(module: str) -> ModuleGrid | None:
        if ignore.matches_class or ignore.matches_name(module):
            return None
        return next((grid for matcher, grid in rules if matcher.matches_name(module)), default)

    return ParsedQuantization(format=FORMAT, default=None if default is None else default.spec, grid_of=grid_of)


class _Matcher:
    """The entries of a `targets` or `ignore` list: exact names, `re:` patterns, and the class Linear."""

    def __init__(self, entries: list[str], where: str, timer: MatchTimer) -> None:
        self.matches_class = "Linear" in entries
        self._names = frozenset(entry for entry in entries if not entry.startswith("re:"))
        self._patterns = [Pattern(entry[3:], where, timer) for entry in entries if entry.startswith("re:")]

    def matches_name(self, module: str) -> bool:
        return module in self._names or any(pattern.matches(module) for pattern in self._patterns)


def _group_grid(group: Mapping[str, Any], layout: str, where: str) -> ModuleGrid:
    check_keys(group, GROUP_KEYS, {}, where)
    for key in ("input_activations", "output_activations"):
        if group.get(key):
            raise UserError(f"{where}: {key} is set; only weight-only quantization can be read")
    if (group.get("format") or "pack-quantized") != "pack-quantized" or (
        layout == "mixed-precision" and not group.get("format")
    ):
        raise UserError(f"{where}: format {group.get('format')!r:.40}; only pack-quantized can be read")
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise UserError(f"{where}: weights {weights!r:.40}; must be an object")
    where += ": weights"
    check_keys(weights, WEIGHT_KEYS, {}, where)
    if weights.get("type", "int") != "int" or weights.get("dynamic"):
        raise UserError(f"{where}: only static integer weights can be read")
    group_size = weights.get("group_size")
    strategy = weights.get("strategy") or ("channel" if group_size == -1 else "group")
    if strategy not in ("group", "channel"):
        raise UserError(f"{where}: strategy {strategy!r:.40}; must be group or channel")
    if strategy == "channel":
        if group_size not in (None, -1):
            raise UserError(f"{where}: group_size {group_size!r:.40} contradicts strategy channel; correct one of them")
        group_size = -1
    elif group_size == -1:
        raise UserError(f"{where}: group_size -1 contradicts strategy group; correct one of them")
    order = weights.get("actorder")
    if order not in (None, False, True, "static", "weight", "group", "dynamic"):
        raise UserError(f"{where}: actorder {order!r:.40}; must be null, static, weight, group or dynamic")
    act_order_groups = order in (True, "group", "dynamic")
    return make_grid(weights.get("num_bits", 8), group_size, weights.get("symmetric", True), act_order_groups, where)


FORMAT = Format(
    name="compressed-tensors",
    suffixes=SUFFIXES,
    group_index="weight_g_idx",
    min_zero=0,
    scale_dtype=scale_dtype,
    refuses=refuses,
    tensor_shapes=tensor_shapes,
    pack=pack,
    features=features,
    unpack=unpack,
    config=config,
    parse=parse,
    mixes_group_sizes=True,
)
