"""The model without its weights: transformers' module tree on the meta device, and the names of the tensors to load.

Parameters are on meta (no memory); buffers that the model's code computes (rotary frequencies, embedding scales) are
real. Weights are loaded module by module: `Skeleton.load` reads the tensors of one module from the checkpoint's shards,
and `Skeleton.drop` frees them. The whole model is never in memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
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
from llmquant.errors import UserError, one_line
from llmquant.models.prefetch import Prefetcher
from llmquant.remote_code import failure_of_remote_code, read_object, remote_code_files, untrusted_code_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmquant.checkpoints.reader import CheckpointReader

MODEL_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Dtypes of a model by the name that `--dtype` takes."""
SLOW_BFLOAT16 = ("DEFAULT", "NO AVX", "AVX2")
"""CPU capabilities, as torch names them, without vector instructions for bfloat16."""


def read_config(path: Path, trust_remote_code: bool = False) -> Any:
    """Return the transformers config of a local checkpoint, without its quantization_config.

    Raises UserError if transformers cannot read it, or if it is not the config of a causal language model.
    """
    try:
        # Trusted code may be in another repository of the hub; everything else is in the folder.
        config = AutoConfig.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=not trust_remote_code
        )
    except Exception as error:  # config.json is untrusted: transformers may fail on it with any exception
        is_known = str(read_object(path / "config.json").get("model_type")) in CONFIG_MAPPING
        if not (trust_remote_code or is_known) and (files := remote_code_files(path / "config.json", "AutoConfig")):
            raise untrusted_code_error(path, "configuration", files) from error
        if (line := failure_of_remote_code(error)) is not None:
            raise UserError(line) from error
        raise UserError(
            f"{path}/config.json: transformers cannot read it ({one_line(error)}); is it a supported model?"
        ) from error
    remote = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not remote and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        if not trust_remote_code and (files := remote_code_files(path / "config.json", "AutoModelForCausalLM")):
            raise untrusted_code_error(path, "model", files)
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
    # transformers must not apply its own quantizer: llmquant replaces the packed linears.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


CONTEXT_KEYS = ("max_position_embeddings", "max_seq_len", "max_target_positions")
"""Config keys that bound the number of positions; the second is MPT's, the third Whisper's."""


def context_length(config: Any) -> float:
    """Return the largest number of tokens that the model's positions allow; infinite if the config sets no bound.

    Some configs express that there is no bound as None, others as 0 or -1 (XLNet).
    """
    text_config = config.get_text_config(decoder=True)
    bounds = (getattr(text_config, name, None) for name in CONTEXT_KEYS)
    return next((bound for bound in bounds if isinstance(bound, int) and bound > 0), math.inf)


def _generates_text(architecture: str) -> bool:
    return architecture.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))


def check_num_blocks(config: Any, reader: CheckpointReader) -> None:
    """Raise UserError if a config has more decoder blocks than the checkpoint has tensors, before they are built."""
    num_blocks = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if isinstance(num_blocks, int) and num_blocks > len(reader.tensors):
        raise UserError(
            f"{reader.path / 'config.json'}: num_hidden_layers {num_blocks}, but the checkpoint has "
            f"{len(reader.tensors)} tensors; the checkpoint and its config do not belong together"
        )


def stored_dtype(config: Any, reader: CheckpointReader) -> torch.dtype:
    """Return the dtype in which most bytes of the checkpoint are stored: the model's dtype.

    A packed checkpoint lacks most of the original's bytes, so its config's dtype is used if any tensor has it. The
    config's dtype is also used if no tensor has one of MODEL_DTYPES.
    """
    bytes_of: dict[torch.dtype, int] = {}
    for info in reader.tensors.values():
        if info.dtype in MODEL_DTYPES.values():
            bytes_of[info.dtype] = bytes_of.get(info.dtype, 0) + info.nbytes
    if config.dtype in bytes_of and packed_tensor(reader.tensors) is not None:
        return config.dtype
    if bytes_of:
        return max(bytes_of, key=lambda dtype: bytes_of[dtype])
    return config.dtype or torch.float32


def compute_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype to compute in: float32 for float16 on a CPU, where float32 is faster."""
    return torch.float32 if device.type == "cpu" and stored == torch.float16 else stored


def comparison_dtype(computed: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which to compare two models: the dtype they compute in, or float32 instead of slow bfloat16.

    On a CPU without AVX-512, torch multiplies bfloat16 matrices eight times as slowly as float32 ones.
    """
    is_slow = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in SLOW_BFLOAT16
    return torch.float32 if is_slow and computed == torch.bfloat16 else computed


