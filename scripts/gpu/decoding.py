"""Run the quantized model and its original: with and without CUDA graphs, and by bench, eval and generate."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from gpu.checkpoints import wait_for_checkpoints
from gpu.graphs import check_graph, fewer_blocks, log_goal, time_graph
from gpu.processes import llmquant_command, run_command
from gpu.profiling import events_of, kernel_table
from gpu.quantization import RECIPES, failure, quantize, quantized_folder
from gpu.runs import Run

BATCHES = (1, 8)
"""Numbers of sequences that are decoded together."""

BENCH_TOKENS = 128
"""New tokens of a run of `llmquant bench`. With few tokens, the time of the first ones would count too much."""

MAX_OVERHEAD = 1.2
"""Milliseconds of a token in `llmquant bench` over those of a replay, from which the CPU is said to limit the speed."""

TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 60
"""The text of the evaluation: repeated, since its perplexity only has to be finite."""


def section_decode(run: Run) -> None:
    """Check graph decoding, log the speed with graphs, and then what the commands report and the speed without."""
    large, _ = wait_for_checkpoints(run)
    if run.rehearse:
        from gpu.rehearsal import capture_on_cpu

        capture_on_cpu()
    if quantized_folder(run) is None:
        quantize(run, "rtn", large, *RECIPES["rtn"])
    if (quantized := quantized_folder(run)) is None:
        run.log.finding("decode: there is no quantized model to run")
        return
    models: dict[str, Any] = {}
    graphs: dict[str, dict[str, Any] | None] = {"quantized": None, "dense": None}
    for name, folder in (("quantized", quantized), ("dense", large)):
        if (model := load_model(run, name, folder)) is None:
            continue
        models[name] = model
        if name == "quantized":
            for lengths in ((12, 7), (9,)) if run.rehearse else ((600, 431), (33,)):
                run.attempt("decode checked", partial(check_graph, run, name, model, lengths))
        graphs[name] = run.attempt("decode graph", partial(time_graph, run, name, model))
    log_goal(run, graphs["quantized"], graphs["dense"])
    run_bench(run, quantized, large, graphs["quantized"] or {})
    for name, model in models.items():
        measure_model(run, name, model)
    run_commands(run, quantized, large)


def measure_model(run: Run, name: str, model: Any) -> None:
    """Log a model's prefill and decoding without graphs, with all blocks and with one; then profile a few steps."""
    prompt = 64 if run.rehearse else 512
    for batch in BATCHES:
        record = run.attempt("decode", partial(decode_rates, run, model, batch, prompt, name))
        if record is not None and batch == 1 and model.config.num_hidden_layers > 1:
            milliseconds = record["ms_per_token"]
            run.attempt("decode of a block", partial(block_milliseconds, run, name, model, milliseconds, prompt))
    if run.seconds_left > 10:
        run.attempt("decode profile", partial(profile_steps, run, name, model, prompt))


def load_model(run: Run, name: str, folder: Path) -> Any:
    """Return a model, loaded by llmquant if it is quantized, else by transformers; None if that fails."""
    began = time.perf_counter()
    try:
        if name == "quantized":
            import llmquant

            model = llmquant.load(folder, device=run.device.type)
            if run.rehearse:  # on a CPU, llmquant has an attention of its own, which no graph supports
                model.set_attn_implementation("sdpa")
        else:
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
            model.to(run.device)  # type: ignore[arg-type]
    except Exception as error:
        run.log.finding(f"load {name}: {type(error).__name__}: {error!s:.200}")
        return None
    run.synchronize()
    values: dict[str, Any] = {} if run.rehearse else {"device_bytes": torch.cuda.memory_allocated(run.device)}
    run.log.write("load", model=name, seconds=round(time.perf_counter() - began, 2), **values)
    return model


@torch.inference_mode()
def decode_rates(run: Run, model: Any, batch: int, prompt: int, name: str) -> dict[str, Any]:
    """Return milliseconds of the prefill of all prompts, and of a decoding step without CUDA graphs."""
    generator = torch.Generator().manual_seed(0)
    tokens_SL = torch.randint(0, model.config.vocab_size, (batch, prompt), generator=generator).to(run.device)
    prefill, step = [], 0.0
    for _ in range(2):  # the first is a warm-up
        run.synchronize()
        began = time.perf_counter()
        cache, token_S1 = _prefill(model, tokens_SL)
        run.synchronize()
        prefill.append(time.perf_counter() - began)
        for _ in range(2):
            token_S1 = _step(model, cache, token_S1)
        run.synchronize()
        began = time.perf_counter()
        for _ in range(run.sizes.new_tokens):
            token_S1 = _step(model, cache, token_S1)
        run.synchronize()
        step = (time.perf_counter() - began) / run.sizes.new_tokens
    return {
        "model": name,
        "batch": batch,
        "prompt": prompt,
        "blocks": model.config.num_hidden_layers,
        "prefill_ms": round(1e3 * prefill[-1], 3),
        "ms_per_token": round(1e3 * step, 3),
        "tokens_per_second": round(batch / step, 1),
    }


