"""Conversations, preference pairs and prompts: what a record must hold to be one, and how it is read."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

from llmtrain.config.errors import DataError
from llmtrain.data import arithmetic
from llmtrain.data.columns import Fields
from llmtrain.data.messages import Messages, read_messages, short, yes_or_no
from llmtrain.data.pieces import Place
from llmtrain.data.ranked import (
    Judged,
    Pair,
    Ranking,
    are_ranked,
    finite,
    number,
    paired,
    ranked,
    ranked_pairs,
)
from llmtrain.data.records import Faults, RowError

Row = TypeVar("Row", covariant=True)


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Turns, of which the assistant's are learned, or those whose `train` is true."""

    messages: Messages
    place: Place | None = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Turns up to where the assistant is to speak; `answer` as in `Pair`."""

    messages: Messages
    answer: str | None = None
    place: Place | None = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass(frozen=True)
class Answer:
    """One way in which the assistant goes on, and whether it is good."""

    prompt: Messages
    text: str
    desirable: bool
    place: Place | str | None = dataclasses.field(default=None, compare=False)


class LeftOut(RowError):
    """A row that is not used by rule; no fault of the row."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A way of writing rows: what the user is told of it, and how a record is read."""

    said: str
    read: Callable[[Fields], list[Any]]


def apart(rows: Iterable[list[Row]], path: str, faults: Faults) -> Iterator[list[Row]]:
    """The rows of each record, as they come."""
    yield from rows


@dataclasses.dataclass(frozen=True)
class Kind(Generic[Row]):
    """What rows a stage wants, how they are read from records, and made from a generated problem.

    `join` makes rows of what the records gave; rows that belong together, so as to be held out together, are a list.
    """

    name: str
    expected: str
    layout: Callable[[Fields], Layout | None]
    generated: Callable[[arithmetic.Problem, int], Row]
    join: Callable[[Iterable[list[Any]], str, Faults], Iterator[list[Row]]] = apart


# Conversations ----------------------------------------------------------------------------------------------------


def _conversation_layout(fields: Fields) -> Layout | None:
    if fields.named("messages"):
        said = f"conversations in {fields.called('messages')}"
    elif fields.named("prompt", "completion"):
        said = f"one question ({_asking(fields)}) and answer ({fields.called('completion')})"
    else:
        return None
    if _is_labelled(fields):
        said += f", where {fields.called('label')} is true"
    elif fields.named("score") and not fields.explicit:
        column = fields.names["score"]
        said += f"; `{column}` is not used (with `columns`, label={column} leaves out rows where it is 0)"
    return Layout(said, _conversation)


def _conversation(fields: Fields) -> list[Conversation]:
    if _is_labelled(fields) and not yes_or_no(fields["label"], fields.names["label"]):
        reason = f"{fields.called('label')} is false"
        raise LeftOut(reason, f"{fields.place}: {reason}")
    if fields.named("messages"):
        messages = _talk(fields)
    else:
        messages = [*_asked(fields), *read_messages(fields["completion"], "assistant", fields.keys)]
    roles = dict.fromkeys(message["role"] for message in messages)
    if "assistant" not in roles:
        raise DataError(f"nothing in this conversation is said by the assistant; who speaks: {', '.join(roles)}")
    return [Conversation(messages, fields.place)]


# Pairs ------------------------------------------------------------------------------------------------------------


def _pair_layout(fields: Fields) -> Layout | None:
    compared = _compared_layout(fields)
    if compared or not _has_one_answer(fields):
        return compared
    to = f"answers to {_asking(fields)}"
    if _is_labelled(fields):
        said = f"{to} with {fields.called('label')}: pairs of true and false ones to the same prompt"
        return Layout(said, lambda each: _judged(each, float(yes_or_no(each["label"], each.names["label"]))))
    if fields.named("score"):
        said = f"{to} with {fields.called('score')}: pairs of different ones to the same prompt"
        return Layout(said, lambda each: _judged(each, number(each["score"], each.called("score"))))
    return None


