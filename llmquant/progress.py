"""The state of a long operation, which `on_progress` callbacks receive."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum


class Phase(Enum):
    """A phase of an operation. Its value is the name that is printed."""

    CALIBRATION_TEXT = "calibration text"
    HASHING = "hashing the checkpoint"
    SENSITIVITY = "sensitivity"
    GRADIENTS = "gradients"
    BLOCKS = "blocks"
    READING_BACK = "reading back"
    FINISHING = "finishing"
    VERIFYING = "verifying"
    SAMPLE_TEXTS = "sample texts"
    CHECKING = "checking"
    CONVERTING = "converting"
    LOADING = "loading"
    WINDOWS = "windows"
    RUNNING = "running"


@dataclass(frozen=True)
class Progress:
    """The state of an operation at one moment."""

    phase: Phase
    done: int
    """Finished items: decoder blocks of a quantization, linears of a conversion, windows of an evaluation."""
    total: int
    """All items."""
    detail: str = ""
    """The current step within the item, for example the names of the linears being quantized; empty if unchanged."""
    error: float | None = None
    """Relative output error of the linears quantized last; None if it has not changed."""


OnProgress = Callable[[Progress], None]
"""Function that is called as an operation advances."""


def ignore_progress(progress: Progress) -> None:
    """Do nothing: the default of every `on_progress` argument."""
