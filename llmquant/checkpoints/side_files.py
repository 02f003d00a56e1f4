"""Decide which files beside the weights are copied into OUT. A download from the hub uses the same lists.

    copied       configuration, tokenizer, processor and chat templates (LOADED_FILES); model card, licence and notes
                 (DOCUMENTS); the `.py` files that a configuration names, and the `.py` files that these import
    rewritten    descriptions of the stored weights (STORAGE_FILES); a run writes those that OUT needs
    not copied   adapters and trainer state (TRAINING_FILES), descriptions of other formats (OTHER_FORMATS), hidden
                 files, other weights, files of any other type, and sub-folders except for chat templates

A file that matches a "not copied" list is not copied, even if it also matches another list. Patterns are those of
`fnmatch`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from llmquant.errors import UserError
from llmquant.paths import join_names, printable


def _any_case(pattern: str) -> str:
    return "".join(f"[{letter.lower()}{letter.upper()}]" if letter.isalpha() else letter for letter in pattern)


TEMPLATE_FOLDER = "additional_chat_templates"
LOADED_FILES = (
    *("*.json", "*.jinja", f"{TEMPLATE_FOLDER}/*.jinja"),
    # Vocabulary files of transformers' tokenizers. Mistral's files are called tokenizer.model.v3.
    *("*.model", "tokenizer.model*", "*.tiktoken", "*.spm", "*.bpe", "*.codes", "*.vocab", "*.tokenizer"),
    # Text files are vocabularies only under these names.
    *("*vocab*.txt", "*merges*.txt", "*tokens*.txt", "*dict*.txt"),
)
DOCUMENTS = (
    *("*.txt", "README", "README.*", "README_*.*", "README-*.*"),
    *(_any_case(f"*{word}*") for word in ("licence", "license", "notice", "use_policy")),
    *(_any_case(word) for word in ("copying*", "readme.md", "model_card.md")),
)
COPIED_FILES = (*LOADED_FILES, *DOCUMENTS)
CODE_FILES = ("*.py",)
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack", "*.gguf", "*.onnx")

ADAPTER_PATTERNS = ("adapter_*",)
TRAINING_FILES = (
    *ADAPTER_PATTERNS,
    *("trainer_*", "training_args.*", "optimizer*", "scheduler*", "scaler*", "rng_state*", "random_states*"),
    *("all_results.json", "train_results.json", "eval_results.json", "test_results.json", "predict_results.json"),
)
OTHER_FORMATS = (
    *("*.bin.index*.json", "*.h5.index*.json", "*.msgpack.index*.json", "*.safetensors.index.*.json"),
    *("consolidated*", "params.json", "ndarray-cache*.json"),
)
HIDDEN = (".*",)
"""Hidden files, including `._*`, which macOS creates on foreign file systems."""
NOT_COPIED_FILES = (*TRAINING_FILES, *OTHER_FORMATS, *HIDDEN)

# Files of llmquant, AutoGPTQ, AutoAWQ, AutoRound and ModelOpt.
STORAGE_FILES = (
    *("*.safetensors.index.json", "llmquant.json", "quantize_report.json", "report.html"),
    *("quantize_config.json", "quant_config.json", "quantization_config.json", "hf_quant_config.json"),
)

CODE_CONFIGS = (
    *("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"),
    "video_preprocessor_config.json",
)
"""Configurations whose `auto_map` may name code in the folder, as `module.Class`."""
_RELATIVE_IMPORT = re.compile(r"^[ \t]*from[ \t]+\.(\w*)[\w.]*[ \t]+import[ \t]+(\([^)]*\)|[^\n]*)", re.MULTILINE)


@dataclass(frozen=True)
class SideFiles:
    """The files beside the weights of a checkpoint folder, by name."""

    copied: tuple[str, ...]
    """Files that belong to the model and are copied into OUT."""
    outside_links: dict[str, str]
    """Documents that are links to a file outside the folder, or to no file: name -> target. They are not copied."""
    not_copied: tuple[str, ...]
    """Other files and sub-folders that a user may miss in OUT; names of sub-folders end in a slash. Weights, hidden
    files, trainer state and descriptions of the stored weights are not listed."""

    @property
    def fallbacks(self) -> dict[str, str]:
        """Files of the model that are not copied into OUT: name -> the reason, in one line."""
        return {
            name: f"not copied: a link to {target}, "
            + ("outside the checkpoint" if os.path.lexists(target) else "which does not exist")
            for name, target in self.outside_links.items()
        }

    @property
    def note(self) -> str:
        """One line that lists `not_copied`; empty if there are none."""
        return f"not copied: {join_names(list(self.not_copied))}" if self.not_copied else ""


def find_side_files(folder: Path, check_link: Callable[[Path], None], ignored: Iterable[Path] = ()) -> SideFiles:
    """Classify the files beside the weights of a checkpoint folder.

    check_link: raises UserError for a link that must not be followed (`CheckpointReader.check_link`). If
    loaders read the file, the error is passed on; a document is added to `outside_links` instead. ignored: folders that
    are not listed, because the run creates them.
    """
    copied: list[str] = []
    not_copied: list[str] = []
    outside_links: dict[str, str] = {}
    code = code_files(folder)
    for path in sorted([*folder.iterdir(), *(folder / TEMPLATE_FOLDER).glob("*")]):
        name = path.relative_to(folder).as_posix()
        if name == TEMPLATE_FOLDER or path in ignored or _matches(name, HIDDEN):
            continue
        if path.is_dir():
            not_copied.append(f"{printable(name)}/")
        elif name != printable(name):
            # The manifest is UTF-8 and cannot hold the name.
            not_copied.append(printable(name))
        elif name in code or _is_copied(name):
            try:
                check_link(path)
                (copied if path.is_file() else not_copied).append(name)
            except UserError:
                if name in code or _matches(name, LOADED_FILES):
                    raise
                outside_links[name] = os.path.realpath(path)
        elif _matches(name, ADAPTER_PATTERNS) or not _is_never_copied(name):
            not_copied.append(name)
    return SideFiles(tuple(copied), outside_links, tuple(not_copied))


def is_weights(name: str) -> bool:
    """Whether a file of this name holds model weights, of any framework."""
    return _matches(name, WEIGHT_FILES) and not _matches(name, (*TRAINING_FILES, *HIDDEN))


def code_files(folder: Path) -> set[str]:
    """Return the `.py` files that configurations name in `auto_map`, and the files of the folder that these import."""
    files: set[str] = set()
    modules = [module for config in CODE_CONFIGS for module in _auto_map_modules(folder / config)]
    while modules:
        file = folder / f"{modules.pop()}.py"
        if file.name not in files and file.is_file():
            files.add(file.name)
            try:
                modules += _imported_modules(file.read_text(encoding="utf-8", errors="replace"))
            except OSError as error:
                raise UserError(f"{file}: cannot be read ({error.strerror}); check its permissions") from None
    return files


def _auto_map_modules(config: Path) -> list[str]:
    """Return the modules that a configuration names in `auto_map`, without modules of other repositories
    (`owner/name--module.Class`). A configuration that cannot be read names none."""
    try:
        auto_map = json.loads(config.read_bytes())["auto_map"]
        # Old tokenizer configurations hold a list.
        values = [auto_map] if isinstance(auto_map, list) else auto_map.values()
        references = [each for value in values for each in (value if isinstance(value, list) else [value])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    local = [each for each in references if isinstance(each, str) and "--" not in each]
    return [module for each in local if (module := each.split(".")[0]).isidentifier()]


def _imported_modules(code: str) -> list[str]:
    """Return the modules of the same folder that code imports, by `from .module import …` or `from . import module`."""
    modules: list[str] = []
    for module, names in _RELATIVE_IMPORT.findall(code):
        modules += [module] if module else re.findall(r"\w+", names)
    return modules


def _is_copied(name: str) -> bool:
    if "/" in name:
        return fnmatchcase(name, f"{TEMPLATE_FOLDER}/*.jinja")
    return _matches(name, COPIED_FILES) and not _is_never_copied(name) and not _matches(name, CODE_FILES)


def _is_never_copied(name: str) -> bool:
    """Whether a name matches one of the lists of files that are not copied."""
    return _matches(name, (*WEIGHT_FILES, *STORAGE_FILES, *NOT_COPIED_FILES))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
