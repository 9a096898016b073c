"""Sources of conversations, preference pairs, judged answers and prompts → rows.

Every record of a source gives rows, or is counted with the reason why not (`Faults`): none is lost in silence.
"""

import logging
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

from llmtrain.config.errors import DataError
from llmtrain.config.schema import RowSourceConfig
from llmtrain.data import arithmetic
from llmtrain.data.columns import Columns
from llmtrain.data.embedded import PREFIX
from llmtrain.data.kinds import (
    ANSWERS,
    CONVERSATIONS,
    PAIRS,
    PROMPTS,
    RANKINGS,
    Answer,
    Conversation,
    Kind,
    Layout,
    LeftOut,
    Prompt,
)
from llmtrain.data.messages import short
from llmtrain.data.pieces import Place
from llmtrain.data.ranked import Pair, Ranking, leave_out
from llmtrain.data.records import Faults, Record, RowError, Split, hold_out, read_records
from llmtrain.data.wordings import Wordings

__all__ = [
    "ANSWERS",
    "CONVERSATIONS",
    "PAIRS",
    "PROMPTS",
    "RANKINGS",
    "Answer",
    "Conversation",
    "Kind",
    "Pair",
    "Prompt",
    "Ranking",
    "read_problems",
    "read_rows",
]

log = logging.getLogger(__name__)

Row = TypeVar("Row")


def read_rows(
    kind: Kind[Row], source: RowSourceConfig, validation_every: int, split: Split, cache_dir: Path, faults: Faults
) -> Iterator[Row]:
    """The training or held-out rows of a source, in order.

    Held out is `validation_path`, else what every `validation_every`-th record gives: several pairs of one record, or
    of one prompt, stay together. Records that cannot be used go to `faults`. Raises DataError for what is missing, and
    where nothing in there can be used.
    """
    if source.path.startswith(PREFIX) and source.validation_path is None:
        yield from chain.from_iterable(islice(_generated(kind, source.path, split), source.max_rows))
    elif source.validation_path is not None:
        path = source.validation_path if split == "validation" else source.path
        yield from chain.from_iterable(_groups(kind, path, split, source, cache_dir, faults))
    else:
        # reading the same file again for the rows held out, there is nothing new to tell
        groups = _groups(kind, source.path, "train", source, cache_dir, faults, tell=split == "train")
        held = hold_out(groups, validation_every, split, _last_group)
        yield from chain.from_iterable(held)


def read_problems(path: str, limit: int, cache_dir: Path) -> list[Prompt]:
    """Held-out problems with one right answer: a file of {prompt, answer}, or `embedded:arithmetic`."""
    source = RowSourceConfig(path=path, weight=1.0, validation_path=path, max_rows=limit)
    problems = list(read_rows(PROMPTS, source, 2, "validation", cache_dir, Faults()))
    for number, problem in enumerate(problems, 1):
        if problem.answer is None:
            raise DataError(f"{path}: problem {number} has no `answer`; expected rows with `prompt` and `answer`")
    return problems


def _groups(
    kind: Kind[Row], path: str, split: Split, source: RowSourceConfig, cache_dir: Path, faults: Faults,
    tell: bool = True,
) -> Iterator[list[Row]]:  # fmt: skip
    """Rows that belong together: those of one record, or of records with the same prompt."""
    if path.startswith(PREFIX):
        yield from islice(_generated(kind, path, split), source.max_rows)
        return
    part = source.split if split == "train" else "validation"
    reader = _Reader(kind, source, path, faults, tell)
    records = read_records(path, split=part, name=source.name, cache_dir=cache_dir)
    groups = (group for place, record in records if (group := reader.read(place, record)))
    yield from kind.join(islice(groups, source.max_rows), path, faults)
    if not reader.used:
        report = f": none of the {reader.seen} rows can be used\n{faults.report()}" if reader.seen else ""
        raise DataError(f"{path}{report or ': no rows in there'}")


class _Reader:
    """Reads the records of one path; says once how they are read, and counts what cannot be."""

    def __init__(self, kind: Kind[Any], source: RowSourceConfig, path: str, faults: Faults, tell: bool) -> None:
        self.kind, self.path, self.faults, self.tell = kind, path, faults, tell
        self.columns = Columns(source)
        self.wordings = Wordings(source)
        self.seen = self.used = 0
        self.said: set[str] = set()
        self.layout: Layout | None = None

    def read(self, place: Place, record: Record | RowError) -> list[Any]:
        """What the next record gives; nothing where it cannot be used."""
        self.seen += 1
        found = record if isinstance(record, RowError) else self._read(place, record)
        if isinstance(found, LeftOut):
            leave_out(self.faults, found)
        elif isinstance(found, RowError):
            self.faults.add(found)
        else:
            self.used += 1
            return found
        return []

    def _read(self, place: Place, record: Record) -> list[Any] | RowError:
        try:
            return self._rows(place, record)
        except LeftOut as fault:
            return fault
        except DataError as error:
            return RowError(f"not {self.kind.name}", f"{place}: {error}\nthe row: {short(record)}")

    def _rows(self, place: Place, record: Record) -> list[Any]:
        if self.wordings:
            record = self.wordings.word(record, self.seen)
        fields = self.columns.fields(record, place)
        # a row that fits no layout is one of the last layout that lacks something, and reading it so says what
        layout = self.layout = self.kind.layout(fields) or self.layout
        if layout is None:
            there = "`columns` names" if fields.explicit else "these columns are"
            names = ", ".join(fields.names if fields.explicit else record)
            raise DataError(f"{there} no {self.kind.name}: {names}\nexpected {self.kind.expected}")
        if self.tell and layout.said not in self.said:
            self.said.add(layout.said)
            count = len(self.wordings)
            worded = f", worded by {count} templates" if count else ""
            log.info("%s: read as %s%s", self.path, layout.said, worded)
        return layout.read(fields)


def _generated(kind: Kind[Row], path: str, split: Split) -> Iterator[list[Row]]:
    if path != f"{PREFIX}arithmetic":
        raise DataError(f"{path}: there are no such rows; the one generated source of rows is {PREFIX}arithmetic")
    training = (arithmetic.problem(index) for index in range(arithmetic.TRAIN_PROBLEMS))
    problems = training if split == "train" else arithmetic.held_out_problems()
    return ([kind.generated(problem, number)] for number, problem in enumerate(problems))


def _last_group(group: list[Row], number: int) -> tuple[list[Row] | None, list[Row] | None]:
    """A source with fewer records than that holds out its last; one with a single record nothing."""
    return (group, None) if number == 1 else (None, group)
