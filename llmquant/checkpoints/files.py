"""Which files of a folder hold a model's weights.

Tools agree on `model.safetensors` and `model.safetensors.index.json`. Older ones did not: AutoGPTQ wrote
`gptq_model-4bit-128g.safetensors`, AutoAWQ `awq_model_w4_g128.safetensors`; variants have names such as
`model.fp16.safetensors`.
A file of any name is taken if there is no other. Everything else ends in one UserError that says what is there instead.
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
    """Either one file, or an index that names several."""

    single: str | None = None
    """Name of the one safetensors file."""
    index: str | None = None
    """Name of the JSON file that maps tensors to safetensors files."""
    note: str = ""
    """What is unusual about the choice; empty if nothing is."""


def find_weights(folder: Path) -> WeightFiles:
    """The weights of a checkpoint folder; UserError if there are none, or if the choice is not clear."""
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
            single=_whole(folder, files[0]),
            note=f"read from {files[0]}, the only safetensors file: there is no {SINGLE_FILE}",
        )
    if files:
        raise UserError(
            f"{folder}: {len(files)} safetensors files ({files[0]}, {files[1]}, …), but no {SINGLE_FILE} and no "
            f"{INDEX_FILE} that says which tensors belong to the model; download the index, or keep one of the files"
        )
    raise UserError(_what_instead(folder, names))


def adapter_refusal(folder: Path) -> str | None:
    """Why a folder that holds an adapter and no model cannot be opened; None if it holds no adapter."""
    if not any((folder / name).exists() for name in (ADAPTER_CONFIG, *ADAPTER_FILES)):
        return None
    base = _base_of_adapter(folder)
    return (
        f"{folder}: a LoRA adapter{f' of {base}' if base else ''}, without the weights of its base model; merge it "
        "into the base model first (peft: merge_and_unload, then save_pretrained) and give the merged checkpoint"
    )


def adapter_note(folder: Path) -> str:
    """What to remark if an adapter lies beside a model's own weights; empty if none does."""
    found = [name for name in ADAPTER_FILES if (folder / name).exists()]
    return f"the adapter {found[0]} beside the weights is not merged into them: it is not used" if found else ""


def _whole(folder: Path, name: str) -> str:
    """The name of a file, unless it says that it is one of several."""
    if (found := _SHARD.search(name)) and int(found[2]) > 1:
        raise UserError(
            f"{folder}: only {name}, one file of {int(found[2])}, and no {INDEX_FILE}; download the other files and "
            "the index"
        )
    return name


def _what_instead(folder: Path, names: list[str]) -> str:
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
            f"{folder}: no {SINGLE_FILE}, only {ggufs[0]}, which is already quantized or of another tool; give the "
            "model's own checkpoint of safetensors files"
        )
    return f"{folder}: no {SINGLE_FILE} and no {INDEX_FILE}; download the model's weights"


def _base_of_adapter(folder: Path) -> str:
    """The base model that adapter_config.json names; empty if it names none."""
    file = folder / ADAPTER_CONFIG
    try:
        base = parse_json(file.read_bytes(), str(file)).get("base_model_name_or_path")
    except (OSError, UserError):
        return ""
    return base if isinstance(base, str) and base.isprintable() else ""
