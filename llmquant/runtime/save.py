"""Writing a loaded quantized model: a checkpoint in the format that it was read from, with the same codes.

transformers writes what `model.state_dict()` holds, which is the packed tensors (`linear.py`), and the model's config,
which keeps the `quantization_config`. `save_quantized` stands around that, so that a folder is either a checkpoint
that opens or what it was before: everything is written into a folder of its own, checked, and moved in at the end.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from llmquant.checkpoints.durable import sync_folder
from llmquant.checkpoints.header import parse_json
from llmquant.checkpoints.quantized import find_quantized_modules, parsed_quantization
from llmquant.checkpoints.reader import CheckpointReader
from llmquant.checkpoints.side_files import STORAGE_FILES, is_weights
from llmquant.errors import UserError, first_words
from llmquant.formats.registry import parse_quantization_config
from llmquant.models.blocks import is_linear
from llmquant.models.skeleton import saved_names
from llmquant.paths import typed_path
from llmquant.runtime.linear import PackedLinear, QuantizedLinear
from llmquant.spec import QuantSpec

WEIGHT_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
"""Names of files that readers take for the weights of a checkpoint."""

REFUSED_OPTIONS = {
    "variant": "readers of quantized checkpoints look for none",
    "distributed_checkpoint": "the packed tensors of a linear cannot be sharded",
}
"""Options of transformers' `save_pretrained` -> why they cannot be used."""

WRITING_OPTIONS = ("save_peft_format", "save_original_format")
"""Options of transformers' `save_pretrained`; all that it does not know are for the hub."""


def let_save(model: Any, quantization_config: Mapping[str, Any]) -> None:
    """Give a loaded model the `quantization_config` of its checkpoint, and a `save_pretrained` that writes another.

    Its class becomes a subclass of the same name: a function on the instance would refer to the model, whose memory
    would then outlive `del model`.
    """
    model.config.quantization_config = dict(quantization_config)
    model.quantized_names = frozenset(name for name, spec in _specs(model).items() if spec is not None)
    model.__class__ = _saving_class(type(model))  # type: ignore[arg-type]
    for part in model.modules():
        if part is not model and isinstance(part, PreTrainedModel):
            vars(part)["save_pretrained"] = _refuse_part


def _refuse_part(*_: Any, **__: Any) -> None:
    """Replaces `save_pretrained` of the submodels of a loaded model."""
    raise UserError("save_pretrained: a part of a quantized model cannot be saved by itself; save the whole model")


