"""What `llmquant generate` shows: texts, and how fast they came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from llmquant.console.tables import screen

if TYPE_CHECKING:
    from llmquant.runtime.generate import Generated


def print_piece(text: str) -> None:
    """A piece of streamed text."""
    print(text, end="", flush=True)


def print_texts(prompts: Sequence[str], texts: Sequence[str]) -> None:
    """Prompts, each with its text below."""
    for prompt, text in zip(prompts, texts, strict=True):
        screen().print(Text(f"> {prompt}", style="dim"), soft_wrap=True)
        screen().print(Text(text.strip() + "\n"), soft_wrap=True)


def print_speed(results: Sequence[Generated]) -> None:
    """Tokens per second, on stderr."""
    prompt, new = sum(r.num_prompt_tokens for r in results), sum(r.num_new_tokens for r in results)
    prefill, decode = sum(r.prefill_seconds for r in results), sum(r.decode_seconds for r in results)
    later = new - sum(len(r.texts) for r in results)
    line = f"prefill {prompt} tokens, {prompt / max(prefill, 1e-9):.1f}/s"
    if later > 0:
        line += f"; decode {new} tokens, {later / max(decode, 1e-9):.1f}/s"
    Console(stderr=True, highlight=False).print(line, style="dim")
