#!/usr/bin/env python3
"""Print the hashes of small quantized checkpoints, to check that two versions of the code write the same bytes.

    .venv/bin/python scripts/dev/artifact_hashes.py MODEL OUT_FOLDER [--code CHECKOUT]

The script quantizes MODEL with each recipe in RECIPES through the command line, with one thread, and writes each
checkpoint into a folder of OUT_FOLDER. For each checkpoint, it prints one SHA-256 over its *.safetensors files, in the
order of their names, and its config.json. The hashes of two versions can be compared if both ran on the same machine
with the same packages. --code runs the llmquant of another checkout. The script exits with 1 if a recipe fails;
OUT_FOLDER/<recipe>.log is its log.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMON_OPTIONS = ["--calibration=python-docs", "--samples=4", "--seq-len=64", "--group-size=64", "--no-verify"]
COMMON_OPTIONS += ["--overwrite", "--quiet"]
RECIPES = {
    "gptq": [],
    "awq": ["--method=awq", "--asym", "--format=awq"],
    "awq+gptq": ["--method=awq+gptq"],
    "budget": ["--target-bpw=4.5"],
    "best": ["--effort=best", "--asym"],
    "override": ["--method=rtn", "--format=compressed-tensors", "--override=model.layers.*.down_proj:bits=8"],
}
"""Name -> options of `llmquant quantize`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path, metavar="OUT_FOLDER")
    parser.add_argument("--code", type=Path, default=ROOT, help="checkout whose llmquant runs; default: this one")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    failed = False
    for name, recipe in RECIPES.items():
        folder = options.out.resolve() / name
        if quantize(options.model.resolve(), folder, recipe, options.code.resolve()) == 0:
            print(f"{name:9} {artifact_hash(folder)}", flush=True)
        else:
            failed = True
            print(f"{name:9} failed, see {folder}.log", flush=True)
    sys.exit(failed)


def quantize(model: Path, out: Path, recipe: list[str], code: Path) -> int:
    """Run `llmquant quantize` of a checkout and return its exit code."""
    command = [sys.executable, "-m", "llmquant", "quantize", str(model), str(out), *COMMON_OPTIONS, *recipe]
    environment = os.environ | {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
    # Python looks for modules in the working folder first, so that must not be a checkout.
    with Path(f"{out}.log").open("w") as log:
        done = subprocess.run(command, env=environment, cwd="/", stdout=log, stderr=subprocess.STDOUT, check=False)
    return done.returncode


def artifact_hash(folder: Path) -> str:
    """Return the SHA-256 of the weights and the configuration of a checkpoint, as one stream of bytes."""
    digest = hashlib.sha256()
    for file in [*sorted(folder.glob("*.safetensors")), folder / "config.json"]:
        with file.open("rb") as stream:
            while piece := stream.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


if __name__ == "__main__":
    main()
