"""The output of `llmquant generate`: texts and speed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from llmquant.console.tables import screen

if TYPE_CHECKING:
    from llmquant.runtime.generate import GenerationResult


def print_piece(text: str) -> None:
    """Print a piece of streamed text."""
    print(text, end="", flush=True)


def print_texts(prompts: Sequence[str], texts: Sequence[str]) -> None:
    """Print each prompt with its text below."""
    for prompt, text in zip(prompts, texts, strict=True):
        screen().print(Text(f"> {prompt}", style="dim"), soft_wrap=True)
        screen().print(Text(text.strip() + "\n"), soft_wrap=True)


def print_speed(results: Sequence[GenerationResult]) -> None:
    """Print tokens per second on stderr."""
    prompt, new = sum(r.num_prompt_tokens for r in results), sum(r.num_new_tokens for r in results)
    prefill, decode = sum(r.prefill_seconds for r in results), sum(r.decode_seconds for r in results)
    timed_tokens = new - sum(len(r.texts) for r in results)
    line = f"prefill {prompt} tokens, {prompt / max(prefill, 1e-9):.1f}/s"
    if timed_tokens > 0:
        line += f"; decode {new} tokens, {timed_tokens / max(decode, 1e-9):.1f}/s"
    Console(stderr=True, highlight=False).print(line, style="dim")
