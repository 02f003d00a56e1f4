"""The formats by name, and which one a `quantization_config` is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmquant.errors import UserError
from llmquant.formats import awq, compressed_tensors, gptq
from llmquant.formats.format import Format, ParsedQuantization

FORMATS: dict[str, Format] = {
    **gptq.FORMATS,
    "awq": awq.FORMAT,
    "compressed-tensors": compressed_tensors.FORMAT,
}

# Configurations of before 2024 do not always name their method; these keys do.
_TELLING_KEYS = {
    "config_groups": "compressed-tensors",
    "zero_point": "awq",
    "w_bit": "awq",
    "desc_act": "gptq",
    "checkpoint_format": "gptq",
}


def parse_quantization_config(config: Mapping[str, Any]) -> ParsedQuantization:
    """What a `quantization_config` says; UserError if its method is unknown or its keys contradict each other."""
    if not isinstance(config, Mapping):
        raise UserError(f"quantization_config: {config!r:.40}; must be an object")
    method = config.get("quant_method", config.get("method"))
    if method is None:
        told = {name for key, name in _TELLING_KEYS.items() if key in config}
        if len(told) != 1:
            raise UserError(
                f"quantization_config: no quant_method, and its keys fit {' and '.join(sorted(told)) or 'no format'}; "
                "add quant_method (gptq, awq or compressed-tensors) to config.json"
            )
        (method,) = told
    # gptq_v2 is a checkpoint_format, not a method.
    if method not in ("gptq", "awq", "compressed-tensors"):
        raise UserError(
            f"quantization_config: quant_method {method!r:.40} cannot be read; supported: gptq, awq, compressed-tensors"
        )
    return FORMATS[method].parse(config)
