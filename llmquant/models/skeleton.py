"""The model without its weights: transformers' own module tree on the meta device, and the names that fill it.

Parameters are on meta (no memory); buffers that the code computes (rotary frequencies, embedding scales) are real.
Weights come and go module by module: `Skeleton.load` reads just what a module needs from the checkpoint's shards, and
`Skeleton.drop` gives it back. So nothing here ever holds the whole model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming, rename_source_key
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llmquant.checkpoints.storage import packed_tensor
from llmquant.checkpoints.wrappers import adapter_tensor
from llmquant.errors import UserError, first_words
from llmquant.remote_code import failure_of_remote_code, named_code, read_object, untrusted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmquant.checkpoints.reader import CheckpointReader

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SLOW_BFLOAT16 = ("DEFAULT", "NO AVX", "AVX2")
"""Names that torch has for processors without vector instructions for bfloat16."""


def read_config(path: Path, trust_remote_code: bool = False) -> Any:
    """The transformers config of a local checkpoint, refused when it is not a causal language model."""
    try:
        # Trusted code may lie in another repository of the hub; everything else is in the folder.
        config = AutoConfig.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=not trust_remote_code
        )
    except Exception as error:  # whatever transformers stumbles over in a file that anybody may have written
        is_known = str(read_object(path / "config.json").get("model_type")) in CONFIG_MAPPING
        if not (trust_remote_code or is_known) and (files := named_code(path / "config.json", "AutoConfig")):
            raise untrusted(path, "configuration", files) from error
        if (line := failure_of_remote_code(error)) is not None:
            raise UserError(line) from error
        raise UserError(
            f"{path}/config.json: transformers cannot read it ({first_words(error)}); is it a supported model?"
        ) from error
    remote = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not remote and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        if not trust_remote_code and (files := named_code(path / "config.json", "AutoModelForCausalLM")):
            raise untrusted(path, "model", files)
        raise UserError(
            f"{path}: model_type '{config.model_type}' is not a causal language model; "
            "give a checkpoint that AutoModelForCausalLM loads"
        )
    architectures = config.architectures or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise UserError(
            f"{path}/config.json: architectures {architectures!r:.60}: must be a list of class names; correct it"
        )
    if not isinstance(config.dtype, torch.dtype | None):
        raise UserError(
            f'{path}/config.json: dtype {config.dtype!r:.60}: must be one name; write "bfloat16" or leave it out'
        )
    own_class = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    is_known = remote or any(name == own_class or _generates_text(name) for name in architectures)
    if architectures and not is_known:
        raise UserError(
            f"{path}: architecture {architectures[0]} is not a causal language model; "
            "give the checkpoint of its …ForCausalLM form"
        )
    # transformers must not look for a quantizer of its own: packed linears are replaced by ours.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


CONTEXT_KEYS = ("max_position_embeddings", "max_seq_len", "max_target_positions")
"""Where a configuration sets the bound on positions; the second is MPT's, the third Whisper's."""


def context_length(config: Any) -> float:
    """Most tokens that the model's positions allow, an integer; infinite if its configuration sets no bound.

    No bound is None for some models, 0 or -1 (XLNet) for others.
    """
    text_config = config.get_text_config(decoder=True)
    bounds = (getattr(text_config, name, None) for name in CONTEXT_KEYS)
    return next((bound for bound in bounds if isinstance(bound, int) and bound > 0), math.inf)


def _generates_text(architecture: str) -> bool:
    return architecture.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))


def check_size(config: Any, reader: CheckpointReader) -> None:
    """UserError when a config asks for more decoder blocks than the checkpoint has tensors, before they are built."""
    num_blocks = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if isinstance(num_blocks, int) and num_blocks > len(reader.tensors):
        raise UserError(
            f"{reader.path / 'config.json'}: num_hidden_layers {num_blocks}, but the checkpoint has "
            f"{len(reader.tensors)} tensors; the checkpoint and its config do not belong together"
        )


def stored_dtype(config: Any, reader: CheckpointReader) -> torch.dtype:
    """The dtype most bytes of the checkpoint are stored in: the one to keep. The config's where it has none.

    In a packed checkpoint, most of the bytes that counted for the original are gone. There it is the config's, if
    tensors are stored in it.
    """
    bytes_of: dict[torch.dtype, int] = {}
    for info in reader.tensors.values():
        if info.dtype in DTYPES.values():
            bytes_of[info.dtype] = bytes_of.get(info.dtype, 0) + info.nbytes
    if config.dtype in bytes_of and packed_tensor(reader.tensors) is not None:
        return config.dtype
    if bytes_of:
        return max(bytes_of, key=lambda dtype: bytes_of[dtype])
    return config.dtype or torch.float32


def compute_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to compute in: float16 products are emulated on processors; float32 gives the same numbers, faster."""
    return torch.float32 if device.type == "cpu" and stored == torch.float16 else stored


