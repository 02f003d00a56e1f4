"""Decoding with CUDA graphs: whether it gives the tokens and logits of eager decoding, and the time of a step.

The goals are those of a model with eight billion parameters: a step of the quantized model is 2.5 times as fast as one
of the bfloat16 model, which transformers computes in a CUDA graph too, and it reads its weights at 60 % of the copy
bandwidth. The checkpoint here has fewer blocks, so the time of a block is measured, and the step of 32 blocks computed.

Letters: S sequences, L tokens so far with padding, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpu.rates import measured_limits
from gpu.runs import Run, seconds_of

EXPECTED_KERNELS = ("add_rms_norm", "attend", "rms_norm", "rotate", "silu_product", "store")
"""The fused kernels that decoding a Llama model uses."""
GOAL_SPEED_UP, GOAL_BANDWIDTH_SHARE = 2.5, 0.6
"""Goals of a decode step of one sequence: times the bfloat16 model, and the part of the copy bandwidth."""
GOAL_BLOCKS = 32
"""Decoder blocks of the model that the goals are for."""
MAX_LOGITS_ERROR = 0.03
"""Largest relative error of the first step's logits, in the Frobenius norm: about three times that of rounding, by
estimate."""
MAX_TIE = 0.1
"""Largest difference of two logits, in standard deviations of all, at which rounding may exchange their tokens."""
REPLAYS = 50
"""Replays of a graph for one measurement."""


@dataclass(frozen=True)
class Prompts:
    """Random prompts with padding on the left."""

    tokens_SL: Tensor
    mask_SL: Tensor
    """0 for padding, 1 elsewhere, as int64."""

    @property
    def positions_SL(self) -> Tensor:
        """Positions without padding, int64."""
        return (self.mask_SL.cumsum(dim=1) - 1).clamp(min=0)


def random_prompts(run: Run, vocab_size: int, lengths: tuple[int, ...]) -> Prompts:
    """Return one prompt of each of these lengths."""
    generator = torch.Generator().manual_seed(len(lengths))
    tokens_SL = torch.randint(2, vocab_size, (len(lengths), max(lengths)), generator=generator)
    mask_SL = torch.stack([(torch.arange(max(lengths)) >= max(lengths) - length).long() for length in lengths])
    return Prompts((tokens_SL * mask_SL).to(run.device), mask_SL.to(run.device))


@torch.inference_mode()
def check_graph(run: Run, name: str, model: Any, lengths: tuple[int, ...]) -> dict[str, Any]:
    """Decode prompts of these lengths with a graph and without one, and return how the results differ.

    Wrong tokens or logits, and a fused kernel that is refused or missing, are findings.
    """
    from llmquant.runtime.decode_graph import CUDA_GRAPH, graphs_of, release_graphs

    prompts, new_tokens = random_prompts(run, model.config.vocab_size, lengths), run.sizes.new_tokens
    where = f"decode {name}, prompts of {lengths}"
    with_graph, without = (generate(model, prompts, new_tokens, cuda_graph=on) for on in (True, False))
    values: dict[str, Any] = {"model": name, "lengths": lengths, "decoding": with_graph.decoding}
    values["kernels"] = with_graph.fused
    if with_graph.decoding != CUDA_GRAPH:
        run.log.finding(f"{where}: decoded by {with_graph.decoding:.200}")
        return values
    if not run.rehearse:
        for problem in kernel_problems(with_graph.fused):
            run.log.finding(f"{where}: {problem}")
    (graph,) = graphs_of(model).graphs.values()
    values["logits_error"] = error = first_step_error(model, graph, prompts)
    release_graphs(model)
    if not error <= MAX_LOGITS_ERROR:
        run.log.finding(f"{where}: the logits of the first step differ by {error:.2e}")
    differences = token_differences(model, with_graph.tokens_SL, without.tokens_SL, prompts)
    values["first_different_tokens"] = differences
    for difference in differences:
        if not difference["logits_apart"] <= MAX_TIE:
            run.log.finding(f"{where}: another token than without a graph, {difference}")
    return values


def generate(model: Any, prompts: Prompts, new_tokens: int, *, cuda_graph: bool) -> Any:
    """Return the `TimedRun` of a greedy generation of exactly this many tokens."""
    from llmquant.runtime.generate import SamplingParams, run_timed, settings_of

    settings = settings_of(model, SamplingParams(max_new_tokens=new_tokens, greedy=True))
    settings.min_new_tokens, settings.pad_token_id = new_tokens, 0
    return run_timed(model, prompts.tokens_SL, prompts.mask_SL, settings, cuda_graph=cuda_graph)


def kernel_problems(fused: tuple[str, ...]) -> list[str]:
    """Return a line for each fused kernel that was refused or is missing. fused: the names of `TimedRun.fused`."""
    refused = [text for text in fused if text.startswith("-")]
    named = {text.lstrip("-").split(":")[0] for text in fused}
    problems = [f"fused kernel refused: {text[1:]:.250}" for text in refused]
    missing = [] if "all" in named else [name for name in EXPECTED_KERNELS if name not in named]
    return problems + [f"fused kernel {name} is not used" for name in missing]


def first_step_error(model: Any, graph: Any, prompts: Prompts) -> float:
    """Return the relative error of a graph's logits for the token after the prompts, against the model's own."""
    output = model(
        input_ids=prompts.tokens_SL, attention_mask=prompts.mask_SL, position_ids=prompts.positions_SL, use_cache=True
    )
    token_S = output.logits[:, -1].argmax(dim=-1)
    position_S1 = prompts.positions_SL[:, -1:] + 1
    graph.start(output.past_key_values, prompts.mask_SL, position_S1)
    result_SV = graph.step(token_S).clone()
    mask_SL = torch.cat([prompts.mask_SL, torch.ones_like(position_S1)], dim=1)
    truth_SV = model(
        input_ids=token_S[:, None], attention_mask=mask_SL, position_ids=position_S1,
        past_key_values=output.past_key_values,
    ).logits[:, -1].float()  # fmt: skip
    return ((result_SV - truth_SV).norm() / truth_SV.norm()).item()


def token_differences(model: Any, ours_SL: Tensor, theirs_SL: Tensor, prompts: Prompts) -> list[dict[str, Any]]:
    """Return the first different token of each sequence, and how far apart the logits of both are in one pass over the
    text before it.
    """
    differences = []
    length = prompts.tokens_SL.shape[1]
    for sequence in range(len(ours_SL)):
        places = (ours_SL[sequence] != theirs_SL[sequence]).nonzero()
        if not len(places):
            continue
        place = int(places[0])
        padding = length - int(prompts.mask_SL[sequence].sum())
        logits_V = model(input_ids=theirs_SL[sequence : sequence + 1, padding:place]).logits[0, -1].float()
        pair = int(ours_SL[sequence, place]), int(theirs_SL[sequence, place])
        apart = (logits_V[pair[0]] - logits_V[pair[1]]).abs() / logits_V.std()
        differences.append(
            {"sequence": sequence, "new_token": place - length, "tokens": pair, "logits_apart": round(apart.item(), 4)}
        )
    return differences


@torch.inference_mode()
def time_graph(run: Run, name: str, model: Any) -> dict[str, Any]:
    """Return the milliseconds of a decode step of one sequence as a CUDA graph, with and without the fused kernels, and
    the part of the copy bandwidth at which the step reads the weights.
    """
    bandwidth, _ = measured_limits(run)
    blocks, num_bytes = model.config.num_hidden_layers, step_bytes(model)
    result: dict[str, Any] = {"model": name, "blocks": blocks, "step_bytes": num_bytes}
    for key in ("fused", "unfused"):
        with fused_kernels(enabled=key == "fused"):
            values = step_milliseconds(run, model)
            if "ms_per_step" in values and blocks > 1:
                with fewer_blocks(model, 1):
                    one_block = step_milliseconds(run, model)
                if "ms_per_step" in one_block:
                    a_block = (values["ms_per_step"] - one_block["ms_per_step"]) / (blocks - 1)
                    values["ms_per_block"] = round(a_block, 5)
                    values["ms_of_goal"] = round(values["ms_per_step"] + (GOAL_BLOCKS - blocks) * a_block, 4)
        if "ms_per_step" in values:
            values["bandwidth_share"] = round(num_bytes / (1e-3 * values["ms_per_step"]) / bandwidth, 3)
        result |= {f"{key} {what}": value for what, value in values.items()}
    return result


def step_milliseconds(run: Run, model: Any) -> dict[str, Any]:
    """Capture a decode step of one sequence after a prompt. Return the milliseconds of a replay, and how it decodes."""
    from llmquant.runtime.decode_graph import graphs_of, release_graphs

    release_graphs(model)
    prompts = random_prompts(run, model.config.vocab_size, (64 if run.rehearse else 512,))
    length, count = prompts.tokens_SL.shape[1], 2 if run.rehearse else REPLAYS
    timed = generate(model, prompts, run.sizes.new_tokens, cuda_graph=True)
    values: dict[str, Any] = {"decoding": timed.decoding, "kernels": timed.fused}
    values["capture_seconds"] = round(timed.capture_seconds, 3)
    for graph in list(graphs_of(model).graphs.values()):

        def replay_often(graph: Any = graph) -> None:
            graph.length.fill_(length)
            graph.position_S1.fill_(length)
            for _ in range(count):
                graph.replay()

        values["ms_per_step"] = round(1e3 * min(seconds_of(run, replay_often) for _ in range(3)) / count, 4)
    release_graphs(model)
    return values


def step_bytes(model: Any) -> int:
    """Return the bytes of the weights that a decode step reads: all but the input embedding, each tensor once."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    skipped = {id(embedding)} if head is not None and getattr(head, "weight", None) is not embedding else set()
    tensors = [*model.parameters(), *model.buffers()]
    sizes = {(each.data_ptr(), each.nbytes): each.nbytes for each in tensors if id(each) not in skipped}
    return sum(sizes.values())


