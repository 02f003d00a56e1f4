"""The files beside the weights: which belong to the model and go into OUT, and which do not. The hub download asks for
the same files.

    kept     configuration, tokenizer, processor and chat templates (LOADED_FILES); the model's card, licence and notes
             (DOCUMENTS); the `.py` files that a configuration names, and those that these import
    written  what says how weights are stored (STORAGE_FILES): it is read, and OUT gets its own
    left     adapters and the state of a trainer (OTHER_JOBS), other formats' descriptions (OTHER_FORMATS), hidden
             files, other weights, and whatever is of no type above; sub-folders but for the named chat templates

A name that is left is not kept, whatever its type. Patterns are those of `fnmatch`.
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
from llmquant.paths import listed, printable


def _any_case(pattern: str) -> str:
    return "".join(f"[{letter.lower()}{letter.upper()}]" if letter.isalpha() else letter for letter in pattern)


TEMPLATE_FOLDER = "additional_chat_templates"
LOADED_FILES = (
    *("*.json", "*.jinja", f"{TEMPLATE_FOLDER}/*.jinja"),
    # The types of the vocabularies of transformers' tokenizers; Mistral's are called tokenizer.model.v3.
    *("*.model", "tokenizer.model*", "*.tiktoken", "*.spm", "*.bpe", "*.codes", "*.vocab", "*.tokenizer"),
    # Text is a vocabulary only under these names.
    *("*vocab*.txt", "*merges*.txt", "*tokens*.txt", "*dict*.txt"),
)
DOCUMENTS = (
    *("*.txt", "README", "README.*", "README_*.*", "README-*.*"),
    *(_any_case(f"*{word}*") for word in ("licence", "license", "notice", "use_policy")),
    *(_any_case(word) for word in ("copying*", "readme.md", "model_card.md")),
)
KEPT_FILES = (*LOADED_FILES, *DOCUMENTS)
CODE_FILES = ("*.py",)
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack", "*.gguf", "*.onnx")

ADAPTER_FILES = ("adapter_*",)
OTHER_JOBS = (
    *ADAPTER_FILES,
    *("trainer_*", "training_args.*", "optimizer*", "scheduler*", "scaler*", "rng_state*", "random_states*"),
    *("all_results.json", "train_results.json", "eval_results.json", "test_results.json", "predict_results.json"),
)
OTHER_FORMATS = (
    *("*.bin.index*.json", "*.h5.index*.json", "*.msgpack.index*.json", "*.safetensors.index.*.json"),
    *("consolidated*", "params.json", "ndarray-cache*.json"),
)
HIDDEN = (".*",)
"""`._*`, which macOS leaves on other file systems, among them."""
NOT_THE_MODEL = (*OTHER_JOBS, *OTHER_FORMATS, *HIDDEN)

# Ours, and those of AutoGPTQ, AutoAWQ, AutoRound and ModelOpt.
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
    """The files beside the weights of one checkpoint folder, by their names in it."""

    kept: tuple[str, ...]
    """Those that belong to the model."""
    outward: dict[str, str]
    """Documents that are links out of the folder, or to nothing, with their targets; they are not followed."""
    left: tuple[str, ...]
    """What else the folder holds and a user may miss in OUT; sub-folders end in a slash. Weights, hidden files, the
    state of a trainer and descriptions of how weights are stored are not named."""

    @property
    def incidents(self) -> dict[str, str]:
        """What belongs to the model and is not copied into OUT: file name -> the reason, in one line."""
        return {
            name: f"not copied: a link to {target}, "
            + ("outside the checkpoint" if os.path.lexists(target) else "which does not exist")
            for name, target in self.outward.items()
        }

    @property
    def remark(self) -> str:
        """One line on what else is not copied; empty if there is nothing else."""
        return f"not copied: {listed(list(self.left))}" if self.left else ""


def find_side_files(folder: Path, check_link: Callable[[Path], None], ignored: Iterable[Path] = ()) -> SideFiles:
    """Sorts what a checkpoint folder holds beside its weights.

    check_link: raises UserError for a link that must not be followed (`CheckpointReader.check_link`). That is raised
    here for the files that loaders read. ignored: folders that are not named, because they are made by the run.
    """
    kept: list[str] = []
    left: list[str] = []
    outward: dict[str, str] = {}
    code = code_files(folder)
    for path in sorted([*folder.iterdir(), *(folder / TEMPLATE_FOLDER).glob("*")]):
        name = path.relative_to(folder).as_posix()
        if name == TEMPLATE_FOLDER or path in ignored or _matches(name, HIDDEN):
            continue
        if path.is_dir():
            left.append(f"{printable(name)}/")
        elif name != printable(name):
            # The manifest, which is UTF-8, could not name it.
            left.append(printable(name))
        elif name in code or _is_kept(name):
            try:
                check_link(path)
                (kept if path.is_file() else left).append(name)
            except UserError:
                if name in code or _matches(name, LOADED_FILES):
                    raise
                outward[name] = os.path.realpath(path)
        elif _matches(name, ADAPTER_FILES) or not _is_known(name):
            left.append(name)
    return SideFiles(tuple(kept), outward, tuple(left))


def is_weights(name: str) -> bool:
    """Whether a file of that name holds the weights of a model, of any framework."""
    return _matches(name, WEIGHT_FILES) and not _matches(name, (*OTHER_JOBS, *HIDDEN))


def code_files(folder: Path) -> set[str]:
    """The `.py` files that the configurations name in `auto_map`, and those that these import from the same folder."""
    found: set[str] = set()
    modules = [module for config in CODE_CONFIGS for module in _auto_map_modules(folder / config)]
    while modules:
        file = folder / f"{modules.pop()}.py"
        if file.name not in found and file.is_file():
            found.add(file.name)
            try:
                modules += _imported_modules(file.read_text(encoding="utf-8", errors="replace"))
            except OSError as error:
                raise UserError(f"{file}: cannot be read ({error.strerror}); check its permissions") from None
    return found


def _auto_map_modules(config: Path) -> list[str]:
    """The modules that a configuration names in `auto_map`: those in its own folder, without those of other
    repositories (`owner/name--module.Class`). A configuration that cannot be read names none."""
    try:
        auto_map = json.loads(config.read_bytes())["auto_map"]
        # A bare list is the old form, for tokenizers.
        values = [auto_map] if isinstance(auto_map, list) else auto_map.values()
        references = [each for value in values for each in (value if isinstance(value, list) else [value])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    local = [each for each in references if isinstance(each, str) and "--" not in each]
    return [module for each in local if (module := each.split(".")[0]).isidentifier()]


def _imported_modules(code: str) -> list[str]:
    """The modules of the same folder that a module imports, by `from .module import …` or `from . import module`."""
    found: list[str] = []
    for module, names in _RELATIVE_IMPORT.findall(code):
        found += [module] if module else re.findall(r"\w+", names)
    return found


def _is_kept(name: str) -> bool:
    if "/" in name:
        return fnmatchcase(name, f"{TEMPLATE_FOLDER}/*.jinja")
    return _matches(name, KEPT_FILES) and not _is_known(name) and not _matches(name, CODE_FILES)


def _is_known(name: str) -> bool:
    """Whether a file that is not kept is of a known use."""
    return _matches(name, (*WEIGHT_FILES, *STORAGE_FILES, *NOT_THE_MODEL))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
