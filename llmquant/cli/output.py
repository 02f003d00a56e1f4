"""Output shared by the commands: error lines and results, on the main process only."""

import json
import os
import sys
from collections.abc import Callable
from typing import Any


class Interrupted(Exception):
    """The interruption of a command by Ctrl-C, with a message for the user."""


def is_main_process() -> bool:
    """Return whether this process is rank 0 or the only process. Other ranks of torchrun print nothing."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def print_error(message: object) -> None:
    """Print one line on stderr."""
    if is_main_process():
        print(f"llmquant: {message}", file=sys.stderr)


def print_result(result: Any, print_table: Callable[[Any], None], *, as_json: bool) -> None:
    """Print a result on stdout, with `print_table` or as the JSON object of its `to_dict`."""
    if as_json:
        print(json.dumps(result.to_dict()))
    else:
        print_table(result)
