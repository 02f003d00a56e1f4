"""All formats by name, and the parser of a `quantization_config` of any format."""

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

_METHOD_OF_KEY = {
    "config_groups": "compressed-tensors",
    "zero_point": "awq",
    "w_bit": "awq",
    "desc_act": "gptq",
    "checkpoint_format": "gptq",
}
"""Keys that identify the method of a configuration without quant_method, as some tools wrote before 2024."""


def parse_quantization_config(config: Mapping[str, Any]) -> ParsedQuantization:
    """Parse a `quantization_config`. Raises UserError if its method is unknown or its keys contradict each other."""
    if not isinstance(config, Mapping):
        raise UserError(f"quantization_config: {config!r:.40}; must be an object")
    method = config.get("quant_method", config.get("method"))
    if method is None:
        candidates = {name for key, name in _METHOD_OF_KEY.items() if key in config}
        if len(candidates) != 1:
            raise UserError(
                "quantization_config: no quant_method, and its keys fit "
                f"{' and '.join(sorted(candidates)) or 'no format'}; "
                "add quant_method (gptq, awq or compressed-tensors) to config.json"
            )
        (method,) = candidates
    # gptq_v2 is a checkpoint_format, not a method.
    if method not in ("gptq", "awq", "compressed-tensors"):
        raise UserError(
            f"quantization_config: quant_method {method!r:.40} cannot be read; supported: gptq, awq, compressed-tensors"
        )
    return FORMATS[method].parse(config)
