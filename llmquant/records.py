"""The text, or the conversation, in a record of a .jsonl or .parquet file.

Data sets name their fields in a few ways, and FIELDS lists them: plain text, chats in the form of OpenAI ("messages",
each with "role" and "content") or ShareGPT ("conversations", each with "from" and "value"), instructions in the form of
Alpaca, prompts with completions. A content is a string, null, or a list of parts, of which those with text count.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from llmquant.errors import UserError

Conversation = list[dict[str, Any]]
"""Messages in their order, each with "role" and "content"."""
CHATS = ("messages", "conversations")
"""Fields that hold a list of messages."""
FIELDS: tuple[tuple[str, ...], ...] = (
    ("text",),
    *((name,) for name in CHATS),
    ("instruction", "context", "input", "output", "response"),
    ("prompt", "completion", "response", "chosen"),
    ("question", "answer", "response"),
    ("content",),
)
"""Fields whose texts, one after the other, are the text of a record: the first line of which a record has a field."""
_NAMES = dict.fromkeys(name for names in FIELDS for name in names)
_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
"""ShareGPT's names of roles that chat templates know by another."""
_TYPES = {"dict": "an object", "list": "a list", "int": "a number", "float": "a number", "bool": "true or false"}
"""Types of JSON values in words, by the name of their Python type."""


def record_text(record: Any, where: str) -> str:
    """The text of a record; "" if its fields are null.

    where: file and line, for the message. Raises UserError if no field of FIELDS is there, or one holds no text.
    """
    if record is None or isinstance(record, str):
        return record or ""
    if not isinstance(record, dict) or not known_fields(record):
        others = ", ".join(name for name in _NAMES if name not in ("text", "messages"))
        raise UserError(
            f'{where}: holds neither "text" nor "messages", nor another known field ({others}); {_contents(record)}; '
            f"rename the field that holds the text"
        )
    for names in FIELDS:
        texts = [_field_text(record[name], name, where) for name in names if record.get(name) is not None]
        if texts:
            return "\n".join(filter(None, texts))
    return ""


def record_conversation(record: Any, where: str) -> Conversation:
    """The messages of a record as a chat template takes them: "role", "content" as one string, and other keys as given.

    Raises UserError if there is no list of messages, or one without a role.
    """
    chats = [record[name] for name in CHATS if isinstance(record.get(name), list)] if isinstance(record, dict) else []
    if not chats:
        raise UserError(
            f'{where}: holds no "messages" (a list with "role" and "content"), nor "conversations" (with "from" and '
            f'"value"); {_contents(record)}; leave out --chat for text'
        )
    return [_templated(message, where) for message in chats[0] if message is not None]


def known_fields(names: Iterable[str]) -> list[str]:
    """Those of some names that FIELDS lists."""
    return [name for name in names if name in _NAMES]


def _templated(message: Any, where: str) -> dict[str, Any]:
    content = _content(message, where)
    role = message.get("role", message.get("from"))
    if not isinstance(role, str):
        raise UserError(f'{where}: a message has no "role"; {_contents(message)}; leave out --chat for text')
    others = {key: value for key, value in message.items() if key not in ("from", "value") and value is not None}
    return others | {"role": _ROLES.get(role, role), "content": content}


def _field_text(value: Any, name: str, where: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise UserError(f'{where}: field "{name}" holds {_type(value)}; a string or a list of messages is needed')
    parts = [part for part in value if part is not None]
    if all(isinstance(part, str) for part in parts):
        return "\n".join(parts)
    return "\n".join(filter(None, (_message_text(message, where) for message in parts)))


def _message_text(message: Any, where: str) -> str:
    """The content of a message, and behind it the functions that it calls and their arguments."""
    lines = [_content(message, where)]
    calls = message.get("tool_calls")
    for call in [*(calls if isinstance(calls, list) else []), message.get("function_call")]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if isinstance(function, dict):
            given = function.get("arguments")
            arguments = given if isinstance(given, str) or given is None else json.dumps(given, ensure_ascii=False)
            lines += [part for part in (function.get("name"), arguments) if isinstance(part, str)]
    return "\n".join(filter(None, lines))


def _content(message: Any, where: str) -> str:
    keys = [key for key in ("content", "value") if key in message] if isinstance(message, dict) else []
    if not keys and not (isinstance(message, dict) and (message.get("tool_calls") or message.get("function_call"))):
        raise UserError(
            f'{where}: a message holds neither "content" nor "value"; {_contents(message)}; rename the field that '
            f"holds its text"
        )
    value = next((message[key] for key in keys if message[key] is not None), None)
    parts = value if isinstance(value, list) else [value]
    if not all(part is None or isinstance(part, (str, dict)) for part in parts):
        raise UserError(f'{where}: field "{keys[0]}" of a message holds {_type(value)}; a string is needed')
    return "".join(filter(None, map(_part_text, parts)))


def _part_text(part: Any) -> str | None:
    """The text of a part of a content; None for a part of another type, an image for example."""
    text = part.get("text") if isinstance(part, dict) else part
    return text if isinstance(text, str) else None


def _contents(record: Any) -> str:
    """What a record holds, in words."""
    if not isinstance(record, dict):
        return f"it is {_type(record)}"
    names = [f"{name!r:.40}" for name in record]
    some = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"its fields are {some}" if names else "it has no fields"


def _type(value: Any) -> str:
    return "null" if value is None else _TYPES.get(type(value).__name__, type(value).__name__)