def measuring_dtype(computed: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to compare two models in: that of the computation, or float32 where the processor has no AVX-512, and
    torch multiplies bfloat16 eight times as slowly."""
    slow = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in SLOW_BFLOAT16
    return torch.float32 if slow and computed == torch.bfloat16 else computed


def build_empty(config: Any, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal language model of a config: parameters on meta in dtype, computed buffers real, in eval mode."""
    is_registered = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        model.tie_weights()
    except Exception as error:  # sizes that contradict each other fail in as many ways as there are models
        if (line := failure_of_remote_code(error)) is not None:
            raise UserError(line) from error
        raise UserError(
            f"config.json: transformers cannot build the model it describes ({type(error).__name__}: "
            f"{first_words(error)}); restore or download it again"
        ) from error
    finally:
        # transformers registers a class of trusted code as it is, and would take it from there the next time: without
        # the methods for generation that it adds to classes that lack them.
        if not is_registered:
            MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.pop(type(config), None)
    return model.eval().requires_grad_(False)


def name_translator(model: PreTrainedModel) -> Callable[[str], str | None]:
    """A function from the name of a checkpoint's tensor to the name of the model's parameter or buffer, or None.

    The names agree; or transformers renames them at load (GPT-NeoX's `embed_out` is the model's `lm_head`); or they
    differ by the base model's prefix (checkpoints saved from the bare model lack it).
    """
    known = set(model.state_dict())
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]

    def translate(stored: str) -> str | None:
        renamed = rename_source_key(stored, renamings, [])[0]
        candidates = (stored, renamed, prefix + renamed, renamed.removeprefix(prefix))
        return next((candidate for candidate in candidates if candidate in known), None)

    return translate


def saved_names(model: PreTrainedModel) -> Callable[[str], str]:
    """A function from the name of a model's tensor to its name in what `save_pretrained` writes, the way back from
    `name_translator`: transformers undoes its renamings, and writes the base model's prefix always."""
    transforms = getattr(model, "_weight_conversions", None)
    if transforms is None:
        known = get_model_conversion_mapping(model, add_legacy=False)
        transforms = [transform for transform in known if not isinstance(transform, PrefixChange)]
    renamings = [each.reverse_transform() for each in reversed(transforms) if isinstance(each, WeightRenaming)]
    return lambda name: rename_source_key(name, renamings, [])[0]  # type: ignore[arg-type]


def checkpoint_names(model: PreTrainedModel, available: Iterable[str]) -> dict[str, str]:
    """Map every parameter and persistent buffer of the model to the tensor of the checkpoint that holds it.

    Tied parameters map to the tensor of the one that is stored. What has no tensor is left out.
    """
    translate = name_translator(model)
    names = {name: stored for stored in available if (name := translate(stored)) is not None}
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    for name, other in [*tied.items(), *((other, name) for name, other in tied.items())]:
        if name not in names and other in names:
            names[name] = names[other]
    return names


def converted_names(model: PreTrainedModel, available: Iterable[str]) -> dict[str, list[str]]:
    """Parameters that transformers computes from one or more tensors when it loads a checkpoint, with those tensors."""
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    known = model.state_dict()
    prefix = getattr(model, "base_model_prefix", "")
    found: dict[str, list[str]] = {}
    for stored in available:
        name, pattern = rename_source_key(stored, renamings, converters, prefix, known)
        if pattern is not None:
            found.setdefault(name, []).append(stored)
    return found


