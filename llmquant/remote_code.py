"""Python code that comes with a checkpoint: which files a configuration names, and errors about that code.

The `auto_map` of a configuration names the code for each transformers class that would run it. config.json names it for
AutoConfig and AutoModelForCausalLM, tokenizer_config.json for AutoTokenizer. A value is `module.Class`, or
`owner/name--module.Class` for a module in another repository of the hub. AutoTokenizer has a list of two values, for
the slow and the fast tokenizer; either may be null.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from llmquant.errors import UserError, one_line

REMOTE_PACKAGE = "transformers_modules"
"""The package into which transformers imports the code of checkpoints."""
CALL_ERRORS = (TypeError, ValueError, AttributeError, NotImplementedError)
"""Errors that a call raises if its arguments or its result do not fit the function."""


def read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or an empty one if the file is missing or does not hold an object."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def remote_code_files(config_file: Path, auto_class: str) -> list[str]:
    """Return the Python files that a configuration names for a transformers class, as text for a message.

    An entry is `tokenization_x.py`, or `modeling_x.py of owner/name` for another repository. The list is empty if the
    configuration names no file or cannot be read.
    """
    auto_map = read_object(config_file).get("auto_map")
    if isinstance(auto_map, dict):
        auto_map = auto_map.get(auto_class)
    elif auto_class != "AutoTokenizer":
        return []  # a bare list is the old format, which only tokenizers used
    references = auto_map if isinstance(auto_map, list) else [auto_map]
    files: dict[str, None] = {}
    for reference in references:
        if isinstance(reference, str):
            repository, dashes, name = reference.rpartition("--")
            file = f"{name.rpartition('.')[0] or name}.py"
            files[f"{file} of {repository}" if dashes else file] = None
    return list(files)


def untrusted_code_error(folder: Path, component: str, files: list[str]) -> UserError:
    """Return the error for a checkpoint that needs code which the user has not trusted.

    component: "configuration", "model" or "tokenizer". files: the result of `remote_code_files`.
    """
    return UserError(
        f"{folder}: its {component} needs code that comes with it ({', '.join(files)}); read it, then add "
        "--trust-remote-code"
    )


def failure_of_remote_code(error: BaseException) -> str | None:
    """Describe an error in one line if a checkpoint's own code caused it, else return None.

    The cause is the innermost stack frame that belongs to a checkpoint or to this library.
    """
    frames = [frame for frame in _frames(error.__traceback__) if _package(frame) in (REMOTE_PACKAGE, "llmquant")]
    if not frames or _package(frames[-1]) != REMOTE_PACKAGE:
        return None
    cause = frames[-1]
    return f"{Path(cause.tb_frame.f_code.co_filename).name}, line {cause.tb_lineno}: {_describe(error)}"


def failure_to_call_remote_code(error: BaseException) -> str | None:
    """Describe an error in one line if torch or transformers failed to call a checkpoint's own code, else return None.

    Every error of `CALL_ERRORS` from torch or transformers counts as such a failure if the process has run such code.
    """
    has_run = any(name.startswith(f"{REMOTE_PACKAGE}.") for name in sys.modules)
    innermost = list(_frames(error.__traceback__))[-1]
    if has_run and isinstance(error, CALL_ERRORS) and _package(innermost) in ("torch", "transformers"):
        return _describe(error)
    return None


def _describe(error: BaseException) -> str:
    version = getattr(sys.modules.get("transformers"), "__version__", "unknown")
    return (
        f"the checkpoint's own code failed ({type(error).__name__}: {one_line(error)}); it may be written for "
        f"another version of transformers than {version}"
    )


def _frames(traceback: TracebackType | None) -> Iterator[TracebackType]:
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next


def _package(frame: TracebackType) -> str:
    """Return the name of the top-level package in which a stack frame runs."""
    return str(frame.tb_frame.f_globals.get("__name__")).split(".")[0]
