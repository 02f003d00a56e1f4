"""Python code that comes with a checkpoint: where it is named, and the refusal to run it.

Configurations name code in `auto_map`, by the class of transformers that would run it: config.json for AutoConfig and
AutoModelForCausalLM, tokenizer_config.json for AutoTokenizer. A value is `module.Class`, or `owner/name--module.Class`
for a module of another repository of the hub. Tokenizers have a list of two, slow and fast; either may be null.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from llmquant.errors import UserError, first_words

MODULES = "transformers_modules"
"""The package that transformers imports the code of checkpoints into."""
CALL_ERRORS = (TypeError, ValueError, AttributeError, NotImplementedError)
"""Errors of a call that does not fit the function, its arguments or its result."""


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one if the file is missing or holds something else."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def named_code(config_file: Path, auto_class: str) -> list[str]:
    """The Python files that a configuration names for a class of transformers, in words: `tokenization_x.py`, or
    `modeling_x.py of owner/name`. Empty if it names none or cannot be read."""
    auto_map = read_object(config_file).get("auto_map")
    if isinstance(auto_map, dict):
        auto_map = auto_map.get(auto_class)
    elif auto_class != "AutoTokenizer":
        return []  # a bare list is the old form, for tokenizers only
    references = auto_map if isinstance(auto_map, list) else [auto_map]
    files: dict[str, None] = {}
    for reference in references:
        if isinstance(reference, str):
            repository, dashes, name = reference.rpartition("--")
            file = f"{name.rpartition('.')[0] or name}.py"
            files[f"{file} of {repository}" if dashes else file] = None
    return list(files)


def untrusted(folder: Path, part: str, files: list[str]) -> UserError:
    """The refusal to run code. part: "configuration", "model" or "tokenizer". files: `named_code`."""
    return UserError(
        f"{folder}: its {part} needs code that comes with it ({', '.join(files)}); read it, then add "
        "--trust-remote-code"
    )


def failure_of_remote_code(error: BaseException) -> str | None:
    """One line on an error that a checkpoint's own code caused; None if the error is from anywhere else.

    The cause is the innermost function that is the checkpoint's or this library's.
    """
    own = [step for step in _steps(error.__traceback__) if _package(step) in (MODULES, "llmquant")]
    if not own or _package(own[-1]) != MODULES:
        return None
    return f"{Path(own[-1].tb_frame.f_code.co_filename).name}, line {own[-1].tb_lineno}: {_failed(error)}"


def failure_to_call_remote_code(error: BaseException) -> str | None:
    """One line on an error of torch or transformers in a process that has run a checkpoint's own code, if it is one of
    a call that does not fit; None for any other error."""
    has_run = any(name.startswith(f"{MODULES}.") for name in sys.modules)
    innermost = list(_steps(error.__traceback__))[-1]
    if has_run and isinstance(error, CALL_ERRORS) and _package(innermost) in ("torch", "transformers"):
        return _failed(error)
    return None


def _failed(error: BaseException) -> str:
    version = getattr(sys.modules.get("transformers"), "__version__", "unknown")
    return (
        f"the checkpoint's own code failed ({type(error).__name__}: {first_words(error)}); it may be written for "
        f"another version of transformers than {version}"
    )


def _steps(traceback: TracebackType | None) -> Iterator[TracebackType]:
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next


def _package(step: TracebackType) -> str:
    return str(step.tb_frame.f_globals.get("__name__")).split(".")[0]
