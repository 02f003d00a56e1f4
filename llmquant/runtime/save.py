"""Save a loaded quantized model in the format that it was read from, with the same codes (integer levels).

transformers writes the contents of `model.state_dict()`, which are the packed tensors (`linear.py`), and the model's
config, which keeps the `quantization_config`. `save_quantized` makes this safe: transformers writes into a temporary
folder, the result is checked, and then the files are moved into place. A folder therefore holds either a checkpoint
that can be loaded or its previous contents.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from llmquant.checkpoints.atomic import sync_folder
from llmquant.checkpoints.header import parse_json
from llmquant.checkpoints.quantized import find_quantized_modules, parsed_quantization
from llmquant.checkpoints.reader import CheckpointReader
from llmquant.checkpoints.side_files import STORAGE_FILES, is_weights
from llmquant.errors import UserError, one_line
from llmquant.formats.registry import parse_quantization_config
from llmquant.models.blocks import is_linear
from llmquant.models.skeleton import saved_names
from llmquant.paths import parse_path
from llmquant.runtime.attention import register_attention
from llmquant.runtime.linear import PackedDenseLinear, QuantizedLinear
from llmquant.spec import QuantSpec

WEIGHT_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
"""Names of the files from which readers load the weights of a checkpoint."""

REFUSED_OPTIONS = {
    "variant": "readers of quantized checkpoints ignore it",
    "distributed_checkpoint": "the packed tensors of a linear cannot be sharded",
}
"""Options of transformers' `save_pretrained` that cannot be used, with the reasons."""

WRITING_OPTIONS = ("save_peft_format", "save_original_format")
"""Keyword options that transformers' `save_pretrained` uses itself. It passes all others on to the upload."""


def enable_saving(model: Any, quantization_config: Mapping[str, Any]) -> None:
    """Make `save_pretrained` of a loaded model write a quantized checkpoint. The model is changed in place.

    The model gets the `quantization_config` of its checkpoint, and its class becomes a subclass of the same name. (A
    method on the instance would hold a reference to the model, so `del model` would no longer free its memory.)
    """
    model.config.quantization_config = dict(quantization_config)
    model.quantized_names = frozenset(name for name, spec in _specs(model).items() if spec is not None)
    model.__class__ = _saving_class(type(model))  # type: ignore[arg-type]
    for submodel in model.modules():
        if submodel is not model and isinstance(submodel, PreTrainedModel):
            vars(submodel)["save_pretrained"] = _refuse_to_save_submodel


def _refuse_to_save_submodel(*_: Any, **__: Any) -> None:
    """Raise UserError. This function replaces `save_pretrained` of the submodels of a loaded model."""
    raise UserError("save_pretrained: a submodel of a quantized model cannot be saved alone; save the whole model")