@contextmanager
def fused_kernels(*, enabled: bool) -> Iterator[None]:
    """Capture decode steps with or without the fused kernels for the duration of a `with` block."""
    from llmquant.runtime import fused_step

    devices = set(fused_step.FUSED_DEVICES)
    if not enabled:
        fused_step.FUSED_DEVICES.clear()
    try:
        yield
    finally:
        fused_step.FUSED_DEVICES.update(devices)


@contextmanager
def fewer_blocks(model: Any, count: int) -> Iterator[None]:
    """Let a Llama model compute its first blocks only for the duration of a `with` block."""
    blocks = model.config.num_hidden_layers
    model.config.num_hidden_layers = count
    try:
        yield
    finally:
        model.config.num_hidden_layers = blocks


def log_goal(run: Run, quantized: dict[str, Any] | None, dense: dict[str, Any] | None) -> None:
    """Log how the step of the quantized model compares with that of the bfloat16 model, and with the goals."""
    if quantized is None or dense is None:
        return
    ours, theirs = quantized.get("fused ms_per_step"), dense.get("unfused ms_per_step")
    if ours is None or theirs is None:
        run.log.finding("decode: a model has no CUDA graph, so the speed-up is unknown")
        return
    values = {"ms_per_step": ours, "dense_ms_per_step": theirs, "speed_up": round(theirs / ours, 3)}
    values |= {"bandwidth_share": quantized["fused bandwidth_share"], "blocks": quantized["blocks"]}
    if (fused := dense.get("fused ms_per_step")) is not None:
        values["speed_up_over_fused_dense"] = round(fused / ours, 3)
    whole = quantized.get("fused ms_of_goal"), dense.get("unfused ms_of_goal")
    if whole[0] and whole[1]:
        values["goal_blocks"] = {"blocks": GOAL_BLOCKS, "ms": whole[0], "speed_up": round(whole[1] / whole[0], 3)}
    reached = [values["speed_up"] >= GOAL_SPEED_UP, values["bandwidth_share"] >= GOAL_BANDWIDTH_SHARE]
    goals = {"speed_up": GOAL_SPEED_UP, "bandwidth_share": GOAL_BANDWIDTH_SHARE}
    run.log.write("decode goal", **values, goals=goals, reached=reached)
