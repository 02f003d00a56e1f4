"""Which folder a model's name means, a local one or a repository of the Hugging Face hub, and the tokenizer in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from llmquant.checkpoints.side_files import CODE_FILES, KEPT_FILES, NOT_THE_MODEL
from llmquant.errors import UserError, first_words
from llmquant.paths import typed_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Weights as safetensors and what OUT keeps beside them: nothing that has to be unpickled, nothing that is code.
WANTED_FILES = ["*.safetensors", *KEPT_FILES]
# `*` takes slashes too. Sub-folders repeat the weights for other tools; chat templates may lie in one.
_IN_SUB_FOLDERS = [f"*/{name}" for name in (*WANTED_FILES, *CODE_FILES) if not name.endswith(".jinja")]
UNWANTED_FILES = [*_IN_SUB_FOLDERS, *NOT_THE_MODEL]
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve_model(model: str) -> Path:
    """The local folder of `model`: itself if it is a folder, else the hub's files under that id.

    Raises UserError when it is neither.
    """
    path = typed_path(model)
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
        raise UserError(
            f"{model}: no such folder, and the Hugging Face hub does not give it ({first_words(error)}); "
            f"check the name, the network, and for a gated model `hf auth login`"
        ) from error


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder. Raises UserError where there is none, or one that cannot be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # A missing or damaged file shows as an OSError, ValueError, JSON or Rust error, by where it is noticed.
    except Exception as error:
        raise UserError(
            f"{folder}: its tokenizer cannot be loaded ({first_words(error)}); "
            f"copy tokenizer.json and tokenizer_config.json from the original model into the folder"
        ) from error
