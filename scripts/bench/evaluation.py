#!/usr/bin/env python3
"""Measure the speed of llmquant's perplexity against a plain loop over transformers, in tokens per second.

    .venv/bin/python scripts/bench/evaluation.py MODEL --text TEXT [--windows 4] [--seq-len 2048] [--dtype bfloat16]
        [--device cpu] [--repeats 3]

Both run the same model on the same windows and should give the same perplexity. The plain loop calls
`model(input_ids=window, labels=window).loss`, which keeps the logits of a whole window in memory. The two run
alternately, and the best round of each counts. The script prints a table and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Callable
from datetime import date
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmquant.eval.data import token_windows
from llmquant.eval.perplexity import perplexity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="text file to evaluate on")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    windows_WL = token_windows(tokenizer, options.text.read_text(), options.seq_len, options.windows)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    model = model.eval().to(options.device)
    loops: dict[str, Callable[[], float]] = {
        "llmquant": lambda: perplexity(model, windows_WL).perplexity,
        "plain loop": lambda: plain_perplexity(model, windows_WL),
    }
    best = dict.fromkeys(loops, math.inf)
    perplexities: dict[str, float] = {}
    for _ in range(options.repeats):
        for name, loop in loops.items():
            start = perf_counter()
            perplexities[name] = loop()
            best[name] = min(best[name], perf_counter() - start)
    results = {
        name: {"tokens_per_second": windows_WL.numel() / best[name], "perplexity": perplexities[name]} for name in loops
    }
    for name, result in results.items():
        print(f"{name:12} {result['tokens_per_second']:10.0f} tokens/s   perplexity {result['perplexity']:.4f}")
    machine = torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.processor()
    print(json.dumps({"machine": machine or platform.machine(), "date": str(date.today()), "results": results}))


@torch.inference_mode()
def plain_perplexity(model: torch.nn.Module, windows_WL: Tensor) -> float:
    """Return the perplexity from the loss that transformers computes for each window."""
    device = next(model.parameters()).device
    losses = [model(input_ids=w_L[None].to(device), labels=w_L[None].to(device)).loss.item() for w_L in windows_WL]
    return math.exp(sum(losses) / len(losses))


if __name__ == "__main__":
    main()
