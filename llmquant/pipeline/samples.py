"""A few words from the quantized model and from the original, side by side: greedy, short, and only where it is cheap.

A model speaks only if it fits, whole, into what is left of the memory that the run was predicted to take anyway, or of
SMALL_BYTES; so nothing here raises the peak of a large model. What it says is cut off after MAX_SECONDS.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from llmquant.checkpoints.reader import CheckpointReader
from llmquant.errors import first_words
from llmquant.hub import load_tokenizer
from llmquant.memory import give_back
from llmquant.pipeline.footprint import footprint_of
from llmquant.pipeline.plan import Plan

PROMPTS = ("The capital of France is", "def is_prime(n):", "Once upon a time, in a village by the sea,")
MAX_NEW_TOKENS, MAX_SECONDS = 32, 10.0
SMALL_BYTES = 2**30
LOADED = 1.5
"""Memory of a model that speaks, in sizes of its checkpoint: weights, copies while they are laid out, activations."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One prompt, continued."""

    prompt: str
    quantized: str
    original: str | None
    """None where the original was left out."""


def samples(folder: Path, plan: Plan) -> tuple[tuple[Sample, ...], str]:
    """Continuations of PROMPTS by a finished folder and by its original; and what was left out, and why."""
    footprint = footprint_of(plan)
    most = footprint.limit_bytes or max(footprint.peak_bytes, SMALL_BYTES)
    left = most - psutil.Process().memory_info().rss
    if LOADED * CheckpointReader(folder).total_bytes > left:
        return (), "no samples: the quantized model, whole, would take more memory than quantizing it"
    try:
        ours = _continuations(folder, plan)
        if LOADED * plan.reader.total_bytes > left:
            note = "without the original, which, whole, would take more memory than quantizing it"
            return tuple(Sample(prompt=p, quantized=q, original=None) for p, q in zip(PROMPTS, ours, strict=True)), note
        theirs = _continuations(plan.path, plan)
    # Whatever a model, its tokenizer or a kernel has against three prompts, the checkpoint is finished and measured.
    except Exception as error:
        return (), f"no samples: {first_words(error)}"
    pairs = zip(PROMPTS, ours, theirs, strict=True)
    return tuple(Sample(prompt=p, quantized=q, original=o) for p, q, o in pairs), ""


def _continuations(path: Path, plan: Plan) -> tuple[str, ...]:
    from llmquant.runtime.generate import Sampling, generate
    from llmquant.runtime.load import load

    model: Any = load(path, device=str(plan.skeleton.device), trust_remote_code=plan.options.trust_remote_code)
    sampling = Sampling(max_new_tokens=MAX_NEW_TOKENS, greedy=True, max_seconds=MAX_SECONDS)
    texts = generate(model, load_tokenizer(plan.path), PROMPTS, sampling).texts
    del model
    give_back()
    return texts
