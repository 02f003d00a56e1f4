"""Which folder a model's name means: a local folder, or a repository of the Hugging Face hub, fetched once."""

from __future__ import annotations

import re
from pathlib import Path

from llmquant.errors import UserError

# Weights as safetensors, configuration and tokenizer: nothing that has to be unpickled, nothing that is code.
WANTED_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
# Sub-folders repeat the weights for other tools, and "consolidated" is the same weights under another naming.
UNWANTED_FILES = ["*/*", "consolidated*"]
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve_model(model: str) -> Path:
    """The local folder of `model`: itself if it is a folder, else the hub's files under that id.

    Raises UserError when it is neither.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{model}: is a file; give the folder that holds config.json and the .safetensors files")
    if model.startswith((".", "/", "~")) or not _REPOSITORY.fullmatch(model):
        raise UserError(f"{model}: no such folder; give a folder with config.json and .safetensors files, or a hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=WANTED_FILES, ignore_patterns=UNWANTED_FILES))
    # Network, authorization and cache failures come from several libraries without a common base; told in the message.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{model}: no such folder, and the Hugging Face hub does not give it ({reason}); "
            f"check the name, the network, and for a gated model `hf auth login`"
        ) from error
