"""Find a model's folder, which may be local or on the Hugging Face hub, and load the tokenizer in it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING

from llmquant.checkpoints.side_files import ADAPTER_PATTERNS, CODE_FILES, COPIED_FILES, NOT_COPIED_FILES
from llmquant.errors import UserError, one_line
from llmquant.paths import check_readable, parse_path
from llmquant.remote_code import failure_of_remote_code, read_object, remote_code_files, untrusted_code_error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Only safetensors weights and the side files that the output keeps are downloaded, so no file has to be unpickled. Code
# is downloaded only if it is trusted.
ALLOWED_PATTERNS = ["*.safetensors", *COPIED_FILES, *CODE_FILES]
# `*` matches slashes too, so these patterns match files in sub-folders. Sub-folders repeat the weights for other tools,
# but may hold chat templates.
_IN_SUB_FOLDERS = [f"*/{name}" for name in ALLOWED_PATTERNS if not name.endswith(".jinja")]
# The weights of an adapter are not downloaded, but its configuration is, because it names the base model.
IGNORED_PATTERNS = [
    *_IN_SUB_FOLDERS,
    *(name for name in NOT_COPIED_FILES if name not in ADAPTER_PATTERNS),
    "adapter_model*",
]
SMALL_VOCABULARY = 1000
"""Below this number of tokens, a vocabulary is checked for tokens other than special tokens."""
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve_model(model: str, trust_remote_code: bool = False) -> Path:
    """Return the folder of a model. A hub id is downloaded to the local cache first.

    model: a local folder, or an id on the Hugging Face hub. trust_remote_code: download Python files too. Raises
    UserError if `model` is neither.
    """
    path = parse_path(model)
    if path.is_dir():
        check_readable(path)
        return path
    if path.exists():
        raise UserError(f"{model}: is a file; give the folder that holds config.json and the .safetensors files")
    if model.startswith((".", "/", "~")) or not _REPOSITORY.fullmatch(model):
        raise UserError(f"{model}: no such folder; give a folder with config.json and .safetensors files, or a hub id")
    from huggingface_hub import snapshot_download

    ignored = IGNORED_PATTERNS if trust_remote_code else [*IGNORED_PATTERNS, *CODE_FILES]
    try:
        return Path(snapshot_download(model, allow_patterns=ALLOWED_PATTERNS, ignore_patterns=ignored))
    # Failures of network, authorization and cache come from several libraries without a common base class.
    except Exception as error:
        raise UserError(
            f"{model}: no such folder, and the Hugging Face hub cannot provide it ({one_line(error)}); "
            f"check the name and the network, and run `hf auth login` for a gated model"
        ) from error


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint folder.

    trust_remote_code: run Python code that comes with the tokenizer. Raises UserError if the tokenizer is missing or
    cannot be read, or if it needs code that is not trusted.
    """
    from transformers import AutoTokenizer

    if not trust_remote_code:
        _check_needs_no_code(folder)
    try:
        # Trusted code may be in another repository of the hub. Everything else is in the folder.
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=not trust_remote_code
        )
        tokenizer("A text that tests whether the tokenizer works.")
        # Without a vocabulary file, some classes of transformers create an empty tokenizer.
        is_small = len(tokenizer) < SMALL_VOCABULARY
        is_empty = is_small and tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens)
    # A missing or damaged file raises an OSError, a ValueError, or an error of the JSON or Rust parser.
    except Exception as error:
        if (line := failure_of_remote_code(error)) is not None:
            raise UserError(line) from error
        raise _unreadable(folder, f"{type(error).__name__}: {one_line(error)}") from error
    if is_empty:
        raise _unreadable(folder, "no file in the folder holds a vocabulary")
    return tokenizer


def _unreadable(folder: Path, reason: str) -> UserError:
    """Return the error for a tokenizer that cannot be loaded, because packages are missing or files are damaged."""
    if (folder / "tokenizer.json").is_file():
        vocabularies = []
    else:
        vocabularies = sorted([*folder.glob("*.model"), *folder.glob("*.tiktoken")])
    for file in vocabularies:
        missing = [package for module, package in _readers(file).items() if not _is_installed(module)]
        if missing:
            return UserError(f"{file}: reading this tokenizer needs a package; run `pip install {' '.join(missing)}`")
    if vocabularies and "tiktoken" in reason:  # transformers tries tiktoken last, for any file
        reason = f"{vocabularies[0].name} is damaged or not a vocabulary"
    return UserError(
        f"{folder}: its tokenizer cannot be loaded ({reason}); "
        f"copy tokenizer.json and tokenizer_config.json from the original model into the folder"
    )


def _check_needs_no_code(folder: Path) -> None:
    """Raise UserError if the tokenizer needs Python code that comes with it.

    Without that code, transformers would silently use a class that produces other tokens.
    """
    from transformers.models.auto import tokenization_auto as auto

    settings = read_object(folder / "tokenizer_config.json")
    files = remote_code_files(folder / "tokenizer_config.json", "AutoTokenizer")
    name, model_type = settings.get("tokenizer_class"), str(read_object(folder / "config.json").get("model_type"))
    # For some model families, transformers has its own class although the configuration names code.
    has_own_class = model_type in getattr(auto, "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS", ()) or (
        isinstance(name, str) and auto.tokenizer_class_from_name(name) is not None
    )
    if files and not has_own_class:
        raise untrusted_code_error(folder, "tokenizer", files)


def _readers(file: Path) -> dict[str, str]:
    """Return the modules that transformers needs to read a vocabulary file, with the packages that provide them.

    The result is empty if the kind of file is unknown.
    """
    try:
        with file.open("rb") as opened:
            start = opened.read(1024)
    except OSError:  # a folder, a broken link, or a file without read permission
        return {}
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", start):  # lines of base64 and a number
        return {"tiktoken": "tiktoken"}
    if start[:1] == b"\n":  # a protocol buffer that begins with its first field
        return {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
    return {}


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False
