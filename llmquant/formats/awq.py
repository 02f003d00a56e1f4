"""The GEMM layout of AWQ, which AutoAWQ and AutoRound write.

| tensor | dtype | shape | content |
|---|---|---|---|
| qweight | int32 | [K, N/8] | 4-bit codes, packed along N in the order below |
| qzeros | int32 | [G, N/8] | zero-points z (not z - 1), packed in the same order |
| scales | float16 | [G, N] | |

Nibble i (bits 4i … 4i+3) of word c holds column 8c + ORDER[i].

Letters: N out_features, K in_features, G groups of group_size columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmquant.errors import UserError
from llmquant.formats.bitpack import pack_bits, unpack_bits
from llmquant.formats.format import (
    Format,
    ModuleGrid,
    ParsedQuantization,
    TensorShapes,
    cast_scales,
    check_features,
    check_keys,
    check_matrix,
    check_scales,
    check_tensors,
    check_zeros,
    key_set,
    make_grid,
    refuse_partial_group,
    string_list,
)
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
INVERSE_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)

KNOWN_KEYS = key_set(
    "quant_method method bits w_bit group_size q_group_size zero_point version modules_to_not_convert sym lm_head meta "
    "checkpoint_format format pack_dtype desc_act "
    # The keys below describe how the weights were computed, or which kernel to run. They do not affect the tensors.
    "do_fuse fuse_max_seq_len modules_to_fuse exllama_config backend quantizer provider autoround_version iters lr "
    "minmax_lr enable_minmax_tuning enable_quanted_input enable_norm_bias_tuning low_gpu_mem_usage low_cpu_mem_usage "
    "nsamples seqlen scale_dtype data_type gradient_accumulate_steps amp batch_size dataset block_name_to_quantize "
    "quant_block_list to_quant_block_names super_bits super_group_size damp_percent true_sequential static_groups"
)
FOREIGN_KEYS = {"config_groups": "compressed-tensors", "quantization_status": "compressed-tensors", "dynamic": "gptq"}


def _pack_columns(codes: Tensor) -> Tensor:
    """Pack uint8 [R, N] into int32 [R, N/8], with R rows."""
    in_order = codes.unflatten(1, (-1, 8))[:, :, ORDER].flatten(1)
    return pack_bits(in_order, 4, dim=1)


def _unpack_columns(words: Tensor) -> Tensor:
    """Unpack int32 [R, N/8] into uint8 [R, N], with R rows."""
    in_order = unpack_bits(words, 4, 1, words.shape[1] * 8)
    return in_order.unflatten(1, (-1, 8))[:, :, INVERSE_ORDER].flatten(1)


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float16, the only scale dtype that loaders of this format support."""
    return torch.float16


def refuses(spec: QuantSpec, out_features: int, in_features: int, dtype: torch.dtype) -> str | None:
    """Return why a linear cannot be stored, or None. It needs 4 bits, whole words along N, whole groups along K."""
    if spec.bits != 4:
        return f"bits {spec.bits}: the AWQ format holds 4 bits only; use --format compressed-tensors, or --bits 4"
    if out_features % 8:
        return (
            f"out_features {out_features} is not a multiple of 8, which AWQ packing needs; "
            "use --format compressed-tensors"
        )
    return refuse_partial_group(spec, in_features, "the AWQ format")


