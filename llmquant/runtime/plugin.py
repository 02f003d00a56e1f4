"""Load a quantized checkpoint through transformers' own `from_pretrained`, as device maps and adapters require.

transformers chooses a quantizer by the `quant_method` in config.json. The methods of our formats (gptq, awq,
compressed-tensors) belong to quantizers that need other packages, and transformers registers each name only once.
Therefore the config that is passed to `from_pretrained` names the method `llmquant`, which this module registers.
config.json on disk does not change, so every engine can still read it:

    config = llmquant.transformers_config("out")
    model = AutoModelForCausalLM.from_pretrained("out", config=config, device_map="auto")

transformers then loads the packed tensors into placeholder modules, on the devices of its device map, and each
placeholder is replaced by a `QuantizedLinear` at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmquant.checkpoints.quantized import QuantizedModule, find_quantized_modules, parsed_quantization
from llmquant.checkpoints.reader import CheckpointReader
from llmquant.errors import UserError
from llmquant.hub import resolve_model
from llmquant.models.skeleton import check_num_blocks, loaded_dtypes, name_translator, read_config
from llmquant.runtime.linear import QuantizedLinear
from llmquant.runtime.load import find_linear
from llmquant.runtime.save import enable_saving
from llmquant.runtime.shared_launch import share_launches

METHOD = "llmquant"
"""The name of our quantizer in transformers' registry."""


def transformers_config(path: str | Path, *, backend: str = "auto", trust_remote_code: bool = False) -> Any:
    """Return the config with which transformers loads a quantized checkpoint through llmquant.

    path: folder or hub id of a checkpoint, written by any tool. backend: a key of `kernels.dispatch.BACKENDS`, or auto.
    Raises UserError if the checkpoint is not quantized or cannot be read.
    """
    reader = CheckpointReader(resolve_model(str(path), trust_remote_code))
    if parsed_quantization(reader) is None:
        raise UserError(f"{reader.path}: not quantized, so transformers needs no config of llmquant; omit it")
    register_method()
    config = read_config(reader.path, trust_remote_code)
    check_num_blocks(config, reader)
    config.quantization_config = {"quant_method": METHOD, "backend": backend}
    return config


def register_method() -> None:
    """Register the quantization method `llmquant` with transformers. Repeated calls are harmless."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(LLMQuantConfig)
        register_quantizer(METHOD)(LLMQuantizer)


class LLMQuantConfig(QuantizationConfigMixin):
    """Selects `LLMQuantizer`. The format of the weights is described in the checkpoint's own config.json."""

    def __init__(self, backend: str = "auto", quant_method: str = METHOD) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]
        self.backend = backend


class PackedLinearPlaceholder(nn.Module):
    """Holds the stored tensors of one linear while transformers loads a checkpoint."""

    def __init__(self, packed: QuantizedModule, reader: CheckpointReader, bias: Tensor | None) -> None:
        super().__init__()
        self.packed = packed
        for suffix, name in packed.tensors.items():
            info = reader.info(name)
            self.register_buffer(suffix, torch.empty(info.shape, dtype=info.dtype, device="meta"))
        # Some models initialize the weight of every module that does not carry this mark.
        self.weight = torch.empty(packed.out_features, packed.in_features, device="meta")
        self.weight._is_hf_initialized = True  # type: ignore[attr-defined]
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def to_quantized_linear(self, dtype: torch.dtype, backend: str) -> QuantizedLinear:
        """Build the linear on the device of the tensors. Raises UserError if they are damaged or were not loaded."""
        tensors: dict[str, Tensor] = dict(self.named_buffers())
        (device,) = {tensor.device for tensor in tensors.values()}
        if device.type == "meta":
            raise UserError(
                f"{self.packed.name}: the device map leaves it on disk, but a quantized linear cannot run from there; "
                "map it to a device"
            )
        try:
            weight = self.packed.format.unpack(
                {suffix: tensor.cpu() for suffix, tensor in tensors.items()},
                self.packed.spec,
                self.packed.out_features,
                self.packed.in_features,
            )
        except UserError as error:
            raise UserError(f"{self.packed.name}.{error}") from None
        return QuantizedLinear(
            weight, self.bias, dtype=dtype, device=device, backend=backend, format=self.packed.format.name
        )


class LLMQuantizer(HfQuantizer):
    """The quantizer that `from_pretrained` calls before and after it loads the tensors of a checkpoint."""

    requires_calibration = True

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.dtypes: dict[str, torch.dtype] = {}
        """Dtype of each parameter, by its name; set when the model has been built."""
        self.stored_config: dict[str, Any] = {}
        """The `quantization_config` of the checkpoint; set when the model has been built."""

    def _process_model_before_weight_loading(
        self, model: Any, dtype: torch.dtype | None = None, checkpoint_files: Sequence[str] = (), **kwargs: Any
    ) -> Any:
        """Replace every linear that is packed in the checkpoint by a placeholder."""
        reader = CheckpointReader(Path(checkpoint_files[0]).parent)
        parsed = parsed_quantization(reader)
        assert parsed is not None
        self.stored_config = reader.quantization_config or {}
        self.dtypes = loaded_dtypes(model, dtype or model.dtype)
        translate = name_translator(model)
        with torch.device("cpu"):  # not on meta, transformers' default device here: the values are needed
            modules = find_quantized_modules(reader, parsed)
        for packed in modules.values():
            name, linear = find_linear(model, translate, reader, packed)
            parent, _, leaf = name.rpartition(".")
            bias = linear._parameters["bias"]
            setattr(model.get_submodule(parent), leaf, PackedLinearPlaceholder(packed, reader, bias))
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Replace every placeholder by the `QuantizedLinear` that it describes, one after the other."""
        backend = self.quantization_config.backend  # type: ignore[attr-defined]
        for name, placeholder in list(model.named_modules()):
            if isinstance(placeholder, PackedLinearPlaceholder):
                linear = placeholder.to_quantized_linear(self.dtypes[f"{name}.weight"], backend).eval()
                if hasattr(placeholder, "_hf_hook"):
                    hook = placeholder._hf_hook
                    remove_hook_from_module(placeholder)
                    add_hook_to_module(linear, hook)  # type: ignore[arg-type]
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, linear)
        # The hooks of a device map may move weights, so linears with hooks keep weights of their own.
        if not any(hasattr(module, "_hf_hook") for module in model.modules()):
            share_launches(model)
        enable_saving(model, self.stored_config)
        return model

    def is_serializable(self) -> bool:
        """Return True, because the model's state dict holds the tensors of the checkpoint and can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True, because gradients flow through the frozen quantized linears to adapters."""
        return True
