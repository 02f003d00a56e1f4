"""How a checkpoint's weights are stored, told from its tensors.

A `quantization_config` is what some tool wrote once: a merged model may have kept that of its QLoRA training, and an
FP8 checkpoint may have lost its own. So the tensors decide:

    plain     floating-point weights of 16 bits and more, whatever config.json says
    packed    codes in the layout of one of `FORMATS`, which `quantization_config` describes
    other     FP8, FP4, bitsandbytes, …: weights that nothing here decodes, refused by their name
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from llmquant.checkpoints.header import TensorInfo
from llmquant.errors import UserError

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
BYTE_SCALES = (torch.uint8, torch.float8_e8m0fnu)
INTEGERS = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64, torch.int64)
PACKED_SUFFIXES = ("qweight", "weight_packed")
"""The codes in the formats that are read here."""
CONFIG_KEYS = ("quantization_config", "compression_config")
"""Where config.json says how weights are stored; llm-compressor once used the second."""

SCALE_NAMES = ("scale_weight", "scaled_fp8", "qzeros", "g_idx")
"""Tensors of weights that are scaled or packed, wherever they lie; ComfyUI writes the first two."""
SCALE_NAMES_BESIDE = ("scale", "scales", "zeros", "zero_point")
"""The same, where they lie beside a `weight`."""

Tensors = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class OtherStorage:
    """Weights that nothing here decodes."""

    kind: str
    """What they are, in words."""
    tensor: str
    """The first tensor that shows it."""


def other_storage(tensors: Tensors) -> OtherStorage | None:
    """The storage of a checkpoint that is neither plain nor packed in one of our formats, or None."""
    for kind, shows in KINDS.items():
        for name, info in tensors.items():
            if shows(name, info, tensors):
                return OtherStorage(kind, name)
    return None


def packed_tensor(tensors: Tensors) -> str | None:
    """The first tensor that holds packed codes of one of our formats, or None."""
    return next((name for name in tensors if _suffix(name) in PACKED_SUFFIXES), None)


def refuse_other_storage(path: object, tensors: Tensors) -> None:
    """UserError if weights are stored in a way that nothing here decodes."""
    if (found := other_storage(tensors)) is not None:
        info = tensors[found.tensor]
        dtype = str(info.dtype).removeprefix("torch.")
        raise UserError(
            f"{path}: holds {found.kind} ('{found.tensor}', {dtype} {list(info.shape)}), which llmquant cannot decode; "
            "give the model's checkpoint in 16 bits"
        )


def without_storage_keys(config: Mapping[str, object]) -> dict[str, object]:
    """A config.json without what it says about the storage of weights, in the configs inside it too."""
    return {
        key: without_storage_keys(value) if isinstance(value, dict) and key.endswith("_config") else value
        for key, value in config.items()
        if key not in CONFIG_KEYS
    }


# --- what shows a storage --------------------------------------------------------------------------------------------


def _suffix(name: str) -> str:
    return name.rpartition(".")[2]


def _beside(name: str, suffix: str, tensors: Tensors) -> TensorInfo | None:
    """Another tensor of the same module."""
    module = name.rpartition(".")[0]
    return tensors.get(f"{module}.{suffix}" if module else suffix)


def _is_fp4(name: str, info: TensorInfo, tensors: Tensors) -> bool:
    """NVFP4: four-bit floats two to a byte, with a float8 scale per 16 of them and a float32 one for all."""
    if _suffix(name) not in ("weight", "weight_packed") or info.dtype != torch.uint8:
        return False
    scale = _beside(name, "weight_scale", tensors)
    return scale is not None and scale.dtype in FLOAT8


def _is_mxfp4(name: str, info: TensorInfo, tensors: Tensors) -> bool:
    """MXFP4: `_blocks` and `_scales` of gpt-oss, `weight_packed` and `weight_scale` of compressed-tensors."""
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
    """AQLM and VPTQ: indices into codebooks."""
    pairs = {"codes": "codebooks", "indices": "centroids"}
    suffix = _suffix(name)
    return suffix in pairs and info.dtype in INTEGERS and _beside(name, pairs[suffix], tensors) is not None


def _named(*suffixes: str) -> Callable[[str, TensorInfo, Tensors], bool]:
    """Whether a tensor is called so and holds integers."""
    return lambda name, info, tensors: _suffix(name) in suffixes and info.dtype in INTEGERS


def _is_integer_weight(name: str, info: TensorInfo, tensors: Tensors) -> bool:
    return _suffix(name) == "weight" and info.dtype in (*INTEGERS, torch.bool) and len(info.shape) > 1


def is_scale(name: str, tensors: Tensors) -> bool:
    """Whether a tensor that the model does not have is, by its name, a scale or packed block of one that it has."""
    suffix = _suffix(name)
    if suffix in SCALE_NAMES_BESIDE:
        return _beside(name, "weight", tensors) is not None
    return suffix in SCALE_NAMES or suffix.endswith(("_scales", "_blocks"))


def _is_left_scale(name: str, info: TensorInfo, tensors: Tensors) -> bool:
    """A scale beside a weight that is not packed: whether it was applied to the weight cannot be seen."""
    suffix = _suffix(name)
    known = ("weight_scale", "weight_scale_2", "weight_global_scale")
    return suffix.endswith("_scale_inv") or (suffix in known and _beside(name, "weight", tensors) is not None)


KINDS: dict[str, Callable[[str, TensorInfo, Tensors], bool]] = {
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
    "scales of quantized weights": _is_left_scale,
}
"""Storage -> whether a tensor shows it, the most particular first."""