def _compared_layout(fields: Fields) -> Layout | None:
    """Rows that hold several answers and say which is better."""
    asked = fields.named("prompt") or fields.named("messages")
    to = f"answers to {_asking(fields)}" if asked else ""
    if fields.named("chosen", "rejected"):
        return Layout(f"pairs of {to}" if to else "pairs of whole conversations in `chosen` and `rejected`", _pair)
    if asked and are_ranked(fields):
        return Layout(f"ranked {to} in {fields.called('answers')}: all pairs", _ranked)
    return None


def _has_one_answer(fields: Fields) -> bool:
    return fields.named("messages") or fields.named("prompt", "completion")


def _pair(fields: Fields) -> list[Pair]:
    chosen, rejected = (read_messages(fields[side], "assistant", fields.keys) for side in ("chosen", "rejected"))
    whole = chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant"
    prompt = [] if whole else _asked(fields)
    while len(chosen) > 1 and len(rejected) > 1 and chosen[0] == rejected[0]:
        prompt.append(chosen.pop(0))
        rejected.pop(0)
    if [message["role"] for message in [*chosen, *rejected]] != ["assistant", "assistant"]:
        raise DataError("`chosen` and `rejected` must differ in the assistant's last turn only")
    if not prompt:
        raise DataError("there is no prompt, neither in a column of its own nor at the beginning of `chosen`")
    if chosen[0]["content"] == rejected[0]["content"]:
        reason = "chosen and rejected are the same"
        raise LeftOut(reason, f"{fields.place}: {reason}")
    margin = finite(fields.get("margin"))
    return [Pair(prompt, chosen[0]["content"], rejected[0]["content"], _answer(fields), fields.place, margin)]


def _ranked(fields: Fields) -> list[Pair]:
    pairs = ranked_pairs(_asked(fields), fields, _answer(fields))
    if not pairs:
        reason = "no two answers of different rank"
        raise LeftOut(reason, f"{fields.place}: {reason}")
    return pairs


def _judged(fields: Fields, score: float) -> list[Judged]:
    if fields.named("prompt", "completion"):
        messages = [*_asked(fields), *read_messages(fields["completion"], "assistant", fields.keys)]
    else:
        messages = _talk(fields)
    *prompt, last = messages
    if last["role"] != "assistant" or not prompt:
        raise DataError("expected a prompt, and then one turn of the assistant")
    return [Judged(prompt, last["content"], score, fields.place)]


# Judged answers ---------------------------------------------------------------------------------------------------


def _answer_layout(fields: Fields) -> Layout | None:
    compared = _compared_layout(fields)
    if compared:
        return Layout(f"{compared.said}, taken apart", lambda each: _taken_apart(compared.read(each)))
    if _has_one_answer(fields) and _is_labelled(fields):
        return Layout(f"answers to {_asking(fields)}, good where {fields.called('label')} is true", _labelled)
    return None


def _taken_apart(pairs: list[Pair]) -> list[Answer]:
    return [
        Answer(pair.prompt, text, desirable, pair.place)
        for pair in pairs
        for text, desirable in ((pair.chosen, True), (pair.rejected, False))
    ]


def _labelled(fields: Fields) -> list[Answer]:
    good = yes_or_no(fields["label"], fields.names["label"])
    return [Answer(each.prompt, each.text, good, each.place) for each in _judged(fields, float(good))]


# Prompts ----------------------------------------------------------------------------------------------------------


def _prompt_layout(fields: Fields) -> Layout | None:
    if fields.named("messages"):
        return Layout(f"prompts in {fields.called('messages')}", _prompt)
    if fields.named("prompt"):
        return Layout(f"prompts in {_asking(fields)}", _prompt)
    pairs = _pair_layout(fields)
    return pairs and Layout(f"prompts of {pairs.said}", _prompt)


def _prompt(fields: Fields) -> list[Prompt]:
    if fields.named("messages"):
        messages = _talk(fields)
    else:
        messages = _asked(fields) if fields.named("prompt") else _pair(fields)[0].prompt
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise DataError("there is no prompt in this row")
    return [Prompt(messages, _answer(fields), fields.place)]


# What fields say --------------------------------------------------------------------------------------------------


