"""Quantize the random checkpoints with the command line, and log the seconds of each step and the peak memory."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from gpu.checkpoints import wait_for_checkpoints
from gpu.processes import CommandResult, llmquant_command, run_command
from gpu.runs import Run

RECIPES: dict[str, tuple[list[str], float]] = {
    "rtn": (["--method", "rtn"], 25),
    "default": ([], 100),
    "fast": (["--effort", "fast"], 50),
}
"""Name -> (options, seconds at most) of the runs on the larger checkpoint, in their order."""

BEST_FIRST = ("default", "fast", "rtn")
"""The same names, the best result first."""

SMALL_RECIPES: dict[str, tuple[list[str], float]] = {
    "best": (["--effort", "best"], 40),
    "target-bpw": (["--target-bpw", "4.2"], 25),
}
"""The same for the runs on the checkpoint with one block."""


def section_quantize(run: Run) -> None:
    """Quantize all blocks: rounded to nearest, with the default recipe, and with little effort."""
    large, _ = wait_for_checkpoints(run)
    for name, (options, seconds) in RECIPES.items():
        if run.rehearse and name == "fast":
            continue
        quantize(run, name, large, [*options, "--samples", str(run.sizes.num_samples)], seconds)


def section_best(run: Run) -> None:
    """Quantize one block with the greatest effort, and with a limit of bits per weight."""
    _, small = wait_for_checkpoints(run)
    for name, (options, seconds) in SMALL_RECIPES.items():
        quantize(run, name, small, [*options, "--samples", str(run.sizes.num_few_samples)], seconds)


def quantized_folder(run: Run) -> Path | None:
    """Return the folder of the best result of section `quantize`; None if there is none."""
    folders = [run.scratch / name for name in BEST_FIRST]
    return next((folder for folder in folders if (folder / "config.json").exists()), None)


def quantize(run: Run, name: str, checkpoint: Path, options: list[str], seconds: float) -> None:
    """Quantize a checkpoint into the scratch folder under this name, and log the result."""
    out = run.scratch / name
    for folder in (out, out.with_name(f"{name}.partial")):  # of an earlier run
        shutil.rmtree(folder, ignore_errors=True)
    grid = [] if "--target-bpw" in options else ["--group-size", str(run.sizes.group_size)]
    arguments = [*options, *grid, "--seq-len", str(run.sizes.seq_len)]
    arguments += ["--calibration", "python-docs", "--device", run.device.type, "--json"]
    result = run_command(run, llmquant_command("quantize", checkpoint, out, *arguments, every_block=True), seconds)
    values = result.describe() | {"block_seconds": block_seconds(result)}
    report = out / "quantize_report.json"
    # After a verification that found the result too bad, there is a report, and the exit code is not 0.
    has_report = result.exit_code == 0 or report.exists()
    if not has_report:
        values["last_progress"] = [line for _, line in result.lines][-1:]
        run.log.finding(f"quantize {name}: {failure(result)}")
    run.log.write("quantize", name=name, options=options, **values)
    if has_report:
        run.attempt("quantize report", lambda: {"name": name} | report_values(json.loads(report.read_text())))


def failure(result: CommandResult) -> str:
    """Return how a command failed, with its last line."""
    last = next((line for _, line in reversed(result.lines) if line.strip()), "")
    how = f"ended after {result.seconds:.0f} s" if result.exit_code is None else f"exit code {result.exit_code}"
    return f"{how}: {last:.200}"


def block_seconds(result: CommandResult) -> list[float]:
    """Return the seconds after the start of a run at which each block was finished."""
    return [seconds for seconds, line in result.lines if re.match(r"block \d+/\d+", line)]


def report_values(report: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of a quantization's report that are compared between machines."""
    verification = report["verification"]
    texts = verification.get("texts") or {}
    kl = {name: text.get("kl_mean") for name, text in texts.items()} if isinstance(texts, dict) else {}
    return {
        "steps": {step: round(seconds, 2) for step, seconds in report["seconds"].items()},
        "peak_device_bytes": report["peak_device_bytes"],
        "peak_bytes": report["peak_bytes"],
        "bits_per_weight": report["bits_per_weight"],
        "verdict": verification["verdict"],
        "reason": str(verification.get("reason", ""))[:200],
        "kl": kl,
        "errors": {one["name"]: [one["error"], one["rtn_error"]] for one in report["linears"][:7]},
        "fallbacks": [f"{one['where']}: {one['what']}"[:160] for one in report["fallbacks"][:5]],
        "hashes": {name: text[:12] for name, text in report["hashes"].items() if name.endswith(".safetensors")},
    }
