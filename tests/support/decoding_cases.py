"""Decoding with a stand-in for the CUDA graph, for the tests of graphs and of fused steps.

There is no CUDA graph on a CPU. The stand-in for the capture keeps the step itself, and its replay calls it again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tiny_models import EOS

from llmquant.runtime.generate import SamplingParams, TimedRun, run_timed, settings_of


def call_again(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Stand in for `capture_cuda_graph`: warm up, then let a replay call the step."""
    step()
    return step


def run(
    model: Any,
    lengths: tuple[int, ...] = (9,),
    new: int = 12,
    *,
    cuda_graph: bool = True,
    streamer: Any = None,
    **changes: Any,
) -> TimedRun:
    """Generate from random prompts of these lengths, which are padded on the left, and seed the sampling."""
    generator = torch.Generator().manual_seed(sum(lengths))
    longest = max(lengths)
    tokens_SL = torch.randint(2, 500, (len(lengths), longest), generator=generator)
    mask_SL = torch.ones_like(tokens_SL)
    for row, length in enumerate(lengths):
        mask_SL[row, : longest - length] = 0
    settings = settings_of(model, SamplingParams(max_new_tokens=new, greedy=True))
    settings.pad_token_id = EOS
    for name, value in changes.items():
        setattr(settings, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return run_timed(model, tokens_SL, mask_SL, settings, streamer, cuda_graph=cuda_graph)


def assert_same_tokens(model: Any, *arguments: Any, **changes: Any) -> TimedRun:
    replayed = run(model, *arguments, **changes)
    assert replayed.decoding == "cuda graph"
    expected = run(model, *arguments, **changes, cuda_graph=False)
    assert expected.decoding == "eager: CUDA graphs are switched off"
    assert torch.equal(replayed.tokens_SL, expected.tokens_SL)
    return replayed