class SavesQuantized:
    """A transformers model whose `save_pretrained`, and so `push_to_hub`, is `save_quantized`."""

    quantized_names: frozenset[str]
    """The quantized linears of the model as it was loaded, by their name in a checkpoint."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **options: Any) -> None:
        """`save_quantized`."""
        save_quantized(self, save_directory, *args, **options)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """`.to()` and its kin: UserError, before anything is moved or cast, if a linear cannot follow."""
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, QuantizedLinear | PackedLinear):
                module.check_move(fn)
        return super()._apply(fn, recurse)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """For copies and pickles, which find a class by its name and would take the one of transformers."""
        state: Any = super().__reduce_ex__(max(protocol, 2))
        return (_rebuild, (type(self).__mro__[2],), *state[2:])


@cache
def _saving_class(model_class: type) -> type:
    names = {"__module__": model_class.__module__, "__qualname__": model_class.__qualname__}
    return type(model_class.__name__, (SavesQuantized, model_class), names)


def _rebuild(model_class: type) -> Any:
    """An instance without attributes."""
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
    """Write a model that `let_save` prepared into a folder, which may be the one that it was loaded from.

    All arguments are those of transformers' `save_pretrained`. The weights that the folder held before under
    the standard names are replaced, and the files that describe them removed; every other file stays.

    Raises UserError, and leaves the folder as it was, if the folder holds weights that are not a quantized checkpoint,
    if the format cannot hold a linear exactly, if the result would not open, and if the disk does not take it.
    """
    for option, reason in REFUSED_OPTIONS.items():
        if options.pop(option, None):
            raise UserError(f"save_pretrained: {option} does not go with quantized linears ({reason}); leave it out")
    writing = {option: options.pop(option) for option in WRITING_OPTIONS if option in options}
    folder = typed_path(save_directory)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: a file; give a folder, or a name that is free")
    if not is_main_process:
        return
    created = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        _check_weights(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".llmquant-", dir=folder) as name:
            staging = Path(name)
            write = super(SavesQuantized, model).save_pretrained  # type: ignore[misc]
            write(staging, state_dict=state_dict, max_shard_size=max_shard_size, **writing)
            _fit_config(staging, model)
            _check(staging, folder, model)
            _move(staging, folder)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder}: cannot be written ({first_words(error)}); check the folder, its permissions and the free space"
        ) from error
    finally:
        for each in created:
            if each.is_dir() and not any(each.iterdir()):
                each.rmdir()
    if push_to_hub:
        repository = options.pop("repo_id", folder.resolve().name)
        model.push_to_hub(repository, max_shard_size=max_shard_size, **options)


def _check_weights(folder: Path) -> None:
    """UserError if a folder holds weights that are not a quantized checkpoint: they may be the only original."""
    if not folder.is_dir() or not any(is_weights(file.name) for file in folder.iterdir()):
        return
    try:
        is_quantized = parsed_quantization(CheckpointReader(folder)) is not None
        reason = "they are not quantized"
    except UserError as error:
        is_quantized, reason = False, str(error)
    if not is_quantized:
        raise UserError(
            f"{folder}: holds weights, and save_pretrained replaces only a quantized checkpoint ({reason}); give "
            "another folder, or move them away"
        )


def _specs(model: Any) -> dict[str, QuantSpec | None]:
    """The grid of every linear by its name in a checkpoint that is written; None for one in 16 bit."""
    saved = saved_names(model)
    return {
        saved(f"{name}.weight").removesuffix(".weight"): module.spec if isinstance(module, QuantizedLinear) else None
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear | PackedLinear) or is_linear(module)
    }


def _fit_config(staging: Path, model: Any) -> None:
    """Make the `quantization_config` say of every linear that was written how it is stored, and write it into the file
    in which some readers of the format look for it first.

    That of the checkpoint does, unless it names linears by names that lack the base model's prefix.
    """
    file = staging / "config.json"
    content = parse_json(file.read_bytes(), str(file))
    config = content.get("quantization_config")
    if config is None:
        raise UserError("model.config: its quantization_config is gone; load the model again before saving it")
    parsed, specs = parse_quantization_config(config), _specs(model)
    quantized = {name: spec for name, spec in specs.items() if spec is not None}
    if quantized and any(parsed.spec_of(name) != spec for name, spec in quantized.items()):
        ((common, _),) = Counter(quantized.values()).most_common(1)
        moving = any(isinstance(each, QuantizedLinear) and each.layer.moving_groups for each in model.modules())
        meta = config.get("meta")
        config = parsed.format.config(
            parsed.default or common, specs, moving_groups=moving, meta=meta if isinstance(meta, dict) else None
        )
        file.write_text(json.dumps(content | {"quantization_config": config}, indent=2, sort_keys=True) + "\n")
    if parsed.format.config_file is not None:
        (staging / parsed.format.config_file).write_text(json.dumps(config, indent=2) + "\n")


def _check(staging: Path, folder: Path, model: Any) -> None:
    """UserError unless what was written holds the quantized linears of the model, as its config says."""
    try:
        reader = CheckpointReader(staging)
        parsed = parsed_quantization(reader)
        written = {} if parsed is None else find_quantized_modules(reader, parsed)
    except UserError as error:
        raise UserError(str(error).replace(str(staging), str(folder))) from None
    expected = {name for name, spec in _specs(model).items() if spec is not None}
    for name in sorted(written.keys() ^ expected | written.keys() - model.quantized_names):
        state = "not a quantized linear of the loaded model" if name in written else "missing in the state dict"
        raise UserError(f"{folder}: not written, because '{name}' is {state}, so that it would not open")


def _move(staging: Path, folder: Path) -> None:
    """Move the new files over the old ones, config.json last; remove what else held or described the old weights."""
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