def build_empty(config: Any, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build the causal language model of a config: parameters on meta in dtype, computed buffers real, in eval mode.

    Raises UserError if transformers cannot build it.
    """
    is_registered = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        model.tie_weights()
    except Exception as error:  # contradictory sizes fail with a different exception in every model
        if (line := failure_of_remote_code(error)) is not None:
            raise UserError(line) from error
        raise UserError(
            f"config.json: transformers cannot build the model it describes ({type(error).__name__}: "
            f"{one_line(error)}); restore or download it again"
        ) from error
    finally:
        # transformers registers a class of trusted code as it is. The next call would use the registered class, without
        # the generation methods that transformers adds to classes that lack them.
        if not is_registered:
            MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.pop(type(config), None)
    return model.eval().requires_grad_(False)


def name_translator(model: PreTrainedModel) -> Callable[[str], str | None]:
    """Return a function from a tensor's name in the checkpoint to its name in the model, or to None if it has none.

    The two names agree, or transformers renames the tensor at load (GPT-NeoX's `embed_out` is the model's `lm_head`),
    or they differ by the base model's prefix (checkpoints saved from the base model lack it).
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
    """Return a function from a tensor's name in the model to its name in a checkpoint that `save_pretrained` writes.

    The inverse of `name_translator`, except that `save_pretrained` always writes the base model's prefix.
    """
    transforms = getattr(model, "_weight_conversions", None)
    if transforms is None:
        known = get_model_conversion_mapping(model, add_legacy=False)
        transforms = [transform for transform in known if not isinstance(transform, PrefixChange)]
    renamings = [each.reverse_transform() for each in reversed(transforms) if isinstance(each, WeightRenaming)]
    return lambda name: rename_source_key(name, renamings, [])[0]  # type: ignore[arg-type]


def checkpoint_names(model: PreTrainedModel, available: Iterable[str]) -> dict[str, str]:
    """Return name in the model -> name in the checkpoint, for each parameter and persistent buffer that has a tensor.

    available: names of the checkpoint's tensors. Parameters tied to a stored one map to its tensor.
    """
    translate = name_translator(model)
    names = {name: stored for stored in available if (name := translate(stored)) is not None}
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    for name, other in [*tied.items(), *((other, name) for name, other in tied.items())]:
        if name not in names and other in names:
            names[name] = names[other]
    return names


def converted_names(model: PreTrainedModel, available: Iterable[str]) -> dict[str, list[str]]:
    """Return the parameters that transformers computes from tensors of a checkpoint at load: name -> tensor names."""
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
    """Return the dtype in which `from_pretrained(dtype=dtype)` loads every parameter and persistent buffer.

    model: built in that dtype, which most of its tensors have. Some classes create single tensors in another dtype, or
    list tensors that stay in float32 in a 16-bit model (routing biases of mixture-of-experts models).
    """
    dtype_plan = model._get_dtype_plan(dtype)
    patterns = {re.compile(pattern.replace("*", ".*")): dtype for pattern, dtype in dtype_plan.items()}

    def dtype_of(name: str, tensor: Tensor) -> torch.dtype:
        listed = (dtype for pattern, dtype in patterns.items() if pattern.search(name))
        return next(listed, tensor.dtype) if tensor.is_floating_point() else tensor.dtype

    return {name: dtype_of(name, tensor) for name, tensor in model.state_dict().items()}


@dataclass
class Skeleton:
    """A causal language model whose weights are read from its checkpoint only while they are needed."""

    model: PreTrainedModel
    """Module tree; parameters are on meta unless they are loaded."""
    reader: CheckpointReader
    """Checkpoint that the weights are read from."""
    names: dict[str, str]
    """Parameter or buffer name in the model -> tensor name in the checkpoint."""
    device: torch.device
    """Device that the weights are loaded to."""
    dtype: torch.dtype
    """Dtype that the model computes in."""
    dtypes: dict[str, torch.dtype]
    """Dtype of every loaded parameter and persistent buffer, by name in the model (`loaded_dtypes`)."""
    computed_parameters: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    """Functions that compute, at each load, the value of a parameter that has no tensor; by parameter name."""
    _empty: dict[str, nn.Parameter] = field(default_factory=dict)
    """Parameters on meta that loaded ones have replaced, by name."""
    _prefetcher: Prefetcher | None = None
    """Reader of the next block's weights; None before the first `prefetch`, and on a CPU."""

    @classmethod
    def open(
        cls, reader: CheckpointReader, config: Any, device: torch.device, dtype: torch.dtype, trust_remote_code: bool
    ) -> Skeleton:
        """Build the module tree and move its computed buffers to the device.

        Raises UserError if the checkpoint and its config do not match.
        """
        check_num_blocks(config, reader)
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
                    f"but config.json gives the shape {list(shapes[name])}; the checkpoint and its config do not "
                    "belong together"
                )
        return cls(
            model=model, reader=reader, names=names, device=device, dtype=dtype, dtypes=loaded_dtypes(model, dtype)
        )

    @cached_property
    def used_tensors(self) -> frozenset[str]:
        """Names of the checkpoint's tensors that the model uses."""
        return frozenset(self.names.values())

    @cached_property
    def parameter_tensors(self) -> frozenset[str]:
        """Names of the checkpoint's tensors that are parameters. Buffers are left out, because a mask may hold -inf."""
        parameters = (name for name, _ in self.model.named_parameters(remove_duplicate=False))
        return frozenset(self.names[name] for name in parameters if name in self.names)

    def why_missing(self, name: str) -> str:
        """Return why no tensor fills a parameter, as the end of an error message, with the remedy."""
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

    def missing_parameters(self) -> list[str]:
        """Return the names of the parameters that no tensor of the checkpoint fills."""
        return [name for name, _ in self.model.named_parameters() if name not in self.names]

    def load(self, prefix: str, replacements: Mapping[str, Tensor] | None = None, recurse: bool = True) -> None:
        """Load the parameters and persistent buffers of a module.

        prefix: full name of the module. replacements: values to load instead of the checkpoint's, by full name.
        recurse: False leaves out the modules inside.
        """
        module = self.model.get_submodule(prefix)
        for key, owner, leaf, tensor in _entries(module, recurse):
            name = f"{prefix}.{key}" if prefix else key
            if replacements is not None and name in replacements:
                value = replacements[name]
            elif name in self.computed_parameters:
                value = self.computed_parameters[name]()
            elif name in self.names:
                value = self._read(self.names[name])
            elif isinstance(tensor, nn.Parameter):
                raise UserError(f"{self.reader.path}: no tensor holds parameter '{name}': {self.why_missing(name)}")
            else:
                continue
            self.put(name, owner, leaf, value)

    def _read(self, source: str) -> Tensor:
        """Return a tensor of the checkpoint, which may have been prefetched."""
        prefetched = None if self._prefetcher is None else self._prefetcher.take(source)
        return self.reader.read(source) if prefetched is None else prefetched

    def prefetch(self, prefix: str) -> None:
        """Start to read the tensors that the next `load` of a module needs, if the model runs on a GPU.

        On a CPU, the weights of a second block would only raise the peak memory.
        """
        if self.device.type != "cuda":
            return
        if self._prefetcher is None:
            self._prefetcher = Prefetcher(self.reader)
        names = [f"{prefix}.{key}" for key, *_ in _entries(self.model.get_submodule(prefix), recurse=True)]
        read = [self.names[name] for name in names if name in self.names and name not in self.computed_parameters]
        self._prefetcher.start(dict.fromkeys(read))

    def cancel_prefetch(self) -> None:
        """Stop what `prefetch` has started."""
        if self._prefetcher is not None:
            self._prefetcher.cancel()

    def put(self, name: str, owner: nn.Module, leaf: str, value: Tensor) -> None:
        """Set one parameter or buffer to a value, on the device and in the dtype in which transformers loads it.

        name: full name. owner, leaf: module that has it, and its name within that module.
        """
        value = value.to(device=self.device, dtype=self.dtypes.get(name, value.dtype))
        if leaf in owner._parameters:
            parameter = owner._parameters[leaf]
            if parameter is not None and parameter.is_meta:
                self._empty.setdefault(name, parameter)
            owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            owner._buffers[leaf] = value

    def drop(self, prefix: str, recurse: bool = True) -> None:
        """Free the parameters of a module by putting them back on meta.

        prefix: full name of the module. recurse: False leaves out the modules inside.
        """
        module = self.model.get_submodule(prefix)
        for key, owner, leaf, _ in _entries(module, recurse):
            name = f"{prefix}.{key}" if prefix else key
            if name in self._empty:
                owner._parameters[leaf] = self._empty[name]


def _entries(module: nn.Module, recurse: bool) -> list[tuple[str, nn.Module, str, Tensor]]:
    """Return (name, owner, leaf name, tensor) of every parameter and persistent buffer of a module."""
    entries = []
    for prefix, owner in module.named_modules() if recurse else [("", module)]:
        for leaf, parameter in owner._parameters.items():
            if parameter is not None:
                entries.append((f"{prefix}.{leaf}" if prefix else leaf, owner, leaf, parameter))
        for leaf, buffer in owner._buffers.items():
            if buffer is not None and leaf not in owner._non_persistent_buffers_set:
                entries.append((f"{prefix}.{leaf}" if prefix else leaf, owner, leaf, buffer))
    return entries
