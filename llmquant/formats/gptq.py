"""The layout of GPTQ, v1 (`gptq`) and v2 (`gptq_v2`). AutoGPTQ introduced it; GPTQModel, vLLM and SGLang read it.

| tensor | dtype | shape | content |
|---|---|---|---|
| qweight | int32 | [K*b/32, N] | codes, packed along K |
| qzeros | int32 | [G, N*b/32] | zero-points, packed along N; v1 stores z - 1, v2 stores z |
| scales | float16 or bfloat16 | [G, N] | |
| g_idx | int32 | [K] | group of each column; `k // group_size` without act-order |

Letters: N out_features, K in_features, G groups of group_size columns (the last may be shorter), b bits.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmquant.errors import UserError
from llmquant.formats.bitpack import num_words, pack_bits, unpack_bits
from llmquant.formats.format import (
    QUANTIZER,
    Format,
    ModuleGrid,
    ParsedQuantization,
    TensorShapes,
    cast_scales,
    check_features,
    check_group_index,
    check_keys,
    check_matrix,
    check_scales,
    check_tensors,
    check_zeros,
    key_set,
    make_grid,
    num_features,
    string_list,
)
from llmquant.formats.fused import with_fused_names
from llmquant.formats.patterns import MatchTimer, Pattern
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")

KNOWN_KEYS = key_set(
    "quant_method method checkpoint_format format bits group_size sym desc_act lm_head dynamic pack_dtype meta "
    "modules_in_block_to_quantize "
    # The keys below describe how the weights were computed, or which kernel to run. They do not affect the tensors.
    "true_sequential static_groups damp_percent damp_auto_increment dataset tokenizer model_seqlen batch_size "
    "block_name_to_quantize cache_block_outputs exllama_config max_input_length module_name_preceding_first_block "
    "pad_token_id use_cuda_fp16 use_exllama disable_exllama backend model_name_or_path model_file_base_name "
    "is_marlin_format act_group_aware mse hyb_act failsafe fallback offload_to_disk offload_to_disk_path rotation_seed "
    "quantizer provider autoround_version iters lr minmax_lr enable_minmax_tuning enable_quanted_input "
    "enable_norm_bias_tuning low_gpu_mem_usage low_cpu_mem_usage nsamples seqlen scale_dtype data_type "
    "gradient_accumulate_steps amp quant_block_list super_bits super_group_size to_quant_block_names"
)
FOREIGN_KEYS = {
    "config_groups": "compressed-tensors",
    "quantization_status": "compressed-tensors",
    "zero_point": "awq",
    "version": "awq",
    "w_bit": "awq",
    "q_group_size": "awq",
    "modules_to_not_convert": "awq",
}
OVERRIDE_KEYS = key_set("bits group_size sym desc_act damp_percent damp_auto_increment mse static_groups")


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return bfloat16 for bfloat16 and float16 otherwise. Engines copy scales into the model's dtype, so scales of that
    dtype stay exact."""
    return dtype if dtype == torch.bfloat16 else torch.float16


def refuses(spec: QuantSpec, out_features: int, in_features: int, dtype: torch.dtype) -> str | None:
    """Return why a linear cannot be stored, or None. It needs whole words: K * b and N * b must be multiples of 32. If
    b is 3, K and N must be multiples of 32 too."""
    multiple = 32 if spec.bits == 3 else 32 // spec.bits
    for name, size in (("in_features", in_features), ("out_features", out_features)):
        if size % multiple:
            return (
                f"{name} {size} is not a multiple of {multiple}, which {spec.bits}-bit GPTQ packing needs; "
                "use --format compressed-tensors, or --skip it"
            )
    return None


def tensor_shapes(spec: QuantSpec, out_features: int, in_features: int, dtype: torch.dtype) -> TensorShapes:
    num_groups = spec.num_groups(in_features)
    return {
        "qweight": (torch.int32, (num_words(in_features, spec.bits), out_features)),
        "qzeros": (torch.int32, (num_groups, num_words(out_features, spec.bits))),
        "scales": (scale_dtype(dtype), (num_groups, out_features)),
        "g_idx": (torch.int32, (in_features,)),
    }


def pack(weight: QuantizedWeight, *, zero_offset: int) -> dict[str, Tensor]:
    """Return the stored tensors. zero_offset: subtracted from each zero-point, 1 in v1 and 0 in v2."""
    spec = weight.spec
    if reason := refuses(spec, weight.out_features, weight.in_features, weight.scale_NG.dtype):
        raise UserError(reason)
    if zero_offset and bool((weight.zero_NG < zero_offset).any()):
        raise UserError(
            "qzeros: a zero-point of 0 cannot be stored as z - 1 (loaders decode it differently); "
            "use --format gptq_v2 or compressed-tensors"
        )
    return {
        "qweight": pack_bits(weight.codes_NK, spec.bits, dim=1).T.contiguous(),
        "qzeros": pack_bits(weight.zero_NG - zero_offset, spec.bits, dim=0).T.contiguous(),
        "scales": cast_scales(weight.scale_NG, scale_dtype(weight.scale_NG.dtype)).T.contiguous(),
        "g_idx": weight.group_of_column_K.int(),
    }


