"""A few answers of the quantized model and of the original, side by side: greedy, short, and only where it is cheap.

A model that has a chat template answers QUESTIONS through it; another one continues PROMPTS. Both are loaded as
`llmquant generate` loads them, so this is also the test whether the result runs on this machine. A model is loaded only
if it fits, whole, into what is left of the memory that the run was predicted to take anyway, or of SMALL_BYTES; so
nothing here raises the peak of a large model. An answer is cut off after MAX_SECONDS.

A model that loops is noticed by the tokens of its answers: the share of sequences of REPEATED_TOKENS tokens that came
before in the same answer. It is near zero in prose, and goes to one in a loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from llmquant.chat import chat_text
from llmquant.checkpoints.reader import CheckpointReader
from llmquant.errors import UserError, first_words
from llmquant.hub import load_tokenizer
from llmquant.memory import give_back
from llmquant.models.skeleton import context_length
from llmquant.pipeline.footprint import footprint_of
from llmquant.pipeline.plan import Plan

PROMPTS = ("The capital of France is", "def is_prime(n):", "Once upon a time, in a village by the sea,")
QUESTIONS = (
    "What is the capital of France?",
    "Write a Python function that checks whether a number is prime.",
    "Explain in two sentences why the sky is blue.",
)
MIN_NEW_TOKENS, MAX_NEW_TOKENS, MAX_SECONDS = 8, 48, 20.0
SMALL_BYTES = 2**30
LOADED = 1.5
"""Memory of a model that generates, in sizes of its checkpoint: weights, copies while laid out, activations."""
REPEATED_TOKENS, REPETITIVE = 4, 0.3
"""Length of the sequences that are counted, and the share of repeated ones from which on an answer is repetitive: a
phrase of eight tokens that comes three times in MAX_NEW_TOKENS has a third."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One prompt, continued; or one question, answered."""

    prompt: str
    quantized: str
    original: str | None
    """None where the original was left out."""
    is_chat: bool = False
    """Whether the prompt went through the chat template."""
    quantized_repeats: float = 0.0
    """Share of the quantized model's sequences of REPEATED_TOKENS tokens that repeat an earlier one."""
    original_repeats: float | None = None
    """The same of the original's; None where it was left out."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The samples of a run, and what happened while they were made."""

    samples: tuple[Sample, ...] = ()
    note: str = ""
    """Which samples were left out, and why; empty where none were."""
    failure: str = ""
    """Why the quantized model does not run; empty where it does, or where that was not tried."""
    original_failure: str = ""
    """The same of the original."""
    template_failure: str = ""
    """Why the questions do not go through the chat template; empty if they do, or if there is none."""

    @property
    def repetition(self) -> str:
        """How often only the quantized model is repetitive, in words; empty where it never is."""
        pairs = [(one.quantized_repeats, one.original_repeats) for one in self.samples]
        looping = sum(ours >= REPETITIVE and theirs is not None and theirs < REPETITIVE for ours, theirs in pairs)
        if not looping:
            return ""
        return f"it repeats itself in {looping} of {len(pairs)} sample texts where the original does not"


def samples(folder: Path, plan: Plan) -> Samples:
    """What a finished folder and its original make of a few prompts."""
    footprint = footprint_of(plan)
    most = footprint.limit_bytes or max(footprint.peak_bytes, SMALL_BYTES)
    left = most - psutil.Process().memory_info().rss
    if LOADED * CheckpointReader(folder).total_bytes > left:
        return Samples(note="no samples: the quantized model, whole, would take more memory than quantizing it")
    try:
        # That of the finished folder: it must load there.
        tokenizer = load_tokenizer(folder, plan.options.trust_remote_code)
    except UserError as error:
        return Samples(note=f"no samples: {first_words(error)}")
    is_chat, template_failure = _answers_questions(tokenizer)
    prompts = QUESTIONS if is_chat else PROMPTS
    try:
        room = context_length(plan.config) - _most_tokens(tokenizer, prompts, is_chat)
    except Exception:  # a tokenizer that does not read the prompts, which the attempt below reports
        room = MAX_NEW_TOKENS
    if room < MIN_NEW_TOKENS:
        return Samples(note=f"no samples: a context of {context_length(plan.config)} tokens has no room for them")
    most_new = int(min(room, MAX_NEW_TOKENS))
    ours, failure = _attempt(folder, plan, tokenizer, prompts, is_chat, most_new)
    theirs, original_failure = None, ""
    note = "without the original, which, whole, would take more memory than quantizing it"
    if LOADED * plan.reader.total_bytes <= left:
        theirs, original_failure = _attempt(plan.path, plan, tokenizer, prompts, is_chat, most_new)
        note = f"without the original, which does not run here: {original_failure}" if original_failure else ""
    if ours is None:
        failure += "; nor does the original" if original_failure else ""
        note = f"no samples: the quantized model does not run here: {failure}"
        return Samples(note=note, failure=failure, original_failure=original_failure)
    made = zip(prompts, ours.texts, theirs.texts if theirs else [None] * len(prompts), strict=True)
    was_cut = ours.was_cut or (theirs is not None and theirs.was_cut)
    pairs = tuple(_sample(tokenizer, *texts, is_chat=is_chat, was_cut=was_cut) for texts in made)
    template_note = f"texts instead of questions: {template_failure}" if template_failure else ""
    note = "; ".join(filter(None, (template_note, note)))
    return Samples(samples=pairs, note=note, original_failure=original_failure, template_failure=template_failure)


