"""Conversations as text, rendered with the chat template of a tokenizer.

The template is a Jinja program from the author of the checkpoint. transformers runs it in a sandbox. The template can
be missing, damaged, or written for other kinds of messages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmquant.errors import UserError, one_line


def check_template(tokenizer: Any) -> None:
    """Raise UserError if a tokenizer has no chat template, or several templates and none called "default"."""
    templates = tokenizer.chat_template
    if not templates:
        raise UserError("chat: the model has no chat template; leave out --chat")
    if isinstance(templates, dict) and "default" not in templates:
        raise UserError(
            f"chat: none of the model's chat templates ({', '.join(map(str, templates))}) is called 'default'; rename "
            "the right one, or leave out --chat"
        )


def chat_text(tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False) -> str:
    """Render messages with the chat template of a tokenizer.

    messages: each has "role" and "content". add_generation_prompt: end the text with the start of an answer.
    Raises UserError if there is no template, or if it fails on these messages.
    """
    check_template(tokenizer)
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a template can fail like any program: undefined names, types, its own checks
        raise UserError(
            f"chat: the model's chat template fails on the messages ({type(error).__name__}: "
            f"{one_line(error)}); correct the template or the messages, or leave out --chat"
        ) from error
    return str(text)
