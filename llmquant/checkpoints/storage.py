"""Detect from its tensors how a checkpoint stores its weights.

A `quantization_config` is not reliable: a merged model may still have the configuration of its QLoRA training,
and an FP8 checkpoint may have none. So the tensors decide:

    plain         floating-point weights of 16 bits and more, whatever config.json says
    packed        codes in the layout of one of `FORMATS`, which `quantization_config` describes
    unsupported   FP8, FP4, bitsandbytes, …: weights that llmquant cannot decode; a UserError names the kind
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from llmquant.checkpoints.header import TensorInfo
from llmquant.errors import UserError
from llmquant.humanize import dtype_name

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
BYTE_SCALES = (torch.uint8, torch.float8_e8m0fnu)
INTEGERS = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64, torch.int64)
PACKED_SUFFIXES = ("qweight", "weight_packed")
"""Suffixes of the packed codes in all of `FORMATS`."""
CONFIG_KEYS = ("quantization_config", "compression_config")
"""Keys of config.json that describe the storage of weights; older llm-compressor versions wrote the second."""

SCALE_NAMES = ("scale_weight", "scaled_fp8", "qzeros", "g_idx")
"""Suffixes that always belong to a scaled or packed weight; ComfyUI writes the first two."""
SCALE_NAMES_BESIDE_WEIGHT = ("scale", "scales", "zeros", "zero_point")
"""Suffixes that belong to a scaled or packed weight if the same module has a `weight`."""

Tensors = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class UnsupportedStorage:
    """A kind of stored weights that llmquant cannot decode."""

    kind: str
    """Name of the kind for messages, such as "FP8 weights"."""
    tensor: str
    """Name of the first tensor of this kind."""


def find_unsupported_storage(tensors: Tensors) -> UnsupportedStorage | None:
    """Return the storage of a checkpoint that is neither plain nor packed in one of `FORMATS`, or None."""
    for kind, is_kind in UNSUPPORTED.items():
        for name, info in tensors.items():
            if is_kind(name, info, tensors):
                return UnsupportedStorage(kind, name)
    return None


def packed_tensor(tensors: Tensors) -> str | None:
    """Return the first tensor that holds packed codes of one of `FORMATS`, or None."""
    return next((name for name in tensors if _suffix(name) in PACKED_SUFFIXES), None)


def refuse_unsupported_storage(path: object, tensors: Tensors) -> None:
    """Raise UserError if llmquant cannot decode the weights."""
    if (found := find_unsupported_storage(tensors)) is not None:
        info = tensors[found.tensor]
        dtype = dtype_name(info.dtype)
        raise UserError(
            f"{path}: holds {found.kind} ('{found.tensor}', {dtype} {list(info.shape)}), which llmquant cannot decode; "
            "give the model's checkpoint in 16 bits"
        )


def without_storage_keys(config: Mapping[str, object]) -> dict[str, object]:
    """Return a configuration without `CONFIG_KEYS`, which are removed from nested configurations too."""
    return {
        key: without_storage_keys(value) if isinstance(value, dict) and key.endswith("_config") else value
        for key, value in config.items()
        if key not in CONFIG_KEYS
    }


# --- tests for each kind --------------------------------------------------------------------------------------------


def _suffix(name: str) -> str:
    return name.rpartition(".")[2]


def _beside(name: str, suffix: str, tensors: Tensors) -> TensorInfo | None:
    """Return the tensor with this suffix in the module of `name`, or None."""
    module = name.rpartition(".")[0]
    return tensors.get(f"{module}.{suffix}" if module else suffix)


def _is_fp4(name: str, info: TensorInfo, tensors: Tensors) -> bool:
    """Whether a tensor holds NVFP4 codes: two 4-bit floats per byte, with a float8 scale per 16 codes."""
    if _suffix(name) not in ("weight", "weight_packed") or info.dtype != torch.uint8:
        return False
    scale = _beside(name, "weight_scale", tensors)
    return scale is not None and scale.dtype in FLOAT8


def _is_mxfp4(name: str, info: TensorInfo, tensors: Tensors) -> bool:
    """Whether a tensor holds MXFP4 codes or scales, as gpt-oss (`_blocks`, `_scales`) or compressed-tensors
    (`weight_packed`) stores them."""
    suffix = _suffix(name)
    if suffix.endswith(("_blocks", "_scales")) and info.dtype in BYTE_SCALES:
        return True
    return suffix == "weight_packed" and info.dtype == torch.uint8


def _is_bitsandbytes(name: str, info: TensorInfo, tensors: Tensors) -> bool:
    suffix = _suffix(name)
    return suffix in ("absmax", "quant_map", "SCB") or suffix.startswith("bitsandbytes__")


def _is_fp8(name: str, info: TensorInfo, tensors: Tensors) -> bool:
    suffix = _suffix(name)
    return info.dtype in FLOAT8 and len(info.shape) > 1 and "scale" not in suffix and suffix not in PACKED_SUFFIXES


def _is_mlx(name: str, info: TensorInfo, tensors: Tensors) -> bool:
    return _suffix(name) == "weight" and info.dtype == torch.uint32 and _beside(name, "scales", tensors) is not None


def _has_codebooks(name: str, info: TensorInfo, tensors: Tensors) -> bool:
    """Whether a tensor holds indices into codebooks, as AQLM and VPTQ store them."""
    pairs = {"codes": "codebooks", "indices": "centroids"}
    suffix = _suffix(name)
    return suffix in pairs and info.dtype in INTEGERS and _beside(name, pairs[suffix], tensors) is not None


def _named(*suffixes: str) -> Callable[[str, TensorInfo, Tensors], bool]:
    """Return a function that tests whether a tensor has one of these suffixes and holds integers."""
    return lambda name, info, tensors: _suffix(name) in suffixes and info.dtype in INTEGERS


def _is_integer_weight(name: str, info: TensorInfo, tensors: Tensors) -> bool:
    return _suffix(name) == "weight" and info.dtype in (*INTEGERS, torch.bool) and len(info.shape) > 1


def is_scale(name: str, tensors: Tensors) -> bool:
    """Whether a tensor that is not part of the model is, by its name, a scale or packed block of a weight."""
    suffix = _suffix(name)
    if suffix in SCALE_NAMES_BESIDE_WEIGHT:
        return _beside(name, "weight", tensors) is not None
    return suffix in SCALE_NAMES or suffix.endswith(("_scales", "_blocks"))


def _is_scale_of_plain_weight(name: str, info: TensorInfo, tensors: Tensors) -> bool:
    """Whether a tensor is the scale of an unpacked weight. The tensors do not show whether the scale was applied."""
    suffix = _suffix(name)
    known = ("weight_scale", "weight_scale_2", "weight_global_scale")
    return suffix.endswith("_scale_inv") or (suffix in known and _beside(name, "weight", tensors) is not None)


UNSUPPORTED: dict[str, Callable[[str, TensorInfo, Tensors], bool]] = {
    "NVFP4 weights": _is_fp4,
    "MXFP4 weights": _is_mxfp4,
    "bitsandbytes weights": _is_bitsandbytes,
    "FP8 weights": _is_fp8,
    "MLX weights": _is_mlx,
    "HQQ weights": _named("W_q"),
    "codebook weights (AQLM, VPTQ)": _has_codebooks,
    "EXL2 weights": _named("q_weight"),
    "EXL3 weights": _named("trellis"),
    "QuIP# weights": _named("Qidxs"),
    "torchao weights": lambda name, info, tensors: _suffix(name).endswith("weight_qdata"),
    "quanto weights": lambda name, info, tensors: name.endswith(("weight._data", "weight._scale")),
    "integer weights": _is_integer_weight,
    "scales of quantized weights": _is_scale_of_plain_weight,
}
"""Kind of stored weights -> function that tests whether a tensor is of this kind. The most specific come first."""
