"""Short greedy answers of the quantized model and of the original, side by side.

A model with a chat template answers QUESTIONS; a model without one continues PROMPTS. Both models are loaded as
`llmquant generate` loads them, so this also tests whether the result runs on this machine. A model is loaded only if it
fits into `--max-memory` or, without that limit, into the estimated peak memory of the run or SMALL_BYTES, so that the
peak of a large run does not rise. The answers of a model are cut off after MAX_GENERATION_SECONDS.

Repetition is the fraction of sequences of REPEATED_TOKENS tokens that occur earlier in the same answer. It is near 0 in
prose and approaches 1 in a loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmquant.checkpoints.reader import CheckpointReader
from llmquant.data.chat import chat_text
from llmquant.errors import UserError, one_line
from llmquant.estimates.memory import estimate_memory
from llmquant.hub import load_tokenizer
from llmquant.memory import trim_heap, used_bytes
from llmquant.models.skeleton import context_length
from llmquant.planning.plan import Plan
from llmquant.report.schema import MAX_GENERATION_SECONDS, MAX_NEW_TOKENS, REPEATED_TOKENS, SampleText, SampleTexts

PROMPTS = ("The capital of France is", "def is_prime(n):", "Once upon a time, in a village by the sea,")
MIN_NEW_TOKENS = 8
"""Smallest number of tokens for an answer. Models with a shorter context get no sample texts."""
QUESTIONS = (
    "What is the capital of France?",
    "Write a Python function that checks whether a number is prime.",
    "Explain in two sentences why the sky is blue.",
)
SMALL_BYTES = 2**30
"""Memory that the process may take for sample texts in any run without `--max-memory`."""
LOADED_SIZE_FACTOR = 1.5
"""Memory of a generating model relative to its checkpoint: weights, copies during loading, activations."""


def generate_sample_texts(folder: Path, plan: Plan) -> SampleTexts:
    """Generate short texts with a finished folder and with its original."""
    memory = estimate_memory(plan)
    limit_bytes = memory.limit_bytes or max(memory.peak_bytes, SMALL_BYTES)
    free_bytes = limit_bytes - used_bytes(plan.skeleton.device)
    if LOADED_SIZE_FACTOR * CheckpointReader(folder).total_bytes > free_bytes:
        return SampleTexts(
            note="no sample texts: loading the whole quantized model would take more memory than quantizing it"
        )
    try:
        # The tokenizer of the finished folder is used, because it must load from there.
        tokenizer = load_tokenizer(folder, plan.options.trust_remote_code)
    except UserError as error:
        return SampleTexts(note=f"no sample texts: {one_line(error)}")
    is_chat, template_failure = _answers_questions(tokenizer)
    prompts = QUESTIONS if is_chat else PROMPTS
    try:
        room = context_length(plan.config) - _most_tokens(tokenizer, prompts, is_chat)
    except Exception:  # the tokenizer fails on the prompts; the attempt below reports it
        room = MAX_NEW_TOKENS
    if room < MIN_NEW_TOKENS:
        return SampleTexts(
            note=f"no sample texts: a context of {context_length(plan.config)} tokens has no room for them"
        )
    most_new = int(min(room, MAX_NEW_TOKENS))
    ours, failure = _attempt(folder, plan, tokenizer, prompts, is_chat, most_new)
    theirs, original_failure = None, ""
    note = "without the original, because loading it whole would take more memory than quantizing it"
    if LOADED_SIZE_FACTOR * plan.reader.total_bytes <= free_bytes:
        theirs, original_failure = _attempt(plan.path, plan, tokenizer, prompts, is_chat, most_new)
        note = f"without the original, which does not run here: {original_failure}" if original_failure else ""
    if ours is None:
        failure += "; nor does the original" if original_failure else ""
        note = f"no sample texts: the quantized model does not run here: {failure}"
        return SampleTexts(note=note, failure=failure, original_failure=original_failure)
    made = zip(prompts, ours.texts, theirs.texts if theirs else [None] * len(prompts), strict=True)
    was_cut = ours.was_cut or (theirs is not None and theirs.was_cut)
    pairs = tuple(_sample(tokenizer, *texts, is_chat=is_chat, was_cut=was_cut) for texts in made)
    template_note = f"texts instead of questions: {template_failure}" if template_failure else ""
    note = "; ".join(filter(None, (template_note, note)))
    return SampleTexts(texts=pairs, note=note, original_failure=original_failure, template_failure=template_failure)


def _answers_questions(tokenizer: Any) -> tuple[bool, str]:
    """Return whether the chat template accepts the questions, and the reason if a template refuses them."""
    if not getattr(tokenizer, "chat_template", None):
        return False, ""
    try:
        for question in QUESTIONS:
            chat_text(tokenizer, [{"role": "user", "content": question}], add_generation_prompt=True)
    except UserError as error:
        return False, one_line(error)
    return True, ""


@dataclass(frozen=True)
class Answers:
    """The texts that one model generated."""

    texts: tuple[str, ...]
    was_cut: bool
    """Whether the texts were cut off after MAX_GENERATION_SECONDS."""


def _sample(tokenizer: Any, prompt: str, ours: str, theirs: str | None, *, is_chat: bool, was_cut: bool) -> SampleText:
    """Return a pair of texts. If their time ran out, repetition is measured over the shorter length."""
    quantized, original = (tokenizer(text or "", add_special_tokens=False)["input_ids"] for text in (ours, theirs))
    length = min(len(quantized), len(original)) if was_cut and theirs is not None else None
    return SampleText(
        prompt=prompt,
        quantized=ours,
        original=theirs,
        is_chat=is_chat,
        quantized_repeats=repeated_fraction(quantized[:length]),
        original_repeats=None if theirs is None else repeated_fraction(original[:length]),
    )


def repeated_fraction(tokens: Sequence[int]) -> float:
    """Return the fraction of the sequences of REPEATED_TOKENS tokens that repeat an earlier one, 0 to 1."""
    found = [tuple(tokens[start : start + REPEATED_TOKENS]) for start in range(len(tokens) - REPEATED_TOKENS + 1)]
    return 1 - len(set(found)) / len(found) if found else 0.0


def _attempt(
    path: Path, plan: Plan, tokenizer: Any, prompts: Sequence[str], is_chat: bool, most_new: int
) -> tuple[Answers | None, str]:
    """Return the answers of a model, or None and the reason."""
    try:
        return _answers(path, plan, tokenizer, prompts, is_chat, most_new), ""
    # The checkpoint is finished and measured, so no failure in the model, its tokenizer or a kernel may end the run.
    except Exception as error:
        return None, one_line(error)


def _most_tokens(tokenizer: Any, prompts: Sequence[str], is_chat: bool) -> int:
    """Return the number of tokens of the longest prompt."""
    asked = [[{"role": "user", "content": prompt}] for prompt in prompts] if is_chat else []
    texts = [chat_text(tokenizer, chat, add_generation_prompt=True) for chat in asked] or prompts
    return max(len(tokenizer(text, add_special_tokens=not is_chat)["input_ids"]) for text in texts)


def _answers(path: Path, plan: Plan, tokenizer: Any, prompts: Sequence[str], is_chat: bool, most_new: int) -> Answers:
    from llmquant.runtime.generate import SamplingParams, generate
    from llmquant.runtime.load import load

    model: Any = load(path, device=str(plan.skeleton.device), trust_remote_code=plan.options.trust_remote_code)
    sampling = SamplingParams(max_new_tokens=most_new, greedy=True, max_seconds=MAX_GENERATION_SECONDS)
    made = generate(model, tokenizer, prompts, sampling, chat=is_chat)
    del model
    trim_heap()
    seconds = made.prefill_seconds + made.capture_seconds + made.decode_seconds
    return Answers(made.texts, was_cut=seconds >= MAX_GENERATION_SECONDS)
