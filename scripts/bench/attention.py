#!/usr/bin/env python3
"""Time attention on this processor: llmquant's programs against torch's scaled_dot_product_attention.

    .venv/bin/python scripts/bench/attention.py [--threads 1] [--repeats 30]

"one" is a new token that attends to a cache; "causal" is a prompt. The shape is sequences x heads (heads of K and V) x
tokens x head dimension. The two run alternately, and the best time of each counts. The script prints a table and, last,
one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import torch
import torch.nn.functional as F

from llmquant.kernels import llvm_attention

ONE_TOKEN_SHAPES = ((1, 9, 3, 130, 64), (1, 32, 8, 2000, 128))
CAUSAL_SHAPES = ((1, 9, 3, 128, 64), (4, 9, 3, 512, 64), (1, 9, 3, 2048, 64), (1, 8, 8, 1024, 128))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    records = []
    print(f"{'':>8} {'shape':>24} {'dtype':>9} {'ours us':>9} {'torch us':>9} {'times':>6}")
    cases = [("one", shape, dtype) for shape in ONE_TOKEN_SHAPES for dtype in (torch.bfloat16, torch.float32)]
    cases += [("causal", shape, torch.bfloat16) for shape in CAUSAL_SHAPES]
    for kind, shape, dtype in cases:
        num_sequences, num_heads, num_groups, length, head_dim = shape
        q = torch.randn(num_sequences, 1 if kind == "one" else length, num_heads, head_dim).to(dtype).transpose(1, 2)
        k, v = (torch.randn(num_sequences, num_groups, length, head_dim).to(dtype) for _ in "kv")
        refuses = llvm_attention.refuses_one if kind == "one" else llvm_attention.refuses_causal
        if (why := refuses(q, k, v, None)) is not None:
            sys.exit(f"attention: {kind} {shape}: {why}")
        best = [float("inf"), float("inf")]
        for _ in range(options.repeats):
            with torch.inference_mode():
                start = time.perf_counter()
                if kind == "one":
                    llvm_attention.attend_one(q, k, v, None, head_dim**-0.5)
                else:
                    llvm_attention.attend_causal(q, k, v, head_dim**-0.5)
                middle = time.perf_counter()
                F.scaled_dot_product_attention(q, k, v, is_causal=kind == "causal", enable_gqa=True)
                stop = time.perf_counter()
            best = [min(best[0], middle - start), min(best[1], stop - middle)]
        ours, theirs = (round(seconds * 1e6, 1) for seconds in best)
        text = f"{num_sequences}x{num_heads}({num_groups})x{length}x{head_dim}"
        name = str(dtype).removeprefix("torch.")
        print(f"{kind:>8} {text:>24} {name:>9} {ours:>9} {theirs:>9} {theirs / ours:>5.1f}x", flush=True)
        records.append({"kind": kind, "shape": shape, "dtype": name, "us": ours, "torch_us": theirs})
    summary = {"benchmark": "attention", "threads": options.threads, "torch": torch.__version__}
    print(json.dumps(summary | {"results": records}))


if __name__ == "__main__":
    main()
