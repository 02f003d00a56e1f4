"""Load a checkpoint, quantized or not, as a transformers model.

The model is built from config.json, and a `QuantizedLinear` replaces every linear that is packed in the checkpoint.
Tensors go one by one from the shards to the device, so peak memory is the quantized model and one linear.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmquant.checkpoints.quantized import (
    QuantizedModule,
    find_quantized_modules,
    parsed_quantization,
    read_quantized,
)
from llmquant.checkpoints.reader import CheckpointReader
from llmquant.errors import UserError
from llmquant.formats.format import ParsedQuantization
from llmquant.hub import resolve_model
from llmquant.kernels.dispatch import choose_dense_kernel
from llmquant.memory import trim_heap
from llmquant.models.blocks import is_linear, linear_shape, parse_device
from llmquant.models.skeleton import MODEL_DTYPES, Skeleton, name_translator, read_config, stored_dtype
from llmquant.runtime.attention import use_attention
from llmquant.runtime.generation_settings import GENERATION_CONFIG_FILE, read_generation_config
from llmquant.runtime.linear import PackedDenseLinear, QuantizedLinear
from llmquant.runtime.save import enable_saving
from llmquant.runtime.shared_launch import share_launches

LINEARS_BETWEEN_TRIMS = 8
"""Number of linears after which memory freed by unpacking is returned to the system, which takes about 1 ms."""


def load(
    path: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    backend: str = "auto",
    trust_remote_code: bool = False,
) -> Any:
    """Load a local folder or hub id as a transformers causal language model in eval mode, ready to generate.

    device: auto, cpu, cuda[:n]. dtype: auto (the checkpoint's), float32, bfloat16, float16. backend: the kernel of
    quantized linears, a key of `kernels.dispatch.BACKENDS` or auto. trust_remote_code: run Python code that comes with
    the checkpoint. Raises UserError if an option is invalid or the checkpoint cannot be loaded.
    """
    if dtype != "auto" and dtype not in MODEL_DTYPES:
        raise UserError(f"dtype '{dtype}': not one of auto, {', '.join(MODEL_DTYPES)}; use dtype auto")
    reader = CheckpointReader(resolve_model(str(path), trust_remote_code))
    torch_device = parse_device(device)
    quantization = parsed_quantization(reader)
    config = read_config(reader.path, trust_remote_code)
    model_dtype = stored_dtype(config, reader) if dtype == "auto" else MODEL_DTYPES[dtype]
    skeleton = Skeleton.open(reader, config, torch_device, model_dtype, trust_remote_code)
    if quantization is not None:
        replace_linears(skeleton, quantization, backend)
    elif backend != "auto":
        raise UserError(
            f"backend '{backend}': {path} is not quantized, and backends run quantized linears only; use --backend auto"
        )
    load_other_tensors(skeleton)
    model = skeleton.model
    if quantization is not None:
        pack_head(model)
        use_attention(model)
        share_launches(model)
        enable_saving(model, reader.quantization_config or {})
        trim_heap()
    add_generation_config(model, reader.path)
    return model


def replace_linears(skeleton: Skeleton, quantization: ParsedQuantization, backend: str) -> None:
    """Replace every linear that is packed in the checkpoint by a `QuantizedLinear` with its weight.

    Raises UserError if a packed linear does not fit the model.
    """
    reader, model = skeleton.reader, skeleton.model
    stored = find_quantized_modules(reader, quantization)
    translate = name_translator(model)
    for index, (source, packed) in enumerate(stored.items()):
        if index % LINEARS_BETWEEN_TRIMS == 0:
            trim_heap()
        name, linear = find_linear(model, translate, reader, packed)
        bias = None
        if linear.bias is not None:
            bias = reader.read(f"{source}.bias")
        dtype = skeleton.dtypes[f"{name}.weight"]
        replacement = QuantizedLinear(
            read_quantized(reader, packed),
            bias,
            dtype=dtype,
            device=skeleton.device,
            backend=backend,
            format=packed.format.name,
        )
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, replacement.eval())


def find_linear(
    model: Any, translate: Callable[[str], str | None], reader: CheckpointReader, packed: QuantizedModule
) -> tuple[str, nn.Module]:
    """Return the name and module of the linear in the model whose weight is `packed` in the checkpoint.

    translate: `name_translator(model)`. Raises UserError if the model has no such linear or it has another shape.
    """
    name = (translate(f"{packed.name}.weight") or packed.name).removesuffix(".weight")
    try:
        linear = model.get_submodule(name)
    except AttributeError:
        linear = None
    if linear is None or not is_linear(linear):
        raise UserError(
            f"{reader.path}: packed linear '{packed.name}' is no linear of the model that config.json describes; copy "
            "config.json from where the checkpoint was made"
        )
    if linear_shape(linear) != (packed.out_features, packed.in_features):
        raise UserError(
            f"{reader.path}: '{packed.name}' is packed as {[packed.out_features, packed.in_features]}, but config.json "
            f"gives the shape {list(linear_shape(linear))}; copy config.json from where the checkpoint was made"
        )
    return name, linear


def load_other_tensors(skeleton: Skeleton) -> None:
    """Load all parameters and buffers outside the quantized linears. Tied parameters share one tensor.

    Raises UserError if the checkpoint has no tensor for a parameter.
    """
    model = skeleton.model
    read: dict[str, nn.Parameter] = {}
    for name, owner in list(model.named_modules()):
        if isinstance(owner, QuantizedLinear):
            continue
        for leaf in [leaf for leaf, parameter in owner._parameters.items() if parameter is not None]:
            full = f"{name}.{leaf}" if name else leaf
            source = skeleton.names.get(full)
            if source is None:
                reason = skeleton.why_missing(full)
                raise UserError(f"{skeleton.reader.path}: no tensor holds parameter '{full}': {reason}")
            if source not in read:
                skeleton.load(name, recurse=False)
                read |= {
                    skeleton.names[other]: parameter
                    for key, parameter in owner._parameters.items()
                    if parameter is not None and (other := f"{name}.{key}" if name else key) in skeleton.names
                }
            owner._parameters[leaf] = read[source]
        for leaf, buffer in owner._buffers.items():
            full = f"{name}.{leaf}" if name else leaf
            if buffer is not None and full in skeleton.names and leaf not in owner._non_persistent_buffers_set:
                skeleton.put(full, owner, leaf, skeleton.reader.read(skeleton.names[full]))


def pack_head(model: Any) -> None:
    """Replace the head by a `PackedDenseLinear` if it is a bfloat16 linear on a CPU for which there is a kernel.

    In a small model, half of the bytes that are read per token belong to the head. If the head is tied to the
    embedding, the replacement holds a second copy of the weight.
    """
    head = model.get_output_embeddings()
    fits = type(head) is nn.Linear and head.weight.device.type == "cpu" and head.weight.dtype == torch.bfloat16
    if fits and choose_dense_kernel() is not None:
        tied = head.weight is model.get_input_embeddings().weight
        model.set_output_embeddings(PackedDenseLinear(head, tied=tied))


def add_generation_config(model: Any, path: Path) -> None:
    """Set the model's generation settings from the checkpoint, if it has some. Raises UserError if they are invalid."""
    file = path / GENERATION_CONFIG_FILE
    if file.is_file() and hasattr(model, "generation_config"):
        model.generation_config = read_generation_config(file)
