"""Open a checkpoint, quantized or not, as a transformers model that runs.

A quantized checkpoint becomes the model of its config with every packed linear replaced by a `QuantizedLinear`. Tensors
go one by one from the shards to the device, so the peak is the quantized model and one layer.
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
from llmquant.memory import give_back
from llmquant.models.blocks import device_of, is_linear, linear_shape
from llmquant.models.skeleton import DTYPES, Skeleton, name_translator, read_config, stored_dtype
from llmquant.runtime.attention import use_attention
from llmquant.runtime.linear import PackedLinear, QuantizedLinear
from llmquant.runtime.save import let_save
from llmquant.runtime.settings import FILE, read_settings

LINEARS_BETWEEN_TRIMS = 8
"""What unpacking leaves behind goes back to the system this often; a trim takes about a millisecond."""


def load(
    path: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    backend: str = "auto",
    trust_remote_code: bool = False,
) -> Any:
    """A transformers causal language model from a local folder or hub id, in eval mode, ready to generate.

    device: auto, cpu, cuda[:n]. dtype: auto (the checkpoint's), float32, bfloat16, float16. backend: one of
    `kernels.dispatch.BACKENDS`, or auto. Raises UserError for whatever the user can mend.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"dtype '{dtype}': not one of auto, {', '.join(DTYPES)}; use dtype auto")
    reader = CheckpointReader(resolve_model(str(path), trust_remote_code))
    target = device_of(device)
    quantization = parsed_quantization(reader)
    config = read_config(reader.path, trust_remote_code)
    wanted = stored_dtype(config, reader) if dtype == "auto" else DTYPES[dtype]
    skeleton = Skeleton.open(reader, config, target, wanted, trust_remote_code)
    if quantization is not None:
        replace_linears(skeleton, quantization, backend)
    elif backend != "auto":
        raise UserError(f"backend '{backend}': {path} is not quantized, its linears are torch's; use --backend auto")
    fill(skeleton)
    model = skeleton.model
    if quantization is not None:
        pack_head(model)
        use_attention(model)
        let_save(model, reader.quantization_config or {})
        give_back()
    add_generation_config(model, reader.path)
    return model


def replace_linears(skeleton: Skeleton, quantization: ParsedQuantization, backend: str) -> None:
    """Put a QuantizedLinear where a packed linear is on disk; UserError where model and checkpoint disagree."""
    reader, model = skeleton.reader, skeleton.model
    stored = find_quantized_modules(reader, quantization)
    translate = name_translator(model)
    for index, (source, packed) in enumerate(stored.items()):
        if index % LINEARS_BETWEEN_TRIMS == 0:
            give_back()
        name, linear = linear_for(model, translate, reader, packed)
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


def linear_for(
    model: Any, translate: Callable[[str], str | None], reader: CheckpointReader, packed: QuantizedModule
) -> tuple[str, nn.Module]:
    """Name and module of the linear that a packed one belongs to; UserError where model and checkpoint disagree.

    translate: `name_translator(model)`.
    """
    name = (translate(f"{packed.name}.weight") or packed.name).removesuffix(".weight")
    try:
        linear = model.get_submodule(name)
    except AttributeError:
        linear = None
    if linear is None or not is_linear(linear):
        raise UserError(
            f"{reader.path}: packed linear '{packed.name}' is no linear of the model that config.json describes"
        )
    if linear_shape(linear) != (packed.out_features, packed.in_features):
        raise UserError(
            f"{reader.path}: '{packed.name}' is packed as {[packed.out_features, packed.in_features]}, config.json "
            f"makes it {list(linear_shape(linear))}; the checkpoint and its config do not belong together"
        )
    return name, linear


def fill(skeleton: Skeleton) -> None:
    """Read everything that is not a packed linear; tied parameters share one tensor."""
    model = skeleton.model
    read: dict[str, nn.Parameter] = {}
    for name, owner in list(model.named_modules()):
        if isinstance(owner, QuantizedLinear):
            continue
        for leaf in [leaf for leaf, parameter in owner._parameters.items() if parameter is not None]:
            full = f"{name}.{leaf}" if name else leaf
            source = skeleton.names.get(full)
            if source is None:
                why = skeleton.why_missing(full)
                raise UserError(f"{skeleton.reader.path}: no tensor holds parameter '{full}': {why}")
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
    """On a CPU that multiplies bfloat16, bring the head into the layout it is read in: in a small model it is half the
    bytes of a token. A head that is the embedding too is there twice from then on."""
    head = model.get_output_embeddings()
    fits = type(head) is nn.Linear and head.weight.device.type == "cpu" and head.weight.dtype == torch.bfloat16
    if fits and choose_dense_kernel() is not None:
        tied = head.weight is model.get_input_embeddings().weight
        model.set_output_embeddings(PackedLinear(head, tied=tied))


def add_generation_config(model: Any, path: Path) -> None:
    """Give the model the checkpoint's own generation settings, if it has some; UserError if they cannot be read."""
    if (path / FILE).is_file() and hasattr(model, "generation_config"):
        model.generation_config = read_settings(path / FILE)
