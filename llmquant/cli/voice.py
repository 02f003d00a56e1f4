"""What the commands say, and which process says it."""

import json
import os
import sys
from collections.abc import Callable
from typing import Any


class Interrupted(Exception):
    """Ctrl-C, with something to say about it."""


def speaks() -> bool:
    """Whether this is the process that tells what happens: of several ranks that torchrun started, the first."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def say(words: object) -> None:
    """One line on stderr."""
    if speaks():
        print(f"llmquant: {words}", file=sys.stderr)


def show(result: Any, for_people: Callable[[Any], None], *, as_json: bool) -> None:
    """What a command found, on stdout: by `for_people`, or what its `to_dict` gives as one JSON object."""
    if as_json:
        print(json.dumps(result.to_dict()))
    else:
        for_people(result)
