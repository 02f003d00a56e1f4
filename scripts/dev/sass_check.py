#!/usr/bin/env python
"""Compile the configurations that the Triton backends choose by rule, for every GPU generation; check the machine code.

The script needs no GPU. It prints a line per configuration and, last, one JSON line. It exits with 1 if a configuration
spills registers, does not use the matrix units, needs too much shared memory, or on Hopper exceeds its instruction
budget.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
from dataclasses import replace

import triton
from sass import compile_dequantize, compile_solver, compile_tiles, find_problems, instructions_per_weight

from llmquant.kernels.tiles import ROW_BUCKETS, Gpu, Problem, Tiles, batch_invariant_tiles, rule_of_thumb

PROCESSORS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 120: 170}
"""Streaming multiprocessors of the largest GPU of each generation, by compute capability."""

SHAPES = [(576, 640), (1536, 640), (1024, 4096), (4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192)]
"""(out_features, slots along K) of a small model, whose K is padded, and of models of 8 and 70 billion parameters."""


def configurations(capability: int) -> list[tuple[Tiles, int, str, bool, int]]:
    """Return what the rules choose: tiles, scales per tile, dtype, whether K is ragged, and number of planes."""
    gpu = Gpu("", PROCESSORS[capability], capability)
    chosen: dict[tuple[Tiles, int, str, bool, int], None] = {}
    for (features, slots), blocks, dtype in itertools.product(SHAPES, (1, 2, 4), ("bfloat16", "float16")):
        problem = Problem(features, slots, blocks, dtype)
        for tiles in [*(rule_of_thumb(problem, rows, gpu) for rows in ROW_BUCKETS), batch_invariant_tiles(problem)]:
            tiles = replace(tiles, split_k=min(tiles.split_k, 2))  # the program does not depend on the number of splits
            chosen[tiles, blocks, dtype, slots == 640, 1] = None
            if dtype == "bfloat16" and slots != 640:  # 8 bits; the other variants are compiled for 4 bits only
                chosen[tiles, blocks, dtype, False, 2] = None
    return list(chosen)


def print_line(problems: list[str], capability: int, dtype: str, blocks: int, description: str) -> bool:
    """Print the line of one configuration. Return whether there are problems."""
    verdict = "BAD" if problems else "ok "
    print(
        f"{verdict} sm_{capability} {dtype:8} group {128 // blocks:3} {description} {'; '.join(problems)}".rstrip(),
        flush=True,
    )
    return bool(problems)


def check_dense(capability: int, dtype: str, blocks: int, planes: int) -> bool:
    """Compile the kernel that writes the dense weight and print its line. Return whether there are problems."""
    code = compile_dequantize(capability, dtype=dtype, blocks_per_tile=blocks, planes=planes)
    problems = [f"{code.spills} register spills"] if code.spills else []
    return print_line(
        problems, capability, dtype, blocks, f"dense weight from {planes} planes: {code.registers:3} registers"
    )


def check_fused(capability: int, tiles: Tiles, blocks: int, dtype: str, ragged: bool, planes: int) -> bool:
    """Compile the fused kernel in this configuration and print its line. Return whether there are problems."""
    kind = "ragged" if ragged else "8 bits" if planes == 2 else "      "
    mode = f"{'post' if tiles.post else 'pre '} {'split' if tiles.split_k > 1 else '     '}"
    shape = f"rows {tiles.rows:3} features {tiles.features:3} warps {tiles.warps} stages {tiles.stages}"
    try:
        code = compile_tiles(tiles, capability, dtype=dtype, blocks_per_tile=blocks, ragged=ragged, planes=planes)
    except Exception as error:  # continue with the next configuration
        problems = [f"does not compile: {error!r:.200}"]
        return print_line(problems, capability, dtype, blocks, f"{kind} {mode} {shape}:")
    cost = f"{code.registers:3} registers {code.shared_bytes:6} bytes shared"
    description = f"{kind} {mode} {shape}: {cost} {instructions_per_weight(code, tiles):5.2f} instructions/weight"
    return print_line(find_problems(code, tiles, capability), capability, dtype, blocks, description)


def check_solver(capability: int) -> list[bool]:
    """Compile the kernels of the quantizer and print a line for each. Return whether each has problems."""
    results = []
    for name, code in compile_solver(capability).items():
        verdict = f"BAD {code.spills} register spills in" if code.spills else "ok "
        print(f"{verdict} sm_{capability} {name}: {code.registers} registers", flush=True)
        results.append(code.spills > 0)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, action="append", choices=PROCESSORS, help="default: all")
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for capability in options.capability or PROCESSORS:
            for dtype, blocks, planes in itertools.product(("bfloat16", "float16"), (1, 2, 4), (1, 2)):
                results.append(check_dense(capability, dtype, blocks, planes))
            results += [check_fused(capability, *configuration) for configuration in configurations(capability)]
            results += check_solver(capability)
    summary = {"check": "sass", "triton": triton.__version__, "configurations": len(results), "failed": sum(results)}
    print(json.dumps(summary))
    return 1 if any(results) else 0


if __name__ == "__main__":
    raise SystemExit(main())