def loaded_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype of every parameter and persistent buffer as transformers' `from_pretrained(dtype=dtype)` loads it.

    model: built in that dtype, which most of its tensors have. Some classes make single tensors in another one, or list
    tensors to be kept in float32 beside 16-bit ones (routing biases of mixture-of-experts models).
    """
    kept = model._get_dtype_plan(dtype)
    patterns = {re.compile(pattern.replace("*", ".*")): dtype for pattern, dtype in kept.items()}

    def dtype_of(name: str, tensor: Tensor) -> torch.dtype:
        listed = (dtype for pattern, dtype in patterns.items() if pattern.search(name))
        return next(listed, tensor.dtype) if tensor.is_floating_point() else tensor.dtype

    return {name: dtype_of(name, tensor) for name, tensor in model.state_dict().items()}


@dataclass
class Skeleton:
    """A causal language model whose weights are read from its checkpoint only while they are needed."""

    model: PreTrainedModel
    """The module tree; parameters on meta unless loaded."""
    reader: CheckpointReader
    names: dict[str, str]
    """Parameter or buffer name in the model -> tensor name in the checkpoint."""
    device: torch.device
    dtype: torch.dtype
    """The dtype the network computes in."""
    dtypes: dict[str, torch.dtype]
    """The dtype of every parameter and persistent buffer when it is loaded, by name in the model (`loaded_dtypes`)."""
    computed: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    """Values, by parameter name, that are no tensor of the checkpoint and are computed whenever they are loaded."""
    _empty: dict[str, nn.Parameter] = field(default_factory=dict)

    @classmethod
    def open(
        cls, reader: CheckpointReader, config: Any, device: torch.device, dtype: torch.dtype, trust_remote_code: bool
    ) -> Skeleton:
        """Build the module tree and move its computed buffers to the device."""
        check_size(config, reader)
        model = build_empty(config, dtype, trust_remote_code)
        for module in model.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[key] = buffer.to(device)
        names = checkpoint_names(model, reader.tensors)
        if (adapter := adapter_tensor(name for name in reader.tensors if name not in set(names.values()))) is not None:
            raise UserError(
                f"{reader.path}: tensor '{adapter}' belongs to an adapter that is not merged; merge it into the model "
                "first (peft: merge_and_unload, then save_pretrained) and give the merged checkpoint"
            )
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        for name, source in names.items():
            if reader.tensors[source].shape != tuple(shapes[name]):
                raise UserError(
                    f"{reader.path}: tensor '{source}' has shape {list(reader.tensors[source].shape)}, "
                    f"config.json makes it {list(shapes[name])}; the checkpoint and its config do not belong together"
                )
        return cls(
            model=model, reader=reader, names=names, device=device, dtype=dtype, dtypes=loaded_dtypes(model, dtype)
        )

    def why_missing(self, name: str) -> str:
        """Why no tensor fills a parameter, as the end of a UserError's sentence, with the remedy."""
        translate = name_translator(self.model)
        for stored, why in self.reader.unread.items():
            if translate(stored) == name:
                return f"{why}; index and shards disagree, download them again"
        if (config := self.reader.quantization_config) is not None:
            method = config.get("quant_method", "unknown")
            return (
                f"{self.reader.quantization_file} says that the weights are quantized (quant_method '{method}'), in a "
                "way that llmquant cannot read; give the model's checkpoint in 16 bits"
            )
        return "the checkpoint is incomplete, or its names are not those of transformers' model"

    def missing(self) -> list[str]:
        """Parameters that no tensor of the checkpoint fills."""
        return [name for name, _ in self.model.named_parameters() if name not in self.names]

    def load(self, prefix: str, replacements: Mapping[str, Tensor] | None = None, recurse: bool = True) -> None:
        """Fill the parameters and persistent buffers of the module called prefix.

        replacements: values for some of them by full name, instead of what the checkpoint holds.
        """
        module = self.model.get_submodule(prefix)
        for key, owner, leaf, tensor in _entries(module, recurse):
            name = f"{prefix}.{key}" if prefix else key
            if replacements is not None and name in replacements:
                value = replacements[name]
            elif name in self.computed:
                value = self.computed[name]()
            elif name in self.names:
                value = self.reader.read(self.names[name])
            elif isinstance(tensor, nn.Parameter):
                raise UserError(f"{self.reader.path}: no tensor holds parameter '{name}': {self.why_missing(name)}")
            else:
                continue
            self.put(name, owner, leaf, value)

    def put(self, name: str, owner: nn.Module, leaf: str, value: Tensor) -> None:
        """Give one parameter or buffer its value, on the device, in the dtype that transformers loads it in."""
        value = value.to(device=self.device, dtype=self.dtypes.get(name, value.dtype))
        if leaf in owner._parameters:
            parameter = owner._parameters[leaf]
            if parameter is not None and parameter.is_meta:
                self._empty.setdefault(name, parameter)
            owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            owner._buffers[leaf] = value

    def drop(self, prefix: str, recurse: bool = True) -> None:
        """Give back the memory of the parameters of the module called prefix."""
        module = self.model.get_submodule(prefix)
        for key, owner, leaf, _ in _entries(module, recurse):
            name = f"{prefix}.{key}" if prefix else key
            if name in self._empty:
                owner._parameters[leaf] = self._empty[name]


def _entries(module: nn.Module, recurse: bool) -> list[tuple[str, nn.Module, str, Tensor]]:
    """(name, owner, leaf name, tensor) of every parameter and persistent buffer of a module."""
    entries = []
    for prefix, owner in module.named_modules() if recurse else [("", module)]:
        for leaf, parameter in owner._parameters.items():
            if parameter is not None:
                entries.append((f"{prefix}.{leaf}" if prefix else leaf, owner, leaf, parameter))
        for leaf, buffer in owner._buffers.items():
            if buffer is not None and leaf not in owner._non_persistent_buffers_set:
                entries.append((f"{prefix}.{leaf}" if prefix else leaf, owner, leaf, buffer))
    return entries
