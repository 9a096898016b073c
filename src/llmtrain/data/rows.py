"""Sources of conversations, preference pairs and prompts → rows; what the columns mean is told from their names."""

import dataclasses
import logging
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

from llmtrain.config.errors import DataError
from llmtrain.config.schema import RowSourceConfig
from llmtrain.data import arithmetic
from llmtrain.data.embedded import PREFIX
from llmtrain.data.pieces import Place
from llmtrain.data.records import Faults, Record, RowError, Split, hold_out, read_records
from llmtrain.data.templates import Message

log = logging.getLogger(__name__)

Messages = list[Message]
Row = TypeVar("Row")


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Turns, of which the assistant's are learned."""

    messages: Messages


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two ways in which the assistant goes on; `answer` is what a right one ends in, where that can be checked."""

    prompt: Messages
    chosen: str
    rejected: str
    answer: str | None = None


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Turns up to where the assistant is to speak; `answer` as in `Pair`."""

    messages: Messages
    answer: str | None = None


@dataclasses.dataclass(frozen=True)
class Kind(Generic[Row]):
    """What rows a stage wants, and how they are read from a record and made from a generated problem."""

    name: str
    expected: str
    layout: Callable[[Record], str | None]
    read: Callable[[Record], Row]
    generated: Callable[[arithmetic.Problem, int], Row]


# Column names that mean the same, the usual one first.
QUESTIONS = ("prompt", "instruction", "question", "query")
ANSWERS = ("completion", "response", "output", "answer")
TALKS = ("messages", "conversations", "conversation")
ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "observation": "tool", "function": "tool",
}  # fmt: skip
# Anthropic's HH data writes a conversation as one text with these at the beginning of each turn.
HH_TURN = re.compile(r"\n\n(Human|Assistant): ?")


def read_rows(
    kind: Kind[Row], source: RowSourceConfig, validation_every: int, split: Split, cache_dir: Path, faults: Faults
) -> Iterator[Row]:
    """The training or held-out rows of a source, in order.

    Held out is `validation_path`, else every `validation_every`-th row. Rows that cannot be read go to `faults`.
    Raises DataError for what is missing, and where the first row has columns that are no rows of this kind.
    """
    limit = source.max_rows
    if source.path.startswith(PREFIX) and source.validation_path is None:
        yield from islice(_generated(kind, source.path, split), limit)
    elif source.validation_path is not None:
        path = source.validation_path if split == "validation" else source.path
        yield from islice(_all_rows(kind, path, split, source, cache_dir, faults), limit)
    else:
        rows = islice(_all_rows(kind, source.path, "train", source, cache_dir, faults), limit)
        yield from hold_out(rows, validation_every, split, _last_row)


def read_problems(path: str, limit: int, cache_dir: Path) -> list[Prompt]:
    """Held-out problems with one right answer: a file of {prompt, answer}, or `embedded:arithmetic`."""
    source = RowSourceConfig(path=path, weight=1.0, validation_path=path, max_rows=limit)
    problems = list(read_rows(PROMPTS, source, 2, "validation", cache_dir, Faults()))
    for number, problem in enumerate(problems, 1):
        if problem.answer is None:
            raise DataError(f"{path}: problem {number} has no `answer`; expected rows with `prompt` and `answer`")
    return problems


def _all_rows(
    kind: Kind[Row], path: str, split: Split, source: RowSourceConfig, cache_dir: Path, faults: Faults
) -> Iterator[Row]:
    if path.startswith(PREFIX):
        yield from _generated(kind, path, split)
        return
    layout: str | None = None
    part = source.split if split == "train" else "validation"
    for place, record in read_records(path, split=part, name=source.name, cache_dir=cache_dir):
        if isinstance(record, RowError):
            faults.add(record)
            continue
        if layout is None:
            layout = kind.layout(record)
            if layout is None:
                raise DataError(
                    f"{place}: these columns are no {kind.name}: {', '.join(record)}\nexpected {kind.expected}"
                    f"\nthe row: {_short(record)}"
                )
            log.info("%s: read as %s", path, layout)
        row = _read(kind, place, record)
        if isinstance(row, RowError):
            faults.add(row)
        else:
            yield row
    if layout is None:
        raise DataError(f"{path}: no rows in there")


def _read(kind: Kind[Row], place: Place, record: Record) -> Row | RowError:
    try:
        return kind.read(record)
    except DataError as error:
        message = str(error)
    except KeyError as error:
        message = f"this row has no {error}"
    except (TypeError, AttributeError) as error:
        message = f"not like the rows before ({error!r})"
    return RowError(f"not {kind.name}", f"{place}: {message}\nthe row: {_short(record)}")


def _generated(kind: Kind[Row], path: str, split: Split) -> Iterator[Row]:
    if path != f"{PREFIX}arithmetic":
        raise DataError(f"{path}: there are no such rows; the one generated source of rows is {PREFIX}arithmetic")
    training = (arithmetic.problem(index) for index in range(arithmetic.TRAIN_PROBLEMS))
    problems = training if split == "train" else arithmetic.held_out_problems()
    return (kind.generated(problem, number) for number, problem in enumerate(problems))


def _last_row(row: Row, number: int) -> tuple[Row | None, Row | None]:
    """A source with fewer rows than that holds out its last; one with a single row nothing."""
    return (row, None) if number == 1 else (None, row)