def _answers_questions(tokenizer: Any) -> tuple[bool, str]:
    """Whether the chat template takes the questions; and why not, if there is a template and it does not."""
    if not getattr(tokenizer, "chat_template", None):
        return False, ""
    try:
        for question in QUESTIONS:
            chat_text(tokenizer, [{"role": "user", "content": question}], add_generation_prompt=True)
    except UserError as error:
        return False, first_words(error)
    return True, ""


@dataclass(frozen=True)
class Answers:
    """The texts of one model."""

    texts: tuple[str, ...]
    was_cut: bool
    """Whether MAX_SECONDS ended them."""


def _sample(tokenizer: Any, prompt: str, ours: str, theirs: str | None, *, is_chat: bool, was_cut: bool) -> Sample:
    """A pair of texts. Where time has cut them, repetition is looked for in the length that both have."""
    quantized, original = (tokenizer(text or "", add_special_tokens=False)["input_ids"] for text in (ours, theirs))
    length = min(len(quantized), len(original)) if was_cut and theirs is not None else None
    return Sample(
        prompt=prompt,
        quantized=ours,
        original=theirs,
        is_chat=is_chat,
        quantized_repeats=repeated_share(quantized[:length]),
        original_repeats=None if theirs is None else repeated_share(original[:length]),
    )


def repeated_share(tokens: Sequence[int]) -> float:
    """Share of the sequences of REPEATED_TOKENS tokens that repeat an earlier one, 0 … 1."""
    found = [tuple(tokens[start : start + REPEATED_TOKENS]) for start in range(len(tokens) - REPEATED_TOKENS + 1)]
    return 1 - len(set(found)) / len(found) if found else 0.0


def _attempt(
    path: Path, plan: Plan, tokenizer: Any, prompts: Sequence[str], is_chat: bool, most_new: int
) -> tuple[Answers | None, str]:
    """The answers of a model, or the reason why it gives none."""
    try:
        return _answers(path, plan, tokenizer, prompts, is_chat, most_new), ""
    # Whatever a model, its tokenizer or a kernel has against three prompts, the checkpoint is finished and measured.
    except Exception as error:
        return None, first_words(error)


def _most_tokens(tokenizer: Any, prompts: Sequence[str], is_chat: bool) -> int:
    """Tokens of the longest prompt."""
    asked = [[{"role": "user", "content": prompt}] for prompt in prompts] if is_chat else []
    texts = [chat_text(tokenizer, chat, add_generation_prompt=True) for chat in asked] or prompts
    return max(len(tokenizer(text, add_special_tokens=not is_chat)["input_ids"]) for text in texts)


def _answers(path: Path, plan: Plan, tokenizer: Any, prompts: Sequence[str], is_chat: bool, most_new: int) -> Answers:
    from llmquant.runtime.generate import Sampling, generate
    from llmquant.runtime.load import load

    model: Any = load(path, device=str(plan.skeleton.device), trust_remote_code=plan.options.trust_remote_code)
    sampling = Sampling(max_new_tokens=most_new, greedy=True, max_seconds=MAX_SECONDS)
    made = generate(model, tokenizer, prompts, sampling, chat=is_chat)
    del model
    give_back()
    return Answers(made.texts, was_cut=made.prefill_seconds + made.decode_seconds >= MAX_SECONDS)
