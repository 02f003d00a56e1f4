"""What a section of gpu_check receives: the sizes of its problems, folders, the log, and the time that is left.

The log is a file of JSON lines. Every line has `at` (seconds since the start of the script), `section`, and `what` (the
kind of the result); the other keys belong to the kind. In sections that measure times, it also has `beside`: the names
of the sections of the background that ran at that moment. Several processes append to the log, each line in one write.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

LOG_FILE, CONSOLE_FILE, SUMMARY_FILE = "log.jsonl", "sections.log", "summary.txt"
"""Files in the folder of the results: every result, all that the sections printed, and the tables that come last."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of all problems, for a GPU or for a rehearsal on a CPU."""

    hidden_size: int
    """Hidden size of the random Llama model."""
    intermediate_size: int
    """Size of its feed-forward layers."""
    num_heads: int
    """Attention heads of its blocks."""
    num_kv_heads: int
    """Key-value heads of its blocks."""
    num_blocks: int
    """Decoder blocks of the larger of the two checkpoints; the smaller one has one block."""
    vocab_size: int
    """Largest number of tokens of its tokenizer, and the rows of its embedding."""
    context: int
    """Longest sequence of the model."""
    group_size: int
    """Group size of the quantized model."""
    num_samples: int
    """Calibration samples of the larger checkpoint."""
    num_few_samples: int
    """Calibration samples of the checkpoint with one block."""
    seq_len: int
    """Tokens of a calibration sample."""
    new_tokens: int
    """Tokens that are decoded for a measurement."""
    shapes: tuple[tuple[int, int], ...]
    """(in_features, out_features) of the linears that are timed."""
    first_shape: tuple[int, int]
    """(in_features, out_features) of the first correctness check."""
    rows: tuple[int, ...]
    """Rows of x of the timed linears and of the first check, few first."""
    product_size: int
    """Rows, columns and depth of the square products whose rate is measured."""
    factor_size: int
    """Size of the matrix whose Cholesky factor is timed."""


REHEARSAL_PATIENCE = 3
"""Factor of all time limits in a rehearsal, since a CPU may be slow."""

GPU_SIZES = Sizes(
    hidden_size=4096, intermediate_size=14336, num_heads=32, num_kv_heads=8, num_blocks=4, vocab_size=32768,
    context=4096, group_size=128, num_samples=128, num_few_samples=32, seq_len=512, new_tokens=32,
    shapes=((4096, 4096), (4096, 14336), (14336, 4096), (8192, 28672), (4096, 1024)), first_shape=(4096, 4096),
    rows=(1, 16, 64, 256, 1024), product_size=8192, factor_size=4096,
)  # fmt: skip
"""Blocks and linears of a model with eight billion parameters, and the largest linear of one with seventy."""

REHEARSAL_SIZES = Sizes(
    hidden_size=64, intermediate_size=128, num_heads=4, num_kv_heads=2, num_blocks=2, vocab_size=512, context=512,
    group_size=32, num_samples=8, num_few_samples=8, seq_len=64, new_tokens=3, shapes=((128, 64), (128, 128)),
    first_shape=(128, 64), rows=(1, 16), product_size=64, factor_size=64,
)  # fmt: skip
"""Sizes with which every section ends within seconds on a CPU."""


class Log:
    """Appends the results of one section to the log, each at once."""

    def __init__(self, file: Path, section: str, began: float, beside: Callable[[], list[str]] | None = None) -> None:
        """began: `time.time()` at the start of the script. beside: returns the sections of the background that run now,
        which every line then names.
        """
        self.began, self.num_findings = began, 0
        self._file, self._section, self._beside = file, section, beside

    def write(self, what: str, **values: Any) -> dict[str, Any]:
        """Append one line to the log, print it, and return it."""
        line = {"at": round(time.time() - self.began, 2), "section": self._section, "what": what} | values
        line |= {"beside": self._beside()} if self._beside is not None else {}
        text = json.dumps(line, default=str)
        descriptor = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, text.encode() + b"\n")
        finally:
            os.close(descriptor)
        print(text, flush=True)
        return line

    def finding(self, text: str) -> None:
        """Append a problem of the checked code, a sentence or less."""
        self.num_findings += 1
        self.write("finding", text=text)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of the log in a folder. A line that is damaged or that a killed process did not finish is left
    out.
    """
    file = folder / LOG_FILE
    lines = []
    for text in file.read_text(errors="replace").splitlines() if file.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and {"at", "section", "what"} <= line.keys():
            lines.append(line)
    return lines


@dataclass(frozen=True, kw_only=True)
class Run:
    """The arguments of a section."""

    out: Path
    """Folder of the results."""
    scratch: Path
    """Folder of everything that is not kept: checkpoints and caches."""
    rehearse: bool
    """Whether this is a rehearsal on a CPU."""
    ends: float
    """`time.time()` at which the section is ended."""
    log: Log
    """The log of the section."""
    share: str = "0/1"
    """Part of the work for one of several equal processes: "number/count"."""
    gemlite: bool = False
    """Whether gemlite is timed too."""

    @property
    def sizes(self) -> Sizes:
        """The sizes of all problems."""
        return REHEARSAL_SIZES if self.rehearse else GPU_SIZES

    @property
    def device(self) -> torch.device:
        """The device of the measurements."""
        import torch

        return torch.device("cpu") if self.rehearse else torch.device("cuda", torch.cuda.current_device())

    @property
    def patience(self) -> int:
        """Factor of all time limits."""
        return REHEARSAL_PATIENCE if self.rehearse else 1

    @property
    def seconds_left(self) -> float:
        """Seconds until the section is ended."""
        return self.ends - time.time()

    def synchronize(self) -> None:
        """Wait until the device has finished."""
        if not self.rehearse:
            import torch

            torch.cuda.synchronize(self.device)

    def results(self, what: str) -> list[dict[str, Any]]:
        """Return all lines of a kind that are in the log so far, of all sections."""
        return [line for line in read_log(self.out) if line["what"] == what]

    def attempt(self, what: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """Log the result of a measurement, and return it. An exception becomes a finding, and None is returned.

        Raises the exception again if the GPU is lost.
        """
        try:
            return self.log.write(what, **measure())
        except Exception as error:
            self.log.finding(f"{what}: {type(error).__name__}: {one_line(error)}")
            if device_is_lost(self.device):
                raise
            return None


def device_is_lost(device: torch.device) -> bool:
    """Return whether this process cannot use its GPU any more, as after an access outside of its memory."""
    import torch

    if device.type != "cuda":
        return False
    try:
        torch.zeros(1, device=device)
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        return False
    except RuntimeError:
        return True
    return False


def one_line(error: object, length: int = 300) -> str:
    """Return the text of an exception on one line, shortened in the middle."""
    text = " ".join(str(error).split())
    half = length // 2
    return text if len(text) <= length else f"{text[:half]} ... {text[-half:]}"


def seconds_of(run: Run, call: Callable[[], Any]) -> float:
    """Return the wall seconds of a call, with all work that it leaves to the device."""
    run.synchronize()
    start = time.perf_counter()
    call()
    run.synchronize()
    return time.perf_counter() - start