def features(tensors: Mapping[str, Tensor], spec: QuantSpec) -> tuple[int, int]:
    rows, out_features = check_matrix(tensors, "qweight")
    in_features = num_features(rows, spec.bits, "qweight")
    expected = tensor_shapes(spec, out_features, in_features, torch.float16)
    if "g_idx" not in tensors:
        # Some tools omit g_idx if it is k // group_size. The configuration decides whether it may be missing.
        del expected["g_idx"]
    check_tensors(tensors, expected, "scales", spec)
    if reason := refuses(spec, out_features, in_features, torch.float16):
        raise UserError(f"qzeros: {reason}")
    return out_features, in_features


def unpack(
    tensors: Mapping[str, Tensor], spec: QuantSpec, out_features: int, in_features: int, *, zero_offset: int
) -> QuantizedWeight:
    check_features(features(tensors, spec), out_features, in_features, "qweight")
    qzeros = tensors["qzeros"]
    if zero_offset and spec.bits != 3:
        # GPTQModel converts v2 to v1 by one subtraction, which takes 1 from every field of a word. One addition undoes
        # this, even if a zero-point of 0 borrowed from its neighbor.
        qzeros = qzeros + _ones_in_each_field(spec.bits)
        zero_GN = unpack_bits(qzeros, spec.bits, 1, out_features)
    else:
        zero_GN = (unpack_bits(qzeros, spec.bits, 1, out_features) + zero_offset) & spec.max_code
    zero_NG = zero_GN.T.contiguous()
    check_zeros(zero_NG, spec, "qzeros")
    check_scales(tensors["scales"].T, zero_NG, spec, "scales")
    g_idx = tensors.get("g_idx")
    return QuantizedWeight(
        codes_NK=unpack_bits(tensors["qweight"], spec.bits, 0, in_features).T.contiguous(),
        scale_NG=tensors["scales"].T.contiguous(),
        zero_NG=zero_NG,
        spec=spec,
        group_index_K=None if g_idx is None else check_group_index(g_idx, spec, in_features, "g_idx"),
    )


def _ones_in_each_field(bits: int) -> int:
    """Return a word with a one in the lowest bit of each field: 0x11111111 for 4 bits."""
    return sum(1 << shift for shift in range(0, 32, bits))


# --- configuration ---------------------------------------------------------------------------------------------------


