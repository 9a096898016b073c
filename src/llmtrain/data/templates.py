"""Chat templates: messages → text, and where in that text the assistant speaks.

Templates are Jinja, rendered in a sandbox and with the settings and helpers that Transformers uses, so that a template
gives the same text here and there.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from importlib.resources import files
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from llmtrain.config.errors import DataError
from llmtrain.data.template_sandbox import TemplateSandbox

Message = Mapping[str, Any]  # {"role": ..., "content": ...}

# Unicode noncharacters: reserved for use inside a program, so text from outside should not hold them.
OPENED, CLOSED = "\ufdd0", "\ufdd1"

MAX_SOURCE = 2**20  # characters; long ones have some 20,000


@dataclasses.dataclass(frozen=True)
class Rendered:
    """Text of a conversation; `answers` are the [start, end) characters that the assistant has to say.

    `turns` are the assistant's turns that these are, counted from 0; None where the template's own marks say the parts.
    """

    text: str
    answers: tuple[tuple[int, int], ...]
    turns: tuple[int, ...] | None = None

    def segments(self) -> tuple[list[str], list[bool]]:
        """The text cut at the borders of the answers, and which of the pieces are answers."""
        pieces, spoken, position = [], [], 0
        for start, end in self.answers:
            pieces += [self.text[position:start], self.text[start:end]]
            spoken += [False, True]
            position = end
        return [*pieces, self.text[position:]], [*spoken, False]


class GenerationBlocks(Extension):
    """`{% generation %}...{% endgeneration %}`: encloses the block's text in marks."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """Called by Jinja at the opening tag."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return OPENED + caller() + CLOSED


class ChatTemplate:
    """A chat template with the special tokens it may name (`bos_token`, `eos_token`, ...)."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source, self.special_tokens = source, dict(special_tokens)
        if not isinstance(source, str) or len(source) > MAX_SOURCE:
            raise DataError(f"the chat template is no text of up to {MAX_SOURCE:,} characters")
        try:
            self._template = environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"the chat template is no valid Jinja: line {error.lineno}: {error.message}") from None
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # what it is compiled to is no Python
            raise DataError(f"the chat template cannot be compiled: {error}") from None
        self._has_marks = re.search(r"\{%-?\s*generation\b", source) is not None

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, needed: Collection[int] | None = None
    ) -> Rendered:
        """The text of `messages`; with `add_generation_prompt` up to where the assistant's next turn begins.

        Where the template does not mark the assistant's part itself, it is what a turn adds to the text before it.
        Raises DataError when the template refuses the messages, or where that part cannot be told for a turn of the
        assistant that is `needed` (counted from 0; all where None): templates may leave things out of earlier turns.
        """
        text = self._text(messages, add_generation_prompt)
        if self._has_marks:
            return _without_marks(text)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        found = {turn: self._answer(text, messages, i) for turn, i in enumerate(turns)}
        told = {turn: part for turn, part in found.items() if part is not None}
        if {turn for turn in found if needed is None or turn in needed} - set(told):
            raise DataError(
                "the chat template gives a turn another text when turns follow it, so the assistant's part cannot "
                "be told by what each turn adds. Enclose it in {% generation %} ... {% endgeneration %} in the "
                "template, or learn the last turn only (data.loss_on=last).\n" + _shown(messages)
            )
        return Rendered(text, tuple(told.values()), tuple(told))

    def _text(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        try:
            variables = {"messages": messages, "tools": None, "documents": None, **self.special_tokens}
            return self._template.render(variables, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template computes with the messages: anything may go wrong
            said = str(error) or type(error).__name__
            raise DataError(f"the chat template refuses these messages: {said}\n{_shown(messages)}") from None

    def _answer(self, text: str, messages: Sequence[Message], index: int) -> tuple[int, int] | None:
        before = self._text(messages[:index], True)
        after = self._text(messages[: index + 1], False)
        return (len(before), len(after)) if text.startswith(after) and after.startswith(before) else None


@functools.cache
def default_chat_template() -> str:
    """The template that is used where a tokenizer has none."""
    return files("llmtrain.data").joinpath("chat_template.jinja").read_text(encoding="utf-8").strip()


@functools.cache
def environment() -> TemplateSandbox:
    """Jinja as Transformers sets it up for chat templates."""
    sandbox = TemplateSandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, "jinja2.ext.loopcontrols"]
    )
    sandbox.filters["tojson"] = sandbox.bounded("tojson", _to_json)
    sandbox.globals["raise_exception"] = _raise_exception
    sandbox.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return sandbox


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    # Jinja's own filter escapes HTML, which a model should not see.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _without_marks(text: str) -> Rendered:
    pieces = re.split(f"([{OPENED}{CLOSED}])", text)
    if pieces[1::2] != [OPENED, CLOSED] * (len(pieces) // 4):
        raise DataError(f"a conversation holds the Unicode noncharacter U+FDD0 or U+FDD1; remove it: {text[:200]!r}")
    ends = [0]
    for piece in pieces[::2]:
        ends.append(ends[-1] + len(piece))
    borders = ends[1:-1]
    return Rendered("".join(pieces[::2]), tuple(zip(borders[::2], borders[1::2], strict=True)))


def _shown(messages: Sequence[Message]) -> str:
    text = json.dumps(list(messages), ensure_ascii=False, default=str)
    return text if len(text) <= 500 else text[:500] + " ..."
