"""Find the files of a folder that hold the model's weights.

Current tools write `model.safetensors` or `model.safetensors.index.json`. Older tools used other names: AutoGPTQ wrote
`gptq_model-4bit-128g.safetensors` and AutoAWQ `awq_model_w4_g128.safetensors`. Variants have names such as
`model.fp16.safetensors`. A single safetensors file is accepted under any name. Any other folder raises a UserError.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from llmquant.checkpoints.header import parse_json
from llmquant.errors import UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

_SHARD = re.compile(r"-0*(\d+)-of-0*(\d+)\.safetensors$")


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """The weights of a checkpoint folder: a single safetensors file, or an index of several."""

    single: str | None = None
    """Name of the only safetensors file; None if there is an index."""
    index: str | None = None
    """Name of the JSON file that maps tensors to safetensors files; None if there is a single file."""
    note: str = ""
    """A message for the user if the files have an unusual name; empty otherwise."""


def find_weights(folder: Path) -> WeightFiles:
    """Return the weight files of a checkpoint folder. Raises UserError if there are none, or several candidates."""
    names = sorted(file.name for file in folder.iterdir())
    if SINGLE_FILE in names:
        return WeightFiles(single=SINGLE_FILE)
    if INDEX_FILE in names:
        return WeightFiles(index=INDEX_FILE)
    own = [name for name in names if not name.startswith(("adapter_", "."))]
    files = [name for name in own if name.endswith(".safetensors")]
    indexes = [name for name in own if ".safetensors.index." in name and name.endswith(".json")]
    if len(indexes) == 1 and indexes[0].endswith(".safetensors.index.json"):
        return WeightFiles(index=indexes[0], note=f"read by {indexes[0]}: there is no {INDEX_FILE}")
    if indexes:
        raise UserError(
            f"{folder}: no {SINGLE_FILE} and no {INDEX_FILE}, only {indexes[0]}, the index of a variant; "
            f"download the model's main weights, or rename that file to {INDEX_FILE}"
        )
    if len(files) == 1:
        return WeightFiles(
            single=_checked_single(folder, files[0]),
            note=f"read from {files[0]}, the only safetensors file: there is no {SINGLE_FILE}",
        )
    if files:
        raise UserError(
            f"{folder}: {len(files)} safetensors files ({files[0]}, {files[1]}, …), but no {SINGLE_FILE} and no "
            f"{INDEX_FILE} that says which tensors belong to the model; download the index, or keep one of the files"
        )
    raise UserError(_no_weights_message(folder, names))


def adapter_refusal(folder: Path) -> str | None:
    """Return the error message for a folder that holds an adapter but no model, or None if it holds no adapter."""
    if not any((folder / name).exists() for name in (ADAPTER_CONFIG, *ADAPTER_FILES)):
        return None
    base = _base_of_adapter(folder)
    return (
        f"{folder}: a LoRA adapter{f' of {base}' if base else ''}, without the weights of its base model; merge it "
        "into the base model first (peft: merge_and_unload, then save_pretrained) and give the merged checkpoint"
    )


def adapter_note(folder: Path) -> str:
    """Return a note if a folder holds an adapter beside the model's weights; empty if it does not."""
    adapters = [name for name in ADAPTER_FILES if (folder / name).exists()]
    return f"the adapter {adapters[0]} beside the weights is not merged into them: it is not used" if adapters else ""


def _checked_single(folder: Path, name: str) -> str:
    """Return the name of a single file. Raises UserError if the name belongs to one of several shards."""
    if (shard := _SHARD.search(name)) and int(shard[2]) > 1:
        raise UserError(
            f"{folder}: only {name}, one file of {int(shard[2])}, and no {INDEX_FILE}; download the other files and "
            "the index"
        )
    return name


def _no_weights_message(folder: Path, names: list[str]) -> str:
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES) and not name.startswith("adapter_")]
    weights = [name for name in pickles if name.startswith(("pytorch_model", "model"))]
    adapter = adapter_refusal(folder)
    if adapter and not weights:
        return adapter
    if pickles:
        return (
            f"{folder}: no {SINGLE_FILE}, only {(weights or pickles)[0]}, whose pickle could run code when loaded; "
            "convert it with safetensors (save_pretrained writes them)"
        )
    ggufs = [name for name in names if name.endswith(".gguf")]
    if ggufs:
        return (
            f"{folder}: no {SINGLE_FILE}, only {ggufs[0]}, a GGUF file; "
            "give the model's own checkpoint of safetensors files"
        )
    return f"{folder}: no {SINGLE_FILE} and no {INDEX_FILE}; download the model's weights"


def _base_of_adapter(folder: Path) -> str:
    """Return the base model in adapter_config.json; empty if there is none."""
    file = folder / ADAPTER_CONFIG
    try:
        base = parse_json(file.read_bytes(), str(file)).get("base_model_name_or_path")
    except (OSError, UserError):
        return ""
    return base if isinstance(base, str) and base.isprintable() else ""