def _prefill(model: Any, tokens_SL: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """Return the cache and the next tokens [S, 1] after a prefill."""
    output = model(input_ids=tokens_SL, use_cache=True, logits_to_keep=1)
    return output.past_key_values, output.logits[:, -1:].argmax(dim=-1)


def _step(model: Any, cache: Any, token_S1: torch.Tensor) -> torch.Tensor:
    """Return the next tokens [S, 1] after a decoding step."""
    output = model(input_ids=token_S1, past_key_values=cache, use_cache=True)
    return output.logits[:, -1:].argmax(dim=-1)


def block_milliseconds(run: Run, name: str, model: Any, all_milliseconds: float, prompt: int) -> dict[str, Any]:
    """Return the milliseconds of a step per block: the difference between all blocks and one, over their number."""
    blocks = model.config.num_hidden_layers
    with fewer_blocks(model, 1):
        one = decode_rates(run, model, 1, prompt, name)["ms_per_token"]
    return {"model": name, "ms_one_block": one, "ms_per_block": round((all_milliseconds - one) / (blocks - 1), 4)}


@torch.inference_mode()
def profile_steps(run: Run, name: str, model: Any, prompt: int, steps: int = 4) -> dict[str, Any]:
    """Return the kernels of a few decoding steps of one sequence."""
    cache, token_S1 = _prefill(model, torch.ones(1, prompt, dtype=torch.int64, device=run.device))
    token_S1 = _step(model, cache, token_S1)
    activities = [ProfilerActivity.CPU] if run.rehearse else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            token_S1 = _step(model, cache, token_S1)
        run.synchronize()
    table = kernel_table(events_of(profiler), 15)
    return {"model": name, "steps": steps, "launches_per_step": table["launches"] / steps} | table


def run_bench(run: Run, quantized: Path, original: Path, graph: dict[str, Any]) -> None:
    """Log what `llmquant bench` reports for one sequence and for several. graph: the result of `time_graph`."""
    prompt, new_tokens = ("32", 4) if run.rehearse else ("512", BENCH_TOKENS)
    for batch in BATCHES[: 1 if run.rehearse else None]:
        arguments = ["--against", original, "--batch-size", batch, "--prompt-tokens", prompt]
        arguments += ["--new-tokens", new_tokens, "--device", run.device.type, "--json", "--quiet"]
        result = run_command(run, llmquant_command("bench", quantized, *arguments), 25)
        values: dict[str, Any] = {"batch": batch, "new_tokens": new_tokens, **result.describe()}
        if result.exit_code == 0:
            values["runs"] = json.loads(result.stdout)["runs"]
            for each in values["runs"]:
                if not run.rehearse and each["decoding"] != "cuda graph":
                    run.log.finding(f"bench, batch {batch}: {each['kernel']} decoded by {each['decoding']:.200}")
            step = graph.get("fused ms_per_step")
            if batch == 1 and step is not None:
                # A model of few blocks decodes faster than the CPU chooses tokens.
                milliseconds = 1e3 / values["runs"][0]["decode_tokens_per_second"]
                values |= {"ms_per_token": round(milliseconds, 4), "ms_per_replay": step}
                values["cpu_bound"] = milliseconds > MAX_OVERHEAD * step
        else:
            run.log.finding(f"bench, batch {batch}: {failure(result)}")
        run.log.write("bench", **values)


def run_commands(run: Run, quantized: Path, original: Path) -> None:
    """Log the results of `llmquant generate` with a short and a longer prompt, and of `llmquant eval`."""
    text = run.scratch / "text.txt"
    text.write_text(TEXT)
    device = ["--device", run.device.type]
    for prompt in (TEXT[:400],) if run.rehearse else ("Hello", TEXT[:400]):
        arguments = ["--prompt", prompt, "--greedy", "--max-new-tokens", run.sizes.new_tokens, "--json", *device]
        result = run_command(run, llmquant_command("generate", quantized, *arguments), 20)
        values: dict[str, Any] = {"prompt_characters": len(prompt), **result.describe()}
        if result.exit_code == 0:
            batch = json.loads(result.stdout)["batches"][0]
            values |= {key: value for key, value in batch.items() if key != "texts"} | {"text": batch["texts"][0][:80]}
        else:
            run.log.finding(f"generate: {failure(result)}")
        run.log.write("generate", **values)
    arguments = ["--against", original, "--dataset", text, "--seq-len", 64 if run.rehearse else 256, "--json", *device]
    result = run_command(run, llmquant_command("eval", quantized, *arguments), 20)
    values = result.describe()
    if result.exit_code == 0:
        values["result"] = json.loads(result.stdout)
    else:
        run.log.finding(f"eval: {failure(result)}")
    run.log.write("eval", **values)
