"""Which column of a record holds what: told from the names, or said in the config (`columns`)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from llmtrain.config.errors import DataError
from llmtrain.config.schema import RowSourceConfig
from llmtrain.data.messages import MessageKeys
from llmtrain.data.pieces import Place
from llmtrain.data.records import Record

# Column names that mean the same, the usual one first.
KNOWN = {
    "messages": ("messages", "conversations", "conversation"),
    "prompt": ("prompt", "instruction", "question", "query"),
    "input": ("input",),
    "history": ("history",),
    "system": ("system", "system_prompt"),
    "completion": ("completion", "response", "output", "answer"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "label": ("label",),
    "score": ("score", "reward", "rating"),
    "answers": ("answers", "completions", "responses"),
    "scores": ("scores", "rewards", "ratings"),
    "ranks": ("ranks", "ranking", "rank"),
    "answer": ("answer",),
    "margin": ("margin",),
}
MESSAGE_KEYS = ("role", "content", "train")


@dataclasses.dataclass(frozen=True)
class Fields:
    """What a record holds, by meaning. `names` are the columns that say it; a field that is null has no value."""

    values: Mapping[str, Any]
    names: Mapping[str, str]
    keys: MessageKeys
    place: Place
    explicit: bool = False

    def named(self, *meanings: str) -> bool:
        """Whether there are columns for all of these."""
        return all(meaning in self.names for meaning in meanings)

    def __getitem__(self, meaning: str) -> Any:
        if meaning not in self.values:
            raise DataError(f"this row has no `{self.names.get(meaning, meaning)}`")
        return self.values[meaning]

    def get(self, meaning: str) -> Any:
        """The field, or None."""
        return self.values.get(meaning)

    def called(self, meaning: str) -> str:
        """The name of the field's column, for messages."""
        return f"`{self.names[meaning]}`"


class Columns:
    """How the records of a source are read as fields.

    Where the config names columns, only these are read; else each record's own column names say what they hold, so
    that the files of a folder may differ.
    """

    def __init__(self, source: RowSourceConfig) -> None:
        said = {} if source.columns is None else dataclasses.asdict(source.columns)
        named = {meaning: name for meaning, name in said.items() if name is not None}
        keys: dict[str, Any] = {key: (named.pop(key),) for key in MESSAGE_KEYS if key in named}
        self.keys = MessageKeys(**keys, roles=source.roles)
        self.named = named
        self._seen: set[str] = set()

    def fields(self, record: Record, place: Place) -> Fields:
        """The fields of a record.

        Raises DataError where the config names a column that is neither there nor in an earlier record.
        """
        self._seen.update(name for name in self.named.values() if name in record)
        missing = [name for name in self.named.values() if name not in self._seen]
        if missing:
            raise DataError(f"no column `{missing[0]}`, which `columns` names; there are: {', '.join(record)}")
        names = self.named or _names(record)
        values = {meaning: record[name] for meaning, name in names.items() if record.get(name) is not None}
        return Fields(values, names, self.keys, place, explicit=bool(self.named))


def _names(record: Record) -> dict[str, str]:
    found = {
        meaning: name
        for meaning, names in KNOWN.items()
        if (name := next((name for name in names if record.get(name) is not None), None))
    }
    # these names mean what Alpaca means by them only beside an `instruction`
    if found.get("prompt") != "instruction":
        found.pop("input", None)
        found.pop("history", None)
    return found