def _asking(fields: Fields) -> str:
    if not fields.named("prompt"):
        return fields.called("messages")
    return fields.called("prompt") + (f" with {fields.called('input')}" if fields.named("input") else "")


def _asked(fields: Fields) -> Messages:
    """The turns before the answer."""
    if fields.named("messages") and not fields.named("prompt"):
        return _talk(fields)
    messages = read_messages(fields["prompt"], "user", fields.keys)
    if messages[-1]["role"] == "assistant" and not messages[-1]["content"]:  # a transcript that ends with "Assistant:"
        messages.pop()
    if fields.get("input") and isinstance(fields["prompt"], str):
        messages = [{"role": "user", "content": f"{fields['prompt']}\n\n{fields['input']}"}]
    return _with_system([*_history(fields), *messages], fields)


def _talk(fields: Fields) -> Messages:
    return _with_system(read_messages(fields["messages"], "user", fields.keys), fields)


def _with_system(messages: Messages, fields: Fields) -> Messages:
    system = fields.get("system")
    if isinstance(system, str) and system and not any(message["role"] == "system" for message in messages):
        return [{"role": "system", "content": system}, *messages]
    return messages


def _history(fields: Fields) -> Messages:
    """Earlier turns as LLaMA-Factory writes them beside an instruction: [[question, answer], ...]."""
    turns: Messages = []
    history = fields.get("history") or []
    if not isinstance(history, list):
        raise DataError(f"{fields.called('history')} must be a list of [question, answer], found {short(history)}")
    for pair in history:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(said, str) for said in pair)):
            raise DataError(f"{fields.called('history')} must be a list of [question, answer], found {short(pair)}")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def _is_labelled(fields: Fields) -> bool:
    """Whether a label says if the answer is good: one that the config names, or one that is true or false."""
    return fields.named("label") and (fields.explicit or isinstance(fields.get("label"), bool))


def _answer(fields: Fields) -> str | None:
    found = fields.get("answer")
    return str(found) if isinstance(found, str | int | float) else None


# What a generated problem makes -----------------------------------------------------------------------------------


def _question(problem: arithmetic.Problem) -> Messages:
    return [{"role": "user", "content": problem.prompt}]


def _worked(problem: arithmetic.Problem, number: int) -> Conversation:
    answer = {"role": "assistant", "content": arithmetic.demonstration(problem, number)}
    return Conversation([*_question(problem), answer])


def _one_way(problem: arithmetic.Problem, number: int) -> Answer:
    """The right answer of every other problem, a wrong one of those between."""
    right = number % 2 == 0
    return Answer(_question(problem), problem.answer if right else arithmetic.wrong_answer(problem), right)


def _two_ways(problem: arithmetic.Problem, number: int) -> Pair:
    return Pair(_question(problem), problem.answer, arithmetic.wrong_answer(problem), str(problem.final))


CONVERSATIONS = Kind(
    "conversations",
    "`messages` (or ShareGPT's `conversations`), `prompt` and `completion`, or `instruction`, `input` and `output`",
    _conversation_layout, _worked,
)  # fmt: skip
PAIRS = Kind(
    "preference pairs",
    "`prompt`, `chosen` and `rejected`; whole conversations in `chosen` and `rejected`; `prompt`, `answers` and "
    "`scores` or `ranks`; or `prompt`, `completion` and `label` (true or false) or `score`",
    _pair_layout, _two_ways, paired,
)  # fmt: skip
ANSWERS = Kind(
    "judged answers",
    "`prompt`, `completion` and `label` (true or false); or pairs, which are taken apart: `prompt`, `chosen` and "
    "`rejected`; or `prompt`, `answers` and `scores` or `ranks`",
    _answer_layout, _one_way,
)  # fmt: skip
RANKINGS = Kind(
    PAIRS.name,
    PAIRS.expected,
    _pair_layout,
    lambda problem, number: Ranking.of([_two_ways(problem, number)]),
    ranked,
)
PROMPTS = Kind(
    "prompts", "`prompt` (or `messages`, of which the last answer is left out), and `answer` where it can be checked",
    _prompt_layout, lambda problem, number: Prompt(_question(problem), str(problem.final)),
)  # fmt: skip