# What records say -------------------------------------------------------------------------------------------------


def _conversation(record: Record) -> Conversation:
    messages = _talk(record)
    if messages is None:
        completion = _first(record, ANSWERS)
        messages = [*_prompt(record), *_messages(record[completion or "completion"], "assistant")]
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError("nothing in this conversation is said by the assistant")
    return Conversation(messages)


def _pair(record: Record) -> Pair:
    chosen, rejected = (_messages(record[side], "assistant") for side in ("chosen", "rejected"))
    whole = chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant"
    prompt = [] if whole else _prompt(record)
    while len(chosen) > 1 and len(rejected) > 1 and chosen[0] == rejected[0]:
        prompt.append(chosen.pop(0))
        rejected.pop(0)
    if [message["role"] for message in [*chosen, *rejected]] != ["assistant", "assistant"]:
        raise DataError("`chosen` and `rejected` must differ in the assistant's last turn only")
    if not prompt:
        raise DataError("there is no prompt, neither in a column of its own nor at the beginning of `chosen`")
    return Pair(prompt, chosen[0]["content"], rejected[0]["content"], _answer(record))


def _prompt_only(record: Record) -> Prompt:
    messages = _talk(record)
    if messages is None:
        messages = _pair(record).prompt if _first(record, QUESTIONS) is None else _prompt(record)
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise DataError("there is no prompt in this row")
    return Prompt(messages, _answer(record))


def _prompt(record: Record) -> Messages:
    messages = _messages(record[_first(record, QUESTIONS) or "prompt"], "user")
    if record.get("input") and "instruction" in record:
        messages = [{"role": "user", "content": f"{record['instruction']}\n\n{record['input']}"}]
    if isinstance(record.get("system"), str) and record["system"]:
        messages.insert(0, {"role": "system", "content": record["system"]})
    return messages


def _talk(record: Record) -> Messages | None:
    column = _first(record, TALKS)
    return None if column is None else _messages(record[column], "user")


def _messages(value: Any, role: str) -> Messages:
    """Messages in any of the usual ways of writing them; a mere text is said by `role`."""
    if isinstance(value, str):
        return _hh_messages(value) if HH_TURN.match(value) else [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise DataError(f"expected a text or a list of messages, found {_short(value)}")
    return [_message(each) for each in value]


def _message(message: Any) -> Message:
    if not isinstance(message, dict) or not ({"role", "content"} <= set(message) or {"from", "value"} <= set(message)):
        raise DataError(f"a message needs `role` and `content` (or `from` and `value`), found {_short(message)}")
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if isinstance(content, list):  # parts of typed content; pictures and sounds are not for this model
        content = "".join(part.get("text", "") for part in content)
    if not isinstance(content, str):
        raise DataError(f"the content of a message must be text, found {_short(content)}")
    return {"role": ROLES.get(str(role), str(role)), "content": content}


def _hh_messages(text: str) -> Messages:
    _, *parts = HH_TURN.split(text)
    return [
        {"role": "user" if who == "Human" else "assistant", "content": said.strip()}
        for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def _answer(record: Record) -> str | None:
    return str(record["answer"]) if isinstance(record.get("answer"), str | int | float) else None


def _first(record: Record, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if record.get(name) is not None), None)


def _conversation_layout(record: Record) -> str | None:
    talk, prompt, completion = (_first(record, names) for names in (TALKS, QUESTIONS, ANSWERS))
    if talk or not (prompt and completion):
        return f"conversations in `{talk}`" if talk else None
    return f"one question (`{prompt}`{' with `input`' if 'input' in record else ''}) and answer (`{completion}`)"


def _pair_layout(record: Record) -> str | None:
    prompt = _first(record, QUESTIONS)
    if not {"chosen", "rejected"} <= set(record):
        return None
    return f"pairs of answers to `{prompt}`" if prompt else "pairs of whole conversations in `chosen` and `rejected`"


def _prompt_layout(record: Record) -> str | None:
    column = _first(record, (*TALKS, *QUESTIONS))
    return f"prompts in `{column}`" if column else _pair_layout(record)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 300 else text[:300] + " ..."


# What a generated problem makes -----------------------------------------------------------------------------------


def _asked(problem: arithmetic.Problem) -> Messages:
    return [{"role": "user", "content": problem.prompt}]


def _worked(problem: arithmetic.Problem, number: int) -> Conversation:
    return Conversation([*_asked(problem), {"role": "assistant", "content": arithmetic.demonstration(problem, number)}])


def _judged(problem: arithmetic.Problem, number: int) -> Pair:
    return Pair(_asked(problem), problem.answer, arithmetic.wrong_answer(problem), str(problem.final))


CONVERSATIONS = Kind(
    "conversations",
    "`messages` (or ShareGPT's `conversations`), `prompt` and `completion`, or `instruction`, `input` and `output`",
    _conversation_layout, _conversation, _worked,
)  # fmt: skip
PAIRS = Kind(
    "preference pairs", "`prompt`, `chosen` and `rejected`, or whole conversations in `chosen` and `rejected`",
    _pair_layout, _pair, _judged,
)  # fmt: skip
PROMPTS = Kind(
    "prompts", "`prompt` (or `messages`, of which the last answer is left out), and `answer` where it can be checked",
    _prompt_layout, _prompt_only, lambda problem, number: Prompt(_asked(problem), str(problem.final)),
)  # fmt: skip
