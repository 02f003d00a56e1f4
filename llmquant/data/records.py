"""The text or the conversation of one record of a .jsonl, .json or .parquet file.

TEXT_FIELDS lists the common names of fields: plain text, chats in the form of OpenAI ("messages", each with "role" and
"content") or ShareGPT ("conversations", each with "from" and "value"), instructions in the form of Alpaca, and prompts
with completions. The content of a message is a string, null, or a list of parts, of which only those with text are
used.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from llmquant.errors import UserError

Conversation = list[dict[str, Any]]
"""The messages of one conversation in order, each with "role" and "content"."""
CHAT_FIELDS = ("messages", "conversations")
"""Names of fields that hold a list of messages."""
TEXT_FIELDS: tuple[tuple[str, ...], ...] = (
    ("text",),
    *((name,) for name in CHAT_FIELDS),
    ("instruction", "context", "input", "output", "response"),
    ("prompt", "completion", "response", "chosen"),
    ("question", "answer", "response"),
    ("content",),
)
"""Sets of fields that hold the text of a record. The first set with a non-null field is used, and the texts of its
fields are joined in the order of the set."""
_NAMES = dict.fromkeys(name for names in TEXT_FIELDS for name in names)
_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
"""Names of roles in ShareGPT, and the names that chat templates use for them."""
_TYPES = {"dict": "an object", "list": "a list", "int": "a number", "float": "a number", "bool": "true or false"}
"""Descriptions of JSON types for error messages, by the name of the Python type."""


def record_text(record: Any, location: str) -> str:
    """Return the text of a record, or "" if its fields are null.

    location: file and line of the record, for error messages.
    Raises UserError if the record has no field of TEXT_FIELDS, or a field that holds no text.
    """
    if record is None or isinstance(record, str):
        return record or ""
    if not isinstance(record, dict) or not known_fields(record):
        others = ", ".join(name for name in _NAMES if name not in ("text", "messages"))
        raise UserError(
            f'{location}: holds neither "text" nor "messages", nor another known field ({others}); '
            f"{_contents(record)}; rename the field that holds the text"
        )
    for names in TEXT_FIELDS:
        texts = [_field_text(record[name], name, location) for name in names if record.get(name) is not None]
        if texts:
            return "\n".join(filter(None, texts))
    return ""


def record_conversation(record: Any, location: str) -> Conversation:
    """Return the messages of a record as a chat template needs them: "role", "content" as one string, and other keys.

    location: file and line of the record, for error messages.
    Raises UserError if there is no list of messages, or a message without a role.
    """
    chats = (
        [record[name] for name in CHAT_FIELDS if isinstance(record.get(name), list)] if isinstance(record, dict) else []
    )
    if not chats:
        raise UserError(
            f'{location}: holds no "messages" (a list with "role" and "content"), nor "conversations" (with "from" and '
            f'"value"); {_contents(record)}; leave out --chat for text'
        )
    return [_template_message(message, location) for message in chats[0] if message is not None]


def known_fields(names: Iterable[str]) -> list[str]:
    """Return those names that TEXT_FIELDS lists."""
    return [name for name in names if name in _NAMES]


def _template_message(message: Any, location: str) -> dict[str, Any]:
    """Return one message as a chat template needs it, with the roles of ShareGPT renamed."""
    content = _content(message, location)
    role = message.get("role", message.get("from"))
    if not isinstance(role, str):
        raise UserError(f'{location}: a message has no "role"; {_contents(message)}; leave out --chat for text')
    others = {key: value for key, value in message.items() if key not in ("from", "value") and value is not None}
    return others | {"role": _ROLES.get(role, role), "content": content}


def _field_text(value: Any, name: str, location: str) -> str:
    """Return the text of a field that holds a string, a list of strings or a list of messages."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise UserError(f'{location}: field "{name}" holds {_type(value)}; a string or a list of messages is needed')
    parts = [part for part in value if part is not None]
    if all(isinstance(part, str) for part in parts):
        return "\n".join(parts)
    return "\n".join(filter(None, (_message_text(message, location) for message in parts)))


def _message_text(message: Any, location: str) -> str:
    """Return the content of a message, followed by the names and arguments of the functions that it calls."""
    lines = [_content(message, location)]
    calls = message.get("tool_calls")
    for call in [*(calls if isinstance(calls, list) else []), message.get("function_call")]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if isinstance(function, dict):
            given = function.get("arguments")
            arguments = given if isinstance(given, str) or given is None else json.dumps(given, ensure_ascii=False)
            lines += [part for part in (function.get("name"), arguments) if isinstance(part, str)]
    return "\n".join(filter(None, lines))


def _content(message: Any, location: str) -> str:
    """Return the content of a message as one string."""
    keys = [key for key in ("content", "value") if key in message] if isinstance(message, dict) else []
    if not keys and not (isinstance(message, dict) and (message.get("tool_calls") or message.get("function_call"))):
        raise UserError(
            f'{location}: a message holds neither "content" nor "value"; {_contents(message)}; rename the field that '
            f"holds its text"
        )
    value = next((message[key] for key in keys if message[key] is not None), None)
    parts = value if isinstance(value, list) else [value]
    if not all(part is None or isinstance(part, (str, dict)) for part in parts):
        raise UserError(f'{location}: field "{keys[0]}" of a message holds {_type(value)}; a string is needed')
    return "".join(filter(None, map(_part_text, parts)))


def _part_text(part: Any) -> str | None:
    """Return the text of one part of a content, or None for a part of another type, such as an image."""
    text = part.get("text") if isinstance(part, dict) else part
    return text if isinstance(text, str) else None


def _contents(record: Any) -> str:
    """Describe the contents of a record, for error messages."""
    if not isinstance(record, dict):
        return f"it is {_type(record)}"
    names = [f"{name!r:.40}" for name in record]
    some = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"its fields are {some}" if names else "it has no fields"


def _type(value: Any) -> str:
    """Describe the type of a JSON value, for error messages."""
    return "null" if value is None else _TYPES.get(type(value).__name__, type(value).__name__)
