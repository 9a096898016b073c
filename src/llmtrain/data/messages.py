"""Conversations as data sets write them → messages of `role` and `content`.

A message that says by itself whether it is to be learned keeps that as `train`; templates do not see it.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from llmtrain.config.errors import DataError
from llmtrain.data.templates import Message

Messages = list[Message]

ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "observation": "tool", "function": "tool",
}  # fmt: skip
# Anthropic's HH data writes a conversation as one text with these at the beginning of each turn.
HH_TURN = re.compile(r"\n\n(Human|Assistant): ?")


@dataclasses.dataclass(frozen=True)
class MessageKeys:
    """How a source's messages name their parts, the usual name first, and what its own roles mean."""

    role: tuple[str, ...] = ("role", "from")
    content: tuple[str, ...] = ("content", "value")
    train: tuple[str, ...] = ("train", "training", "weight")
    roles: Mapping[str, str] = dataclasses.field(default_factory=dict)


def read_messages(value: Any, speaker: str, keys: MessageKeys) -> Messages:
    """Messages in any of the usual ways of writing them; a mere text is said by `speaker`."""
    if isinstance(value, str):
        return _transcript(value) if HH_TURN.match(value) else [{"role": speaker, "content": value}]
    if isinstance(value, dict):
        return [_message(value, keys)]
    if not isinstance(value, list) or not value:
        raise DataError(f"expected a text or a list of messages, found {short(value)}")
    return [_message(each, keys) for each in value]


def _message(message: Any, keys: MessageKeys) -> Message:
    role = _key(message, keys.role)
    content = _key(message, keys.content)
    if role is None or content is None:
        raise DataError(f"a message needs {_said(keys.role)} and {_said(keys.content)}, found {short(message)}")
    name = message[role]
    if not isinstance(name, str) or not name:
        raise DataError(f"{role} must be a name, found {short(name)}")
    read = {"role": {**ROLES, **keys.roles}.get(name, name), "content": _text(message[content])}
    flag = _key(message, keys.train)
    return read if flag is None or message[flag] is None else read | {"train": yes_or_no(message[flag], flag)}


def _key(message: Any, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in message), None) if isinstance(message, dict) else None


def _said(names: tuple[str, ...]) -> str:
    return " or ".join(f"`{name}`" for name in names)


def _text(content: Any) -> str:
    if isinstance(content, list):  # parts of typed content; pictures and sounds are not for this model
        parts = [part.get("text", "") if isinstance(part, dict) else part for part in content]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else content
    if not isinstance(content, str):
        raise DataError(f"the content of a message must be text, found {short(content)}")
    return content


def _transcript(text: str) -> Messages:
    _, *parts = HH_TURN.split(text)
    return [
        {"role": "user" if who == "Human" else "assistant", "content": said.strip()}
        for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def yes_or_no(value: Any, name: str) -> bool:
    """A flag, written as true and false or as 1 and 0. Raises DataError for anything else."""
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise DataError(f"`{name}` must be true or false (or 1 or 0), found {short(value)}")
    return bool(value)


def short(value: Any) -> str:
    """A value of a row for a message: at most 300 characters of it."""
    try:
        text = repr(value)
    except RecursionError:
        return "something nested too deeply to show"
    return text if len(text) <= 300 else text[:300] + " ..."
