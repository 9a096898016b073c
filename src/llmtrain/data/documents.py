"""Sources of text → documents."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from llmtrain.config.errors import DataError
from llmtrain.config.schema import SourceConfig
from llmtrain.data.embedded import PREFIX, embedded_documents
from llmtrain.data.records import Faults, Placed, RowError, Split, hold_out, read_records


def read_documents(
    source: SourceConfig, validation_every: int, split: Split, cache_dir: Path, faults: Faults
) -> Iterator[str]:
    """The training or held-out documents of a source, in order.

    Held out is `validation_path`, else every `validation_every`-th document; a source with fewer documents than that
    gives the end of its last one. Rows without a text go to `faults`. Raises DataError for what is missing.
    """
    if source.validation_path is not None:
        path = source.validation_path if split == "validation" else source.path
        yield from _texts(source, path, split, cache_dir, faults)
    else:
        texts = _texts(source, source.path, "train", cache_dir, faults)
        yield from hold_out(texts, validation_every, split, lambda text, _: _cut(text, validation_every))


def _texts(source: SourceConfig, path: str, split: Split, cache_dir: Path, faults: Faults) -> Iterator[str]:
    """All documents of `path` but empty ones. Raises DataError when there is none."""
    texts: Iterator[str | RowError]
    if path.startswith(PREFIX):
        texts = embedded_documents(path.removeprefix(PREFIX))
    else:
        part = source.split if split == "train" else "validation"
        records = read_records(path, split=part, name=source.name, cache_dir=cache_dir)
        texts = (_text(placed, source.text_column) for placed in records)
    found = False
    for text in islice(texts, source.max_documents):
        if isinstance(text, RowError):
            faults.add(text)
        elif text:
            found = True
            yield text
    if not found:
        raise DataError(f"{path}: no documents in there")


def _text(placed: Placed, column: str) -> str | RowError:
    place, record = placed
    if isinstance(record, RowError):
        return record
    if column not in record:
        there = ", ".join(record)
        return RowError(
            f"no column {column!r}", f"{place}: no column {column!r}; there are: {there}. Choose one with text_column="
        )
    text = record[column]
    if not isinstance(text, str):
        return RowError("not text", f"{place}: column {column!r} holds {text!r:.80}, not text")
    return text


def _cut(text: str, every: int) -> tuple[str | None, str | None]:
    """The last 1/`every` of a text apart from the rest, cut at a line's or word's end where there is one."""
    about = len(text) - max(1, len(text) // every)
    ends = [place + 1 for mark in ("\n", " ") if (place := text.rfind(mark, about // 2, about)) >= 0]
    place = ends[0] if ends else about
    return text[:place] or None, text[place:]