class SavesQuantized:
    """Mixin for a transformers model: `save_pretrained`, and with it `push_to_hub`, calls `save_quantized`."""

    quantized_names: frozenset[str]
    """Checkpoint names of the linears that were quantized when the model was loaded."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **options: Any) -> None:
        """Write the model into a folder as `save_quantized` does, with the same arguments."""
        save_quantized(self, save_directory, *args, **options)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Implement `.to()`, `.cuda()` and similar methods.

        If a linear cannot be moved or cast, this raises UserError before anything changes.
        """
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, QuantizedLinear | PackedDenseLinear):
                module.check_move(fn)
        return super()._apply(fn, recurse)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Support copies and pickles, which look up a class by its name and would find the class of transformers."""
        state: Any = super().__reduce_ex__(max(protocol, 2))
        return (_unpickle, (type(self).__mro__[2],), *state[2:])


@contextmanager
def _without_validation(settings: GenerationConfig | None) -> Iterator[None]:
    """Let transformers save the generation settings of a checkpoint even if its `validate` refuses them.

    Up to version 5.20, transformers refuses to save some settings that it loads. Settings that were changed since they
    were loaded are validated, as later versions do.
    """
    if settings is None or getattr(settings, "_original_object_hash", None) != hash(settings):
        yield
        return
    own_class = type(settings)
    settings.__class__ = type(own_class.__name__, (own_class,), {"validate": lambda *_, **__: None})
    try:
        yield
    finally:
        settings.__class__ = own_class


@cache
def _saving_class(model_class: type) -> type:
    """Return a subclass of a transformers model class with the same name and `SavesQuantized` as its first base."""
    names = {"__module__": model_class.__module__, "__qualname__": model_class.__qualname__}
    return type(model_class.__name__, (SavesQuantized, model_class), names)


def _unpickle(model_class: type) -> Any:
    """Return an instance without attributes, which a copy or pickle fills in next.

    The model's config may name our attention function, which a new process has not registered yet.
    """
    register_attention()
    return object.__new__(_saving_class(model_class))  # type: ignore[arg-type]


def save_quantized(
    model: Any,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    push_to_hub: bool = False,
    max_shard_size: int | str = "50GB",
    **options: Any,
) -> None:
    """Write a model into a folder, which may be the folder that it was loaded from. See `enable_saving`.

    The arguments are those of transformers' `save_pretrained`. Weights that the folder already holds under the standard
    names are replaced, and the files that describe them are removed. Every other file stays.

    Raises UserError, and leaves the folder as it was, if the folder holds weights that are not a quantized checkpoint,
    if the format cannot store a linear exactly, if the result could not be loaded, or if a file cannot be written.
    """
    for option, reason in REFUSED_OPTIONS.items():
        if options.pop(option, None):
            raise UserError(f"save_pretrained: {option} does not work with quantized linears ({reason}); omit it")
    write_options = {option: options.pop(option) for option in WRITING_OPTIONS if option in options}
    folder = parse_path(save_directory)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; give a folder, or a name that does not exist yet")
    if not is_main_process:
        return
    new_folders = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        _check_replaceable(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".llmquant-", dir=folder) as name:
            staging = Path(name)
            write = super(SavesQuantized, model).save_pretrained  # type: ignore[misc]
            with _without_validation(getattr(model, "generation_config", None)):
                write(staging, state_dict=state_dict, max_shard_size=max_shard_size, **write_options)
            _update_config(staging, model)
            _check_written(staging, folder, model)
            _move_into_place(staging, folder)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder}: cannot be written ({one_line(error)}); check its permissions and the free disk space"
        ) from error
    finally:
        for each in new_folders:
            if each.is_dir() and not any(each.iterdir()):
                each.rmdir()
    if push_to_hub:
        repository = options.pop("repo_id", folder.resolve().name)
        model.push_to_hub(repository, max_shard_size=max_shard_size, **options)


def _check_replaceable(folder: Path) -> None:
    """Raise UserError if a folder holds weights that are not a quantized checkpoint: they may be the only original."""
    if not folder.is_dir() or not any(is_weights(file.name) for file in folder.iterdir()):
        return
    try:
        is_quantized = parsed_quantization(CheckpointReader(folder)) is not None
        reason = "these are not quantized"
    except UserError as error:
        is_quantized, reason = False, str(error)
    if not is_quantized:
        raise UserError(
            f"{folder}: holds weights, and save_pretrained replaces only a quantized checkpoint ({reason}); give "
            "another folder, or move the weights elsewhere"
        )


def _specs(model: Any) -> dict[str, QuantSpec | None]:
    """Return the `QuantSpec` of every linear, by its name in a saved checkpoint; None for an unquantized linear."""
    saved = saved_names(model)
    return {
        saved(f"{name}.weight").removesuffix(".weight"): module.spec if isinstance(module, QuantizedLinear) else None
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear | PackedDenseLinear) or is_linear(module)
    }


def _update_config(staging: Path, model: Any) -> None:
    """Make the saved `quantization_config` describe every saved linear, and copy it into the format's own config file,
    which some readers look for first.

    The config of the checkpoint is kept if it gives every quantized linear its grid. It does not if, for example, it
    names linears without the prefix of the base model.
    """
    file = staging / "config.json"
    content = parse_json(file.read_bytes(), str(file))
    config = content.get("quantization_config")
    if config is None:
        raise UserError("model.config: has no quantization_config any more; load the model again before you save it")
    parsed, specs = parse_quantization_config(config), _specs(model)
    quantized = {name: spec for name, spec in specs.items() if spec is not None}
    if quantized and any(parsed.spec_of(name) != spec for name, spec in quantized.items()):
        ((most_common_spec, _),) = Counter(quantized.values()).most_common(1)
        linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
        meta = config.get("meta")
        config = parsed.format.config(
            parsed.default or most_common_spec,
            specs,
            act_order_groups=any(linear.shape.act_order_groups for linear in linears),
            meta=meta if isinstance(meta, dict) else None,
        )
        file.write_text(json.dumps(content | {"quantization_config": config}, indent=2, sort_keys=True) + "\n")
    if parsed.format.config_file is not None:
        (staging / parsed.format.config_file).write_text(json.dumps(config, indent=2) + "\n")


def _check_written(staging: Path, folder: Path, model: Any) -> None:
    """Raise UserError unless the written files and their config describe exactly the model's quantized linears."""
    try:
        reader = CheckpointReader(staging)
        parsed = parsed_quantization(reader)
        written = {} if parsed is None else find_quantized_modules(reader, parsed)
    except UserError as error:
        raise UserError(str(error).replace(str(staging), str(folder))) from None
    expected = {name for name, spec in _specs(model).items() if spec is not None}
    for name in sorted(written.keys() ^ expected | written.keys() - model.quantized_names):
        state = "not a quantized linear of the loaded model" if name in written else "missing in the state dict"
        raise UserError(
            f"{folder}: not written, because '{name}' is {state}, so the checkpoint could not be loaded; save the "
            "model with the modules that it was loaded with"
        )


def _move_into_place(staging: Path, folder: Path) -> None:
    """Replace the old files by the new ones, config.json last, and remove other files that hold or describe weights."""
    written = sorted(file.relative_to(staging) for file in staging.rglob("*") if file.is_file())
    for name in written:
        with (staging / name).open("rb") as handle:
            os.fsync(handle.fileno())
    for name in written:
        if name != Path("config.json"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).replace(folder / name)
    for file in folder.iterdir():
        describes_weights = WEIGHT_FILE.fullmatch(file.name) or file.name in STORAGE_FILES
        if describes_weights and Path(file.name) not in written:
            file.unlink()
    (staging / "config.json").replace(folder / "config.json")
    sync_folder(folder)