def config(
    default: QuantSpec,
    specs: Mapping[str, QuantSpec | None],
    *,
    checkpoint_format: str,
    act_order_groups: bool = False,
    meta: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the `quantization_config`.

    specs: all linears of the model, with None for a linear that stays in 16 bit. `dynamic` gets one regular expression
    per grid that differs from the default. The expressions match fused names too, because an engine that fuses linears
    looks up the fused name.
    """
    specs = with_fused_names(specs)
    lm_heads = {name: spec for name, spec in specs.items() if _is_lm_head(name)}
    result: dict[str, Any] = {
        "quant_method": "gptq",
        "checkpoint_format": checkpoint_format,
        "bits": default.bits,
        "group_size": default.group_size,
        "desc_act": act_order_groups,
        "sym": default.symmetric,
        "lm_head": any(spec is not None for spec in lm_heads.values()),
        "pack_dtype": "int32",
        "true_sequential": True,
        "meta": {"quantizer": [QUANTIZER], **(meta or {})},
    }
    exceptions: dict[QuantSpec | None, list[str]] = defaultdict(list)
    for name, spec in specs.items():
        if spec != default and not (spec is None and name in lm_heads):
            exceptions[spec].append(name)
    if exceptions:
        result["dynamic"] = {
            ("-:" if spec is None else "+:") + _pattern(names, specs): _override(spec, default)
            for spec, names in exceptions.items()
        }
    return result


def _override(spec: QuantSpec | None, default: QuantSpec) -> dict[str, Any]:
    if spec is None:
        return {}
    values = {"bits": spec.bits, "group_size": spec.group_size, "sym": spec.symmetric}
    defaults = {"bits": default.bits, "group_size": default.group_size, "sym": default.symmetric}
    return {key: value for key, value in values.items() if value != defaults[key]}


def _pattern(names: list[str], specs: Mapping[str, QuantSpec | None]) -> str:
    """Return a regular expression for these names, with `\\d+` for the layer number if all layers share a grid."""
    specs_of_pattern = defaultdict(set)
    for name, spec in specs.items():
        specs_of_pattern[_any_number(name)].add(spec)
    patterns = {
        _any_number(name) if len(specs_of_pattern[_any_number(name)]) == 1 else re.escape(name): None for name in names
    }
    return f"^(?:{'|'.join(patterns)})$"


def _any_number(name: str) -> str:
    return r"\.".join(r"\d+" if part.isdecimal() else re.escape(part) for part in name.split("."))


def _is_lm_head(name: str) -> bool:
    return name.rpartition(".")[2] == "lm_head"


def parse(config: Mapping[str, Any]) -> ParsedQuantization:
    """Parse a configuration of AutoGPTQ, GPTQModel, optimum, AutoRound or llmquant.

    `dynamic` maps regular expressions to overrides. The first expression that matches the start of the name
    applies. If it begins with `-:`, the linear stays in 16 bit; the prefix `+:` is optional.
    """
    where = "quantization_config (gptq)"
    check_keys(config, KNOWN_KEYS, FOREIGN_KEYS, where)
    layout = config.get("checkpoint_format", config.get("format", "gptq"))
    if layout not in ("gptq", "gptq_v2") or config.get("format", layout) != layout:
        raise UserError(f"{where}: checkpoint_format {layout!r:.40}; must be gptq or gptq_v2")
    if config.get("pack_dtype", "int32") not in ("int32", "torch.int32", None):
        raise UserError(f"{where}: pack_dtype {config['pack_dtype']!r:.40}; must be int32")
    for key in ("bits", "group_size"):
        if key not in config:
            raise UserError(f"{where}: {key} is missing; config.json must say how the weights are packed")
    fields = {
        "bits": config["bits"],
        "group_size": config["group_size"],
        "sym": config.get("sym", True),
        "desc_act": config.get("desc_act", False),
    }
    default = _grid(fields, where)
    rules = _dynamic_rules(config.get("dynamic") or {}, fields, where)
    in_block = config.get("modules_in_block_to_quantize") or []
    if not isinstance(in_block, list):
        raise UserError(f"{where}: modules_in_block_to_quantize {in_block!r:.40}; must be a list")
    only = string_list([n for item in in_block for n in (item if isinstance(item, list) else [item])], where)
    lm_head = config.get("lm_head") or False

    def grid_of(module: str) -> ModuleGrid | None:
        for pattern, grid in rules:
            if pattern.matches(module):
                return grid
        if _is_lm_head(module):
            return default if lm_head else None
        if only and not any(module == name or module.endswith("." + name) for name in only):
            return None
        return default

    return ParsedQuantization(format=FORMATS[layout], default=default.spec, grid_of=grid_of)


def _grid(fields: Mapping[str, Any], where: str) -> ModuleGrid:
    return make_grid(fields["bits"], fields["group_size"], fields["sym"], fields["desc_act"], where)


def _dynamic_rules(dynamic: Any, fields: Mapping[str, Any], where: str) -> list[tuple[Pattern, ModuleGrid | None]]:
    if not isinstance(dynamic, dict):
        raise UserError(f"{where}: dynamic {dynamic!r:.40}; must map regular expressions to overrides")
    timer = MatchTimer()
    rules: list[tuple[Pattern, ModuleGrid | None]] = []
    for key, override in dynamic.items():
        rule_where = f"{where}: dynamic {key!r:.60}"
        if key.startswith("-:"):
            rules.append((Pattern(key[2:], rule_where, timer), None))
            continue
        if not isinstance(override, dict):
            raise UserError(f"{rule_where}: {override!r:.40}; must be an object of overrides")
        check_keys(override, OVERRIDE_KEYS, {}, rule_where)
        changed = {name: override.get(name, value) for name, value in fields.items()}
        rules.append((Pattern(key.removeprefix("+:"), rule_where, timer), _grid(changed, rule_where)))
    return rules


def _format(name: str, zero_offset: int) -> Format:
    return Format(
        name=name,
        suffixes=SUFFIXES,
        group_index="g_idx",
        min_zero=zero_offset,
        scale_dtype=scale_dtype,
        refuses=refuses,
        tensor_shapes=tensor_shapes,
        pack=partial(pack, zero_offset=zero_offset),
        features=features,
        unpack=partial(unpack, zero_offset=zero_offset),
        config=partial(config, checkpoint_format=name),
        parse=parse,
        config_file="quantize_config.json",
    )


FORMATS = {name: _format(name, zero_offset) for name, zero_offset in (("gptq", 1), ("gptq_v2", 0))}
