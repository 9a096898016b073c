"""What the cross-field checks read: the values with all defaults, as far as they are valid."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from llmtrain.config.fields import Path, default, find, parts
from llmtrain.config.plain import Finding


class NotValid(LookupError):
    """A check asked for a key that is faulty itself or that this command does not have."""


class View:
    """Values by dotted key. Asking for a key that is faulty, or not there, raises `NotValid` and ends that check."""

    def __init__(
        self, command: str, schema: type, values: Mapping[str, Any], faulty: Iterable[Path], rank: Callable[[Path], int]
    ) -> None:
        self.command = command
        self._schema = schema
        self._values = values
        self._faulty = list(faulty)
        self._rank = rank

    def __getitem__(self, key: str) -> Any:
        path = parts(key)
        for faulty in self._faulty:
            shared = min(len(faulty), len(path))
            if faulty[:shared] == path[:shared]:
                raise NotValid(key)
        value: Any = self._values
        for part in path:
            if not isinstance(value, Mapping) or part not in value:
                raise NotValid(key)
            value = value[part]
        return value

    def sources(self) -> dict[str, dict[str, Any]]:
        """The valid sources of `data.sources`, by name."""
        data = self._values.get("data")
        sources = data.get("sources") if isinstance(data, Mapping) else None
        valid = {}
        for name in sources if isinstance(sources, Mapping) else ():
            with suppress(NotValid):
                valid[name] = self[f"data.sources.{name}"]
        return valid

    def changed(self, key: str) -> bool:
        """Whether the value differs from the schema's default."""
        _, field = find(self._schema, parts(key), self._values)
        value = self[key]
        return field is not None and value != default(field)

    def rank(self, key: str) -> int:
        """The rank of the layer that set the key; -1 where it has its default."""
        return self._rank(parts(key))


def finding(problem: str, *keys: str) -> Finding:
    """A finding at the first key; the others take part."""
    first, *others = map(parts, keys)
    return Finding(first, problem, tuple(others))


def no_effect(view: View, key: str, why: str, *others: str) -> Iterator[Finding]:
    """A finding if the key differs from its default."""
    if view.changed(key):
        yield finding(f"has no effect: {why}", key, *others)
