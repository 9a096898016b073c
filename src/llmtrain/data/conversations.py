"""Conversations and preference pairs → ids and loss masks.

The text is cut where the assistant begins and stops speaking, and the pieces are encoded one by one. So no token
reaches across a border: the ids of a prompt are exactly the first ids of the conversation that goes on from it, a
model is asked at the very place it was trained on, and the mask needs no look at characters. For templates with
special tokens at the borders (nearly all) this gives the same ids as encoding the whole text.
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import Literal

from llmtrain.config.errors import DataError
from llmtrain.data.templates import Message
from llmtrain.data.tokenizers import Tokenizer

# Ids of a row, and whether each is to be predicted: true on what the assistant says, its end token included.
Row = tuple[list[int], list[bool]]
LossOn = Literal["all", "last", "flagged"]


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Ids of `messages` up to where the assistant's next turn begins."""
    return _encode(tokenizer, messages, add_generation_prompt=True)[0]


def encode_conversation(tokenizer: Tokenizer, messages: Sequence[Message], loss_on: LossOn = "all") -> Row:
    """Ids of `messages`, and which of them are learned: what the assistant says and its ends of turns, in these turns.

    Raises DataError where the template refuses the messages, or does not show which part is which turn.
    """
    return _encode(tokenizer, with_flags(messages, loss_on))


def encode_pair(tokenizer: Tokenizer, prompt: Sequence[Message], chosen: str, rejected: str) -> tuple[Row, Row]:
    """The two ways in which `prompt` goes on; only the last turn is in the masks."""
    chosen_row, rejected_row = (
        encode_conversation(tokenizer, [*prompt, {"role": "assistant", "content": answer}], "last")
        for answer in (chosen, rejected)
    )
    return chosen_row, rejected_row


def with_flags(messages: Sequence[Message], loss_on: LossOn) -> list[Message]:
    """The messages with `train` on each: whether it is learned.

    Raises DataError where a message of someone else than the assistant is to be learned.
    """
    if loss_on == "flagged":
        for message in messages:
            if message["role"] != "assistant" and message.get("train"):
                raise DataError(f"only the assistant's turns can be learned, not one of the {message['role']}")
        return [{**message, "train": message.get("train", message["role"] == "assistant")} for message in messages]
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    learned = set(turns if loss_on == "all" else turns[-1:])
    return [{**message, "train": number in learned} for number, message in enumerate(messages)]


def divide(tokenizer: Tokenizer, messages: Sequence[Message], max_length: int) -> list[Row | None]:
    """A long conversation with flags (`with_flags`) as rows of at most `max_length` tokens; None for what fits in none.

    It is divided before turns of the user; each row begins with the system message, and holds as many turns as fit.
    """
    system = list(takewhile(lambda message: message["role"] == "system", messages))
    rows: list[Row | None] = []
    begun: list[Message] = []
    last: Row | None = None  # the ids of what has begun
    for exchange in _exchanges(messages[len(system) :]):
        longer = _encode(tokenizer, [*system, *begun, *exchange])
        if begun and len(longer[0]) > max_length:
            rows.append(last)
            begun, longer = [], _encode(tokenizer, [*system, *exchange])
        if len(longer[0]) > max_length:
            rows.append(None)
        else:
            begun, last = [*begun, *exchange], longer
    return [*rows, last] if begun else rows


def _exchanges(messages: Sequence[Message]) -> list[list[Message]]:
    """The messages cut before each turn of the user that follows a turn of another."""
    exchanges: list[list[Message]] = []
    before = ""
    for message in messages:
        if not exchanges or (message["role"] == "user" and before != "user"):
            exchanges.append([])
        exchanges[-1].append(message)
        before = message["role"]
    return exchanges


def _encode(tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = False) -> Row:
    """Ids and mask of messages, those of the assistant with `train`."""
    shown = [{key: value for key, value in message.items() if key != "train"} for message in messages]
    flags = [bool(message.get("train")) for message in messages if message["role"] == "assistant"]
    rendered = tokenizer.template.render(shown, add_generation_prompt, [i for i, flag in enumerate(flags) if flag])
    segments, spoken = rendered.segments()
    learned = iter(_learned(flags, sum(spoken)) if rendered.turns is None else [flags[i] for i in rendered.turns])
    ids: list[int] = []
    mask: list[bool] = []
    for piece, answer in zip(tokenizer.encode_rendered(segments), spoken, strict=True):
        ids += piece
        mask += [answer and next(learned)] * (_spoken_length(piece, tokenizer) if answer else len(piece))
        mask += [False] * (len(ids) - len(mask))
    return ids, mask


def _learned(turns: list[bool], count: int) -> list[bool]:
    """Which of `count` parts that the template marks are learned, where `turns` says it of the assistant's turns."""
    if len(turns) == count or not count:
        return turns
    if all(turns) or not any(turns):
        return [any(turns)] * count
    if turns.index(True) == len(turns) - 1:
        return [False] * (count - 1) + [True]
    raise DataError(
        f"the chat template marks {count} parts with {{% generation %}} where the assistant has {len(turns)} turns, so "
        "it cannot be told which of them data.loss_on=flagged means"
    )


def _spoken_length(answer: list[int], tokenizer: Tokenizer) -> int:
    """The answer's length up to its end token: templates without marks count a line break after it to the turn."""
    ends = [i for i, token in enumerate(answer) if token in tokenizer.stop_ids]
    return ends[-1] + 1 if ends else len(answer)