def tensor_shapes(spec: QuantSpec, out_features: int, in_features: int, dtype: torch.dtype) -> TensorShapes:
    num_groups = spec.num_groups(in_features)
    return {
        "qweight": (torch.int32, (in_features, out_features // 8)),
        "qzeros": (torch.int32, (num_groups, out_features // 8)),
        "scales": (torch.float16, (num_groups, out_features)),
    }


def pack(weight: QuantizedWeight) -> dict[str, Tensor]:
    if reason := refuses(weight.spec, weight.out_features, weight.in_features, weight.scale_NG.dtype):
        raise UserError(reason)
    if weight.group_index_K is not None:
        raise UserError("g_idx: the AWQ format cannot store act-order groups; use --format gptq")
    return {
        "qweight": _pack_columns(weight.codes_NK.T),
        "qzeros": _pack_columns(weight.zero_NG.T),
        "scales": cast_scales(weight.scale_NG, torch.float16).T.contiguous(),
    }


def features(tensors: Mapping[str, Tensor], spec: QuantSpec) -> tuple[int, int]:
    in_features, columns = check_matrix(tensors, "qweight")
    out_features = columns * 8
    if reason := refuses(spec, out_features, in_features, torch.float16):
        raise UserError(f"qweight: {reason}")
    check_tensors(tensors, tensor_shapes(spec, out_features, in_features, torch.float16), "scales", spec)
    return out_features, in_features


def unpack(tensors: Mapping[str, Tensor], spec: QuantSpec, out_features: int, in_features: int) -> QuantizedWeight:
    check_features(features(tensors, spec), out_features, in_features, "qweight")
    zero_NG = _unpack_columns(tensors["qzeros"]).T.contiguous()
    check_zeros(zero_NG, spec, "qzeros")
    check_scales(tensors["scales"].T, zero_NG, spec, "scales")
    return QuantizedWeight(
        codes_NK=_unpack_columns(tensors["qweight"]).T.contiguous(),
        scale_NG=tensors["scales"].T.contiguous(),
        zero_NG=zero_NG,
        spec=spec,
    )


# --- configuration ---------------------------------------------------------------------------------------------------


def config(
    default: QuantSpec,
    specs: Mapping[str, QuantSpec | None],
    *,
    act_order_groups: bool = False,
    meta: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the `quantization_config`. All quantized linears have one grid; the others stay in 16 bit.

    `zero_point` is true for symmetric grids as well (their zero-points are 8), because the fast kernels require it.
    Raises UserError if the linears have several grids, or if loaders could not distinguish their names.
    """
    assert not act_order_groups
    for name, spec in specs.items():
        if spec is not None and spec != default:
            raise UserError(
                f"{name}: {spec.describe()} beside {default.describe()}: the AWQ format has one grid for all linears; "
                "use --format compressed-tensors"
            )
    return {
        "quant_method": "awq",
        "bits": default.bits,
        "group_size": default.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": _skip_names(specs),
    }


def _skip_names(specs: Mapping[str, QuantSpec | None]) -> list[str]:
    """Return names for the linears that stay in 16 bit. Loaders match substrings, so none of these names may be part of
    the name of a quantized linear."""
    quantized = [name for name, spec in specs.items() if spec is not None]
    names: dict[str, None] = {}
    for name in (name for name, spec in specs.items() if spec is None):
        short = name.rpartition(".")[2]
        usable = [candidate for candidate in (short, name) if not any(candidate in other for other in quantized)]
        if not usable:
            other = next(other for other in quantized if name in other)
            raise UserError(
                f"{name}: stays in 16 bit, but AWQ loaders match names by substring and would skip {other} too; "
                "use --format compressed-tensors"
            )
        names[usable[0]] = None
    return list(names)


def parse(config: Mapping[str, Any]) -> ParsedQuantization:
    """Parse a configuration of AutoAWQ (with its own key names too), AutoRound, GPTQModel or llmquant."""
    where = "quantization_config (awq)"
    check_keys(config, KNOWN_KEYS, FOREIGN_KEYS, where)
    for key in ("version", "checkpoint_format", "format"):
        if str(config.get(key) or "gemm").lower() != "gemm":
            raise UserError(f"{where}: {key} {config[key]!r:.40}; only the gemm layout can be read")
    if config.get("desc_act"):
        raise UserError(f"{where}: desc_act is a key of gptq and contradicts awq; keep the keys of one format")
    bits, group_size = _either(config, "bits", "w_bit", where), _either(config, "group_size", "q_group_size", where)
    if bits != 4:
        raise UserError(f"{where}: bits {bits!r:.40}; the AWQ format holds 4 bits only")
    zero_point = config.get("zero_point", True)
    symmetric = not zero_point if type(zero_point) is bool else zero_point
    if config.get("sym", symmetric) != symmetric:
        raise UserError(
            f"{where}: zero_point {zero_point!r:.20} contradicts sym {config['sym']!r:.20}; correct one of them"
        )
    grid = make_grid(bits, group_size, symmetric, False, where)
    skipped = string_list(config.get("modules_to_not_convert"), f"{where}: modules_to_not_convert")

    def grid_of(module: str) -> ModuleGrid | None:
        return None if any(name in module for name in skipped) else grid

    return ParsedQuantization(format=FORMAT, default=grid.spec, grid_of=grid_of)


def _either(config: Mapping[str, Any], key: str, old_key: str, where: str) -> Any:
    values = [config[name] for name in (key, old_key) if name in config]
    if not values:
        raise UserError(f"{where}: {key} is missing; config.json must say how the weights are packed")
    if values[0] != values[-1]:
        raise UserError(
            f"{where}: {key} {values[0]!r:.20} contradicts {old_key} {values[-1]!r:.20}; correct one of them"
        )
    return values[0]


FORMAT = Format(
    name="awq",
    suffixes=("qweight", "qzeros", "scales"),
    group_index=None,
    min_zero=0,
    scale_dtype=scale_dtype,
    refuses=refuses,
    tensor_shapes=tensor_shapes,
    pack=pack,
    features=features,
    unpack=unpack,
    config=config,
    parse=parse,
)
