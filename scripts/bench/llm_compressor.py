#!/usr/bin/env python3
"""Quantize a model with llm-compressor on the calibration tokens that llmquant uses, as a baseline.

    PYTHON scripts/bench/llm_compressor.py MODEL OUT --calibration TEXT [--samples 64] [--seq-len 512]
        [--group-size 64] [--bits 4] [--sym]

The script uses the strongest GPTQ recipe of llm-compressor that we found: static activation order and the imatrix_mse
observer. PYTHON is the interpreter of an environment that has `llmcompressor` (0.14 when this was written); llmquant
need not be installed there. `scripts/bench/quality.py --also NAME=OUT` measures the result. The last line gives CPU
seconds and peak memory.
"""

from __future__ import annotations

import argparse
import resource
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--sym", action="store_true")
    options = parser.parse_args()

    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from llmquant.data.calibration import calibration_tokens

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokens = calibration_tokens(tokenizer, options.calibration, options.samples, options.seq_len).tokens_SL.tolist()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    weights = {
        "num_bits": options.bits,
        "type": "int",
        "symmetric": options.sym,
        "strategy": "group",
        "group_size": options.group_size,
        "actorder": "static",
        "observer": "imatrix_mse",
    }
    oneshot(
        model=model,
        recipe=GPTQModifier(config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"]),
        dataset=Dataset.from_dict({"input_ids": tokens, "attention_mask": [[1] * options.seq_len] * len(tokens)}),
        num_calibration_samples=options.samples,
        max_seq_length=options.seq_len,
    )
    model.save_pretrained(options.out, save_compressed=True)
    tokenizer.save_pretrained(options.out)
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(f"{used.ru_utime + used.ru_stime:.0f} CPU s, {used.ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
