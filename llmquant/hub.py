"""Which folder a model's name means, a local one or a repository of the Hugging Face hub, and the tokenizer in it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING

from llmquant.checkpoints.side_files import ADAPTER_FILES, CODE_FILES, KEPT_FILES, NOT_THE_MODEL
from llmquant.errors import UserError, first_words
from llmquant.paths import check_readable, typed_path
from llmquant.remote_code import failure_of_remote_code, named_code, read_object, untrusted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Weights as safetensors and what OUT keeps beside them: nothing that has to be unpickled. Code is fetched only where it
# is trusted.
WANTED_FILES = ["*.safetensors", *KEPT_FILES, *CODE_FILES]
# `*` takes slashes too. Sub-folders repeat the weights for other tools; chat templates may lie in one.
_IN_SUB_FOLDERS = [f"*/{name}" for name in WANTED_FILES if not name.endswith(".jinja")]
# An adapter's own weights are left, but its configuration says which model it belongs to.
UNWANTED_FILES = [*_IN_SUB_FOLDERS, *(name for name in NOT_THE_MODEL if name not in ADAPTER_FILES), "adapter_model*"]
FEW_TOKENS = 1000
"""A smaller vocabulary is looked at, whether it holds anything but special tokens."""
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve_model(model: str, trust_remote_code: bool = False) -> Path:
    """The local folder of `model`: itself if it is a folder, else the hub's files under that id.

    trust_remote_code: fetch the Python files too. Raises UserError when `model` is neither.
    """
    path = typed_path(model)
    if path.is_dir():
        check_readable(path)
        return path
    if path.exists():
        raise UserError(f"{model}: is a file; give the folder that holds config.json and the .safetensors files")
    if model.startswith((".", "/", "~")) or not _REPOSITORY.fullmatch(model):
        raise UserError(f"{model}: no such folder; give a folder with config.json and .safetensors files, or a hub id")
    from huggingface_hub import snapshot_download

    unwanted = UNWANTED_FILES if trust_remote_code else [*UNWANTED_FILES, *CODE_FILES]
    try:
        return Path(snapshot_download(model, allow_patterns=WANTED_FILES, ignore_patterns=unwanted))
    # Network, authorization and cache failures come from several libraries without a common base; told in the message.
    except Exception as error:
        raise UserError(
            f"{model}: no such folder, and the Hugging Face hub does not give it ({first_words(error)}); "
            f"check the name, the network, and for a gated model `hf auth login`"
        ) from error


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder.

    trust_remote_code: run the tokenizer's own code, if it has some. Raises UserError if the tokenizer is missing,
    cannot be read, or is code that is not trusted.
    """
    from transformers import AutoTokenizer

    if not trust_remote_code:
        _check_needs_no_code(folder)
    try:
        # Trusted code may lie in another repository of the hub; everything else is in the folder.
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=not trust_remote_code
        )
        tokenizer("A text, to see whether it can be read.")
        # transformers makes an empty tokenizer of some families' classes where there is no vocabulary.
        is_small = len(tokenizer) < FEW_TOKENS
        is_empty = is_small and tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens)
    # A missing or damaged file shows as an OSError, ValueError, JSON or Rust error, by where it is noticed.
    except Exception as error:
        if (line := failure_of_remote_code(error)) is not None:
            raise UserError(line) from error
        raise _unreadable(folder, f"{type(error).__name__}: {first_words(error)}") from error
    if is_empty:
        raise _unreadable(folder, "no file holds a vocabulary that it could read")
    return tokenizer


def _unreadable(folder: Path, reason: str) -> UserError:
    """The error for a tokenizer that cannot be loaded: packages are missing, or files."""
    if (folder / "tokenizer.json").is_file():
        vocabularies = []
    else:
        vocabularies = sorted([*folder.glob("*.model"), *folder.glob("*.tiktoken")])
    for file in vocabularies:
        missing = [package for module, package in _readers(file).items() if not _is_installed(module)]
        if missing:
            return UserError(f"{file}: reading this tokenizer needs a package; run `pip install {' '.join(missing)}`")
    if vocabularies and "tiktoken" in reason:  # transformers' last attempt, whatever the file is
        reason = f"{vocabularies[0].name} is damaged, or is no vocabulary"
    return UserError(
        f"{folder}: its tokenizer cannot be loaded ({reason}); "
        f"copy tokenizer.json and tokenizer_config.json from the original model into the folder"
    )


def _check_needs_no_code(folder: Path) -> None:
    """UserError if the tokenizer is code of its own. Without the code, transformers would take a class that makes other
    tokens, and say nothing."""
    from transformers.models.auto import tokenization_auto as auto

    settings = read_object(folder / "tokenizer_config.json")
    files = named_code(folder / "tokenizer_config.json", "AutoTokenizer")
    name, model_type = settings.get("tokenizer_class"), str(read_object(folder / "config.json").get("model_type"))
    # transformers has a class for some families whose configuration still names code.
    has_own_class = model_type in getattr(auto, "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS", ()) or (
        isinstance(name, str) and auto.tokenizer_class_from_name(name) is not None
    )
    if files and not has_own_class:
        raise untrusted(folder, "tokenizer", files)


def _readers(file: Path) -> dict[str, str]:
    """The packages, by module, with which transformers reads a vocabulary; none if the file is of another kind."""
    try:
        with file.open("rb") as opened:
            start = opened.read(1024)
    except OSError:  # a folder, a link that leads nowhere, or not to be read
        return {}
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", start):  # lines of base64 and a number
        return {"tiktoken": "tiktoken"}
    if start[:1] == b"\n":  # a protocol buffer that begins with its first field
        return {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
    return {}


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it is missing
        return False
