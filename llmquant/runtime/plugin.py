"""A quantized checkpoint through transformers' own `from_pretrained`: what device maps and adapters expect.

transformers chooses a quantizer by the `quant_method` of config.json. Those of our formats (gptq, awq,
compressed-tensors) are taken by quantizers that need other packages, and a name cannot be registered twice. So the
config that is handed to `from_pretrained` says `llmquant` instead, which is registered here, by transformers' own
registry; config.json on the disk stays what every engine reads:

    config = llmquant.transformers_config("out")
    model = AutoModelForCausalLM.from_pretrained("out", config=config, device_map="auto")

transformers then reads the packed tensors into modules that hold nothing else, where its device map says, and those
become `QuantizedLinear` at the end.
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
from llmquant.models.skeleton import check_size, loaded_dtypes, name_translator, read_config
from llmquant.runtime.linear import QuantizedLinear
from llmquant.runtime.load import linear_for
from llmquant.runtime.save import let_save

METHOD = "llmquant"
"""Our name in transformers' registry."""


def transformers_config(path: str | Path, *, backend: str = "auto", trust_remote_code: bool = False) -> Any:
    """The config with which transformers opens a quantized checkpoint (a folder or hub id, of any tool) through us.

    backend: one of `kernels.dispatch.BACKENDS`, or auto. UserError if it is not quantized, or cannot be read.
    """
    reader = CheckpointReader(resolve_model(str(path), trust_remote_code))
    if parsed_quantization(reader) is None:
        raise UserError(f"{reader.path}: not quantized; transformers opens it without a config of ours")
    register()
    config = read_config(reader.path, trust_remote_code)
    check_size(config, reader)
    config.quantization_config = {"quant_method": METHOD, "backend": backend}
    return config


def register() -> None:
    """Make `llmquant` known to transformers; again is harmless."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(LLMQuantConfig)
        register_quantizer(METHOD)(LLMQuantizer)


class LLMQuantConfig(QuantizationConfigMixin):
    """Says that we open the checkpoint; how it is packed stands in its own config.json."""

    def __init__(self, backend: str = "auto", quant_method: str = METHOD) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]
        self.backend = backend


class PackedLinear(nn.Module):
    """Where transformers puts the tensors of one linear, as they are stored."""

    def __init__(self, packed: QuantizedModule, reader: CheckpointReader, bias: Tensor | None) -> None:
        super().__init__()
        self.packed = packed
        for suffix, name in packed.tensors.items():
            info = reader.info(name)
            self.register_buffer(suffix, torch.empty(info.shape, dtype=info.dtype, device="meta"))
        # Some models initialize what they miss by their modules' weights, and leave alone what says that it is done.
        self.weight = torch.empty(packed.out_features, packed.in_features, device="meta")
        self.weight._is_hf_initialized = True  # type: ignore[attr-defined]
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def linear(self, dtype: torch.dtype, backend: str) -> QuantizedLinear:
        """The linear that runs, where the tensors lie; UserError if they are damaged, or were left on the disk."""
        tensors: dict[str, Tensor] = dict(self.named_buffers())
        (device,) = {tensor.device for tensor in tensors.values()}
        if device.type == "meta":
            raise UserError(
                f"{self.packed.name}: the device map leaves it on the disk, where no kernel runs; give it a device"
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
    """What transformers calls while it opens a checkpoint."""

    requires_calibration = True

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.dtypes: dict[str, torch.dtype] = {}
        """The dtype of every parameter, known once the model is built."""
        self.stored_config: dict[str, Any] = {}
        """The `quantization_config` of the checkpoint, known once it is opened."""

    def _process_model_before_weight_loading(
        self, model: Any, dtype: torch.dtype | None = None, checkpoint_files: Sequence[str] = (), **kwargs: Any
    ) -> Any:
        """Put a PackedLinear where a linear is packed on the disk."""
        reader = CheckpointReader(Path(checkpoint_files[0]).parent)
        parsed = parsed_quantization(reader)
        assert parsed is not None
        self.stored_config = reader.quantization_config or {}
        self.dtypes = loaded_dtypes(model, dtype or model.dtype)
        translate = name_translator(model)
        with torch.device("cpu"):  # transformers makes new tensors on meta here; those that are read are real
            modules = find_quantized_modules(reader, parsed)
        for packed in modules.values():
            name, linear = linear_for(model, translate, reader, packed)
            parent, _, leaf = name.rpartition(".")
            bias = linear._parameters["bias"]
            setattr(model.get_submodule(parent), leaf, PackedLinear(packed, reader, bias))
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Let every PackedLinear become the linear that runs, one after the other."""
        for name, packed in list(model.named_modules()):
            if isinstance(packed, PackedLinear):
                dtype = self.dtypes[f"{name}.weight"]
                linear = packed.linear(dtype, self.quantization_config.backend).eval()  # type: ignore[attr-defined]
                if hasattr(packed, "_hf_hook"):
                    hook = packed._hf_hook
                    remove_hook_from_module(packed)
                    add_hook_to_module(linear, hook)  # type: ignore[arg-type]
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, linear)
        let_save(model, self.stored_config)
        return model

    def is_serializable(self) -> bool:
        """Yes: the state dict of the model holds the tensors of the checkpoint."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients flow through to adapters; the codes stay."""
        return True
