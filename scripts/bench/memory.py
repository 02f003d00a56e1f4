#!/usr/bin/env python3
"""Measure the peak memory of a quantization for models of several sizes.

    .venv/bin/python scripts/bench/memory.py [--sizes 0.3 1 3 8] [--methods rtn gptq] [--plot rss.svg] [--folder FOLDER]
        [-- OPTIONS OF llmquant quantize]

The models are Llama models with random weights and blocks of one size; only the number of blocks differs. Each is
written shard by shard, quantized in a process of its own, and removed. The table compares the peak memory that the
system counted for that process (ru_maxrss) with the prediction of `--dry-run`. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from llmquant.checkpoints.writer import PartialCheckpoint

HIDDEN, INTERMEDIATE, HEADS, VOCABULARY = 1024, 2816, 16, 32000
BYTES_PER_WEIGHT = 2
BLOCK_WEIGHTS = 4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE
SHARD_BYTES = 500 * 10**6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.3, 1, 3, 8], help="sizes of the models in GB")
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq"])
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--plot", type=Path, help="draw the figure to this .svg or .png file")
    parser.add_argument("--folder", type=Path, help="folder for the models; it needs twice the size of the largest")
    parser.add_argument("others", nargs="*", help="after --: further options of llmquant quantize")
    options = parser.parse_args()
    rows = []
    for size in options.sizes:
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            folder = Path(name)
            free, needed = shutil.disk_usage(folder).free, 2.2e9 * size
            if free < needed:
                sys.exit(f"{folder}: {free / 1e9:.0f} GB are free, {needed / 1e9:.0f} GB are needed; use --folder")
            make_model(folder / "model", size * 1e9)
            for method in options.methods:
                rows.append({"size_gb": size, "method": method} | measure_quantization(folder, method, options))
                print(row(rows[-1]), flush=True)
    if options.plot:
        plot(rows, options.plot)
    print(json.dumps({"date": str(date.today()), "block_weights": BLOCK_WEIGHTS, "rows": rows}))


def make_model(folder: Path, num_bytes: float) -> None:
    """Write a Llama model of about that size block by block, with a tokenizer of one token per ASCII character."""
    embedding = VOCABULARY * HIDDEN
    layers = max(round((num_bytes / BYTES_PER_WEIGHT - 2 * embedding) / BLOCK_WEIGHTS), 1)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        vocab_size=VOCABULARY,
        dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"],
    )
    generator = torch.Generator().manual_seed(0)

    def random_linear(out_features: int, in_features: int) -> torch.Tensor:
        weight = torch.empty(out_features, in_features, dtype=torch.bfloat16)
        return weight.normal_(std=in_features**-0.5, generator=generator)

    shapes = {f"self_attn.{letter}_proj": (HIDDEN, HIDDEN) for letter in "qkvo"}
    shapes |= {"mlp.gate_proj": (INTERMEDIATE, HIDDEN), "mlp.up_proj": (INTERMEDIATE, HIDDEN)}
    shapes["mlp.down_proj"] = (HIDDEN, INTERMEDIATE)
    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    outside = {
        "model.embed_tokens.weight": random_linear(VOCABULARY, HIDDEN),
        "model.norm.weight": ones,
        "lm_head.weight": random_linear(VOCABULARY, HIDDEN),
    }
    with PartialCheckpoint.open(folder, {}) as partial:
        partial.add_part("outside", outside)
        for index in range(layers):
            prefix = f"model.layers.{index}"
            block = {f"{prefix}.{name}.weight": random_linear(*shape) for name, shape in shapes.items()}
            norms = {f"{prefix}.{name}.weight": ones for name in ("input_layernorm", "post_attention_layernorm")}
            partial.add_part(f"block-{index:05}", block | norms)
        parts = ["outside", *(f"block-{index:05}" for index in range(layers))]
        partial.finish(parts, {"config.json": config.to_json_string().encode()}, max_shard_bytes=SHARD_BYTES)
    vocabulary = {"<unk>": 0} | {chr(code): code for code in range(1, 128)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


def measure_quantization(folder: Path, method: str, options: argparse.Namespace) -> dict[str, float]:
    """Predict the peak in one process and quantize in another; return the prediction and the measurements."""
    text = folder / "text.txt"
    text.write_text("Pack my box with five dozen liquor jugs. " * 2000)
    command = [sys.executable, "-m", "llmquant", "quantize", str(folder / "model"), str(folder / "out")]
    command += ["--method", method, "--json", "--quiet", "--group-size", "128", "--calibration", str(text)]
    command += ["--samples", str(options.samples), "--seq-len", str(options.seq_len), *options.others]
    one_core = os.environ | {"OMP_NUM_THREADS": "1"}
    predicted = json.loads(
        subprocess.run([*command, "--dry-run"], check=True, capture_output=True, env=one_core).stdout
    )
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=one_core)
    assert process.stdout is not None
    report = json.loads(process.stdout.read() or "{}")
    _, status, used = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        sys.exit(f"failed: {' '.join(command)}")
    shutil.rmtree(folder / "out")
    return {
        "model_bytes": predicted["original_bytes"],
        "blocks": predicted["num_blocks"],
        "peak_bytes": used.ru_maxrss * 1024,
        "predicted_bytes": predicted["peak_bytes"],
        "output_bytes": report["output_bytes"],
        "cpu_seconds": used.ru_utime + used.ru_stime,
    }


def row(result: dict[str, float]) -> str:
    """Return one line of the table."""
    peak, predicted = result["peak_bytes"], result["predicted_bytes"]
    return (
        f"{result['method']:9} {result['model_bytes'] / 1e9:5.2f} GB {result['blocks']:4} blocks  "
        f"peak {peak / 2**20:5.0f} MiB  predicted {predicted / 2**20:5.0f} MiB ({predicted / peak - 1:+.0%})  "
        f"{result['cpu_seconds']:.0f} CPU s"
    )


def plot(rows: list[dict[str, float]], file: Path) -> None:
    """Draw peak memory over model size, with a measured and a predicted line for each method."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for method in dict.fromkeys(row["method"] for row in rows):
        points = [row for row in rows if row["method"] == method]
        sizes = [row["model_bytes"] / 1e9 for row in points]
        (line,) = axes.plot(sizes, [row["peak_bytes"] / 2**30 for row in points], "o-", label=f"{method}, measured")
        predicted = [row["predicted_bytes"] / 2**30 for row in points]
        axes.plot(sizes, predicted, ":", color=line.get_color(), label=f"{method}, predicted")
    largest = max(row["model_bytes"] for row in rows)
    axes.plot([0, largest / 1e9], [0, largest / 2**30], color="lightgrey", label="the model itself")
    axes.set(xlabel="size of the model on disk (GB)", ylabel="peak memory of the process (GiB)", ylim=(0, 4))
    axes.legend()
    figure.savefig(file, bbox_inches="tight")


if __name__ == "__main__":
    main()
