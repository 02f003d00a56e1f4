#!/usr/bin/env python3
"""Time a quantized linear against a dense bfloat16 one on this processor, for several numbers of rows of x.

    .venv/bin/python scripts/bench/linear.py [--threads 1] [--group-size 64] [--backend auto]

The two run alternately on random data and rotate over so many weights that none stays in a cache. Medians are compared.
With one thread, the script measures the CPU time of the thread, which other work on the machine disturbs less. It
prints a table and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time

import torch

from llmquant.kernels.dispatch import BACKENDS
from llmquant.runtime.linear import QuantizedLinear
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

WORKING_SET = 128 << 20
"""Bytes of the dense weights to rotate over: more than a last-level cache holds."""


def random_weight(out_features: int, in_features: int, spec: QuantSpec) -> QuantizedWeight:
    """Return random codes with random scales and the middle code as zero-point."""
    num_groups = spec.num_groups(in_features)
    return QuantizedWeight(
        codes_NK=torch.randint(0, 2**spec.bits, (out_features, in_features), dtype=torch.uint8),
        scale_NG=(torch.rand(out_features, num_groups) * 0.02 + 0.005).bfloat16(),
        zero_NG=torch.full((out_features, num_groups), spec.mid_code, dtype=torch.uint8),
        spec=spec,
    )


def median_microseconds(quantized: list, dense: list, x_MK: torch.Tensor, seconds: float) -> tuple[float, float]:
    """Return the median time of a call of each. The calls alternate, so that both see the same load of the machine."""
    times: tuple[list[float], list[float]] = [], []
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    stop = clock() + seconds
    turn = 0
    while clock() < stop or turn < 5:
        for calls, run in zip(times, (quantized[turn % len(quantized)], dense[turn % len(dense)]), strict=True):
            start = clock()
            run(x_MK)
            calls.append(clock() - start)
        turn += 1
    return statistics.median(times[0]) * 1e6, statistics.median(times[1]) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", default="576x1536,1536x576,4096x4096", help="in_features x out_features, comma-separated"
    )
    parser.add_argument("--rows", default="1,2,4,8,16,32,64,128,512", help="rows of x, comma-separated")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--backend", default="auto", help=f"auto, {', '.join(BACKENDS)}")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds of measuring per row of the table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    spec = QuantSpec(bits=options.bits, group_size=options.group_size)
    records = []
    print(f"{'KxN':>12} {'rows':>5} {'quantized us':>13} {'dense bf16 us':>14} {'speed-up':>9}")
    for shape in options.shapes.split(","):
        in_features, out_features = map(int, shape.split("x"))
        copies = max(2, WORKING_SET // (2 * in_features * out_features))
        quantized = [
            QuantizedLinear(
                random_weight(out_features, in_features, spec),
                None,
                dtype=torch.bfloat16,
                device="cpu",
                backend=options.backend,
            )
            for _ in range(copies)
        ]
        dense = [torch.nn.Linear(in_features, out_features, bias=False, dtype=torch.bfloat16) for _ in range(copies)]
        bytes_per_weight = sum(tensor.nbytes for tensor in quantized[0].prepared) / in_features / out_features
        for rows in map(int, options.rows.split(",")):
            x_MK = torch.randn(rows, in_features).bfloat16()
            with torch.inference_mode():
                ours, theirs = median_microseconds(quantized, dense, x_MK, options.seconds)
            print(f"{shape:>12} {rows:>5} {ours:>13.1f} {theirs:>14.1f} {theirs / ours:>8.2f}x", flush=True)
            records.append({"shape": shape, "rows": rows, "us": round(ours, 1), "dense_us": round(theirs, 1)})
        print(f"{shape:>12} backend {quantized[0].backend_name}, {bytes_per_weight:.2f} bytes per weight")
    print(
        json.dumps(
            {
                "benchmark": "linear",
                "spec": spec.describe(),
                "threads": options.threads,
                "torch": torch.__version__,
                "capability": torch.backends.cpu.get_cpu_capability(),
                "machine": platform.machine(),
                "results": records,
            }
        )
    )


if __name__ == "__main__":
    main()
