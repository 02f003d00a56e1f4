"""The same short quantization of a tiny model as a command line and as options of `quantize`."""

from __future__ import annotations

from pathlib import Path

from llmquant.spec import Options

SHORT = {"num_samples": 4, "seq_len": 32, "verify": False}


def short_run(text: Path, **changes: object) -> Options:
    """Options for 4 samples of 32 tokens of a text file, without verification; `changes` replaces or adds fields."""
    return Options(**{"calibration": str(text)} | SHORT | changes)


def short_command(model: Path, out: object, text: Path) -> list[object]:
    """Return the command that does what `quantize` does with `short_run(text)` and a group size of 32."""
    options = ["--samples=4", "--seq-len=32", "--group-size=32", "--no-verify", "--quiet"]
    return ["quantize", model, out, "--calibration", text, *options]
