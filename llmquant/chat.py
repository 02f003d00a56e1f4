"""Conversations as text, by the chat template that comes with a tokenizer.

The template is a program of the checkpoint's author in Jinja. transformers runs it in a sandbox; it can still be
missing, damaged, or made for other messages than those at hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmquant.errors import UserError, first_words


def check_template(tokenizer: Any) -> None:
    """UserError if a tokenizer has no chat template, or several and none for ordinary conversations."""
    templates = tokenizer.chat_template
    if not templates:
        raise UserError("chat: the model has no chat template; leave out --chat")
    if isinstance(templates, dict) and "default" not in templates:
        raise UserError(
            f"chat: none of the model's chat templates ({', '.join(map(str, templates))}) is called 'default'; rename "
            "the right one, or leave out --chat"
        )


def chat_text(tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False) -> str:
    """Messages, each with "role" and "content", as the text that the model was trained on.

    add_generation_prompt: end with the beginning of an answer. Raises UserError if there is no template, or it does
    not take these messages.
    """
    check_template(tokenizer)
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # templates fail like any program: undefined names, types, their own refusals
        raise UserError(
            f"chat: the model's chat template does not take the messages ({type(error).__name__}: "
            f"{first_words(error)}); correct the template or the messages, or leave out --chat"
        ) from error
    return str(text)
