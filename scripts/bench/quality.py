#!/usr/bin/env python3
"""Measure the cost and the quality of recipes: CPU seconds, memory, size, KL divergence, top-1 agreement, perplexity.

    .venv/bin/python scripts/bench/quality.py MODEL --calibration TEXT --text TEXT [--only NAME …]
    .venv/bin/python scripts/bench/quality.py MODEL --calibration TEXT --text TEXT --steps --samples 16 --windows 4
    .venv/bin/python scripts/bench/quality.py MODEL --calibration TEXT --text TEXT --only --also "other tool=FOLDER"

Each row of the table is one call of `llmquant.quantize`, without verification, in a process of its own on one core. Its
CPU seconds and peak memory are those that the system counted for the process. All results are then compared with the
original model on the same windows. `--steps` removes one step at a time from the default recipe, or adds one. `--also`
measures checkpoints that exist already. The script prints a table and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from llmquant.spec import EFFORTS, Options, QuantSpec, Recipe

FAST, BEST = EFFORTS["fast"], EFFORTS["best"]
ASYM, SYM, ASYM_3 = {"symmetric": False}, {"symmetric": True}, {"symmetric": False, "bits": 3}
ROWS: dict[str, dict[str, Any]] = {
    "rtn 4-bit asym": {"method": "rtn", "spec": ASYM},
    "rtn 4-bit sym": {"method": "rtn", "spec": SYM},
    "rtn 3-bit asym": {"method": "rtn", "spec": ASYM_3},
    "fast 4-bit asym": {**FAST, "spec": ASYM},
    "fast 4-bit sym": {**FAST, "spec": SYM},
    "default 4-bit asym": {"spec": ASYM},
    "default 4-bit sym": {"spec": SYM},
    "default 4-bit sym gptq": {"spec": SYM, "format": "gptq"},
    "default 3-bit asym": {"spec": ASYM_3},
    "best 4-bit asym": {**BEST, "spec": ASYM},
    "best 4-bit sym": {**BEST, "spec": SYM},
    "best 3-bit asym": {**BEST, "spec": ASYM_3},
    "groups of 32 asym": {"spec": ASYM | {"group_size": 32}},
    "budget 4.3127 bits asym": {"spec": ASYM, "target_bpw": 4.3127},
    "budget 4.5 bits asym": {"spec": ASYM, "target_bpw": 4.5},
    "budget 4.6253 bits asym": {"spec": ASYM, "target_bpw": 4.6253},
    "awq 4-bit asym": {"method": "awq", "spec": ASYM},
    "awq+gptq 4-bit asym": {"method": "awq+gptq", "spec": ASYM},
}
"""Name of a row -> fields of its Recipe. `spec` holds fields of its QuantSpec, whose group size is --group-size by
default; `format` is the format of the checkpoint."""
STEPS: dict[str, dict[str, Any]] = {
    "default": {},
    "no input-error correction": {"correct_input_error": False},
    "no residual correction": {"correct_residual_error": False},
    "neither correction": {"correct_input_error": False, "correct_residual_error": False},
    "columns in their own order": {"activation_order": False},
    "range by plain error": {"range_search": "mse"},
    "range of the extremes": {"range_search": "minmax"},
    "damping 0.01": {"damping": 0.01},
    "no cross-row compensation": {"output_hessian": "none"},
    "cross-row by the whole model": {"output_hessian": "network"},
    "descent and refitted scales": {"descent_sweeps": 4, "refit_scales": True},
    "AWQ before": {"method": "awq+gptq"},
    "AWQ instead": {"method": "awq"},
    "rtn": {"method": "rtn"},
}
"""Name of a row -> the fields in which it differs from the default recipe; all with asymmetric grids."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", required=True, help="text file or preset")
    parser.add_argument("--text", required=True, help="text file to evaluate on")
    parser.add_argument("--join", default="text", help="--join of llmquant eval: how rows of the text are joined")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--only", nargs="*", choices=[*ROWS], help="run only these rows")
    parser.add_argument("--steps", action="store_true", help="run the default recipe with one step changed at a time")
    parser.add_argument("--also", nargs="*", default=[], metavar="NAME=FOLDER", help="measure finished checkpoints too")
    parser.add_argument("--folder", type=Path, help="folder for the checkpoints, which are removed at the end")
    parser.add_argument("--one-row", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_row:
        quantize_row(options, *options.one_row)
        return
    rows = {name: {"spec": ASYM} | row for name, row in STEPS.items()} if options.steps else ROWS
    names = [*rows] if options.only is None or options.steps else options.only
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folders = {}
        for name in names:
            folders[name] = str(Path(scratch) / name.replace(" ", "-"))
            results[name] = measure_row(folders[name], rows[name])
            print(f"{name}: {results[name]['cpu_seconds']:.0f} CPU s", file=sys.stderr, flush=True)
        folders |= {name: other for name, _, other in (entry.partition("=") for entry in options.also)}
        for name, measured in zip(folders, evaluate(options, list(folders.values())), strict=True):
            results[name] = results.get(name, {}) | measured
            print(table_row(name, results[name]))
    print(f"\n{platform.processor() or platform.machine()}, one core, {date.today()}")
    print(json.dumps({"machine": platform.platform(), "date": str(date.today()), "results": results}))


def quantize_row(options: argparse.Namespace, out: str, row: str) -> None:
    """Quantize with one row (as JSON) and print the report; runs in a process of its own."""
    from llmquant import quantize
    from llmquant.console.progress import quiet_libraries

    quiet_libraries()
    fields = {"format": "compressed-tensors"} | json.loads(row)
    spec = QuantSpec(**{"group_size": options.group_size} | fields.pop("spec"))
    run = Options(
        format=fields.pop("format"),
        calibration=options.calibration,
        num_samples=options.samples,
        seq_len=512,
        verify=False,
    )
    print(json.dumps(quantize(options.model, out, Recipe(spec=spec, **fields), run).to_dict()))


def measure_row(out: str, row: dict[str, Any]) -> dict[str, float]:
    """Quantize with one row in a process of its own; return its costs and figures of its report."""
    command = [sys.executable, *sys.argv, "--one-row", out, json.dumps(row)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        sys.exit(f"failed: {' '.join(command)}")
    report = json.loads(output)
    worst = max(linear["error"] / linear["rtn_error"] for linear in report["linears"] if linear["rtn_error"] > 0)
    return {
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_mib": used.ru_maxrss / 1024,
        "bits_per_weight": report["bits_per_weight"],
        "megabytes": report["output_bytes"] / 1e6,
        "worst_layer_against_rtn": worst,
        "fallbacks": len(report["fallbacks"]),
    }


def evaluate(options: argparse.Namespace, folders: list[str]) -> list[dict[str, float]]:
    """Compare all checkpoints with the original model on the same windows."""
    command = [sys.executable, "-m", "llmquant", "eval", *folders, "--against", str(options.model)]
    command += ["--dataset", options.text, "--join", options.join, "--windows", str(options.windows)]
    command += ["--seq-len", str(options.seq_len), "--json", "--quiet"]
    measured = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return [
        {
            "kl": model["divergence"]["kl_mean"],
            "top1": model["divergence"]["top1_agreement"],
            "perplexity": model["perplexity"]["perplexity"],
            "original_perplexity": measured["against"]["perplexity"]["perplexity"],
        }
        for model in measured["models"]
    ]


def table_row(name: str, result: dict[str, float]) -> str:
    """Return one line of the table."""
    text = (
        f"{name:28} KL {result['kl']:.4f}  top-1 {result['top1']:.1%}  ppl {result['perplexity']:.2f} "
        f"({result['original_perplexity']:.2f})"
    )
    if "cpu_seconds" not in result:
        return text
    return text + (
        f"  {result['bits_per_weight']:.3f} bits  {result['megabytes']:.1f} MB  {result['cpu_seconds']:.0f} CPU s  "
        f"{result['peak_mib']:.0f} MiB  worst/RTN {result['worst_layer_against_rtn']:.3f}"
    )


if __name__ == "__main__":
    main()
