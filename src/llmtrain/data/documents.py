"""Sources of text → documents, portion by portion, each for training or held out.

A portion is what one process reads at a time. How a source is divided into portions follows from its files alone, so
the documents and their splits are the same whoever reads them, and however many read.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from llmtrain.config.schema import SourceConfig
from llmtrain.config.seeds import derive_seed
from llmtrain.data.embedded import PREFIX, embedded_documents
from llmtrain.data.files import is_hub_id
from llmtrain.data.pieces import Piece, Place, find_pieces
from llmtrain.data.records import Faults, Placed, RowError, Split, read_piece

PORTION_BYTES = 8 * 1024 * 1024  # pieces are put together up to this, or more where there would be too many
MAX_PORTIONS = 4096
BATCH_CHARACTERS = 1_000_000  # of text that is worked on at a time

# A document as it is to be used, or None; what was done or is wrong is counted.
Cleaner = Callable[[str, Counter[str]], str | None]


class Portion(NamedTuple):
    """Pieces that are read one after the other."""

    number: int
    pieces: tuple[Piece, ...]
    split: Split | None
    """Of all documents in it; None: of every n documents one is held out."""
    is_only: bool
    """Whether the source has no other."""
    max_rows: int | None = None

    @property
    def size(self) -> int:
        """About how many bytes it has."""
        return sum(piece.size for piece in self.pieces)


class Batch(NamedTuple):
    """What comes of some rows of a portion: every row is a document, a fault, or counted as left out."""

    rows: int
    documents: list[tuple[Place, str]]
    faults: list[RowError]
    counts: Counter[str]
    """Reasons for which rows were left out, and what else cleaning did."""
    is_last: bool


class Document(NamedTuple):
    """A text, where it comes from and what it is for."""

    place: Place
    text: str
    split: Split


def find_portions(source: SourceConfig, cache_dir: Path, streaming: bool = False) -> list[Portion]:
    """All that is to be read of a source, training text first. Raises DataError for what is missing.

    With `streaming`, a hub data set is read from there as it is needed, not downloaded first.
    """
    if source.validation_path is None:
        return _portions(source, source.path, source.split, None, cache_dir, streaming)
    train = _portions(source, source.path, source.split, "train", cache_dir, streaming)
    held_out = _portions(source, source.validation_path, "validation", "validation", cache_dir, streaming)
    return [*train, *(each._replace(number=len(train) + each.number) for each in held_out)]


def read_portion(
    portion: Portion, source: SourceConfig, cache_dir: Path, *, clean: Cleaner | None = None, first_row: int = 0
) -> Iterator[Batch]:
    """The documents of a portion from row `first_row` on, in batches of about `BATCH_CHARACTERS`.

    Batches end at the same rows whether reading begins at the first row or at the first of another batch.
    """
    batch = Batch(0, [], [], Counter(), False)
    size = 0
    for placed in islice(_rows(portion, cache_dir), first_row, portion.max_rows):
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = Batch(0, [], [], Counter(), False), 0
        batch = batch._replace(rows=batch.rows + 1)
        text = _text(placed, source.text_column)
        if isinstance(text, RowError):
            batch.faults.append(text)
            continue
        size += len(text)
        kept = clean(text, batch.counts) if clean and text else text
        if kept:
            batch.documents.append((placed[0], kept))
        elif not text:
            batch.counts["empty"] += 1
    yield batch._replace(is_last=True)


def assign_splits(portion: Portion, batch: Batch, documents_before: int, validation_every: int) -> list[Document]:
    """What each document is for: every `validation_every`-th of a portion is held out.

    Each portion begins to count somewhere else, so that small portions hold out their share too. A source with fewer
    documents than that gives the end of its last one.
    """
    if portion.split is not None:
        return [Document(place, text, portion.split) for place, text in batch.documents]
    begin = derive_seed("hold out", portion.number) % validation_every if portion.number else 0
    documents: list[Document] = []
    for number, (place, text) in enumerate(batch.documents, documents_before + 1):
        is_held_out = (begin + number) % validation_every == 0
        documents.append(Document(place, text, "validation" if is_held_out else "train"))
    if portion.is_only and batch.is_last and documents and documents_before + len(documents) < validation_every:
        place, text, _ = documents.pop()
        train, held_out = _cut(text, validation_every)
        documents += [Document(place, train, "train")] if train else []
        documents.append(Document(place, held_out, "validation"))
    return documents


def read_documents(source: SourceConfig, validation_every: int, cache_dir: Path, faults: Faults) -> Iterator[str]:
    """The training documents of a source, in order; rows without a text go to `faults`."""
    portions = find_portions(source, cache_dir)
    for portion in (each for each in portions if each.split != "validation"):
        before = 0
        for batch in read_portion(portion, source, cache_dir):
            for fault in batch.faults:
                faults.add(fault)
            for document in assign_splits(portion, batch, before, validation_every):
                if document.split == "train":
                    yield document.text
            before += len(batch.documents)


def _portions(
    source: SourceConfig, path: str, part: str, split: Split | None, cache_dir: Path, streaming: bool
) -> list[Portion]:
    pieces = _pieces(source, path, part, cache_dir, streaming)
    enough = max(PORTION_BYTES, sum(piece.size for piece in pieces) // MAX_PORTIONS)
    groups: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        # how many documents there are is known only to who reads them all
        if groups[-1] and size + piece.size > enough and source.max_documents is None:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += piece.size
    is_only = len(groups) == 1
    return [Portion(i, tuple(each), split, is_only, source.max_documents) for i, each in enumerate(groups)]


def _pieces(source: SourceConfig, path: str, part: str, cache_dir: Path, streaming: bool) -> list[Piece]:
    if path.startswith(PREFIX):
        return [Piece(path, "embedded", 0)]
    if streaming and is_hub_id(path):
        return [Piece(path, "stream", 0, name=source.name, split=part)]
    return find_pieces(path, split=part, name=source.name, cache_dir=cache_dir)


def _rows(portion: Portion, cache_dir: Path) -> Iterator[Placed]:
    for piece in portion.pieces:
        if piece.kind == "embedded":
            texts = embedded_documents(piece.file.removeprefix(PREFIX))
            yield from ((Place(piece, number), {"text": text}) for number, text in enumerate(texts, 1))
        else:
            yield from read_piece(piece, cache_dir)


def _text(placed: Placed, column: str) -> str | RowError:
    place, record = placed
    if isinstance(record, RowError):
        return record
    if column not in record:
        there = ", ".join(record)
        message = f"{place}: no column {column!r}; there are: {there}. Choose one with text_column="
        return RowError(f"no column {column!r}", message)
    text = record[column]
    if not isinstance(text, str):
        return RowError("not text", f"{place}: column {column!r} holds {text!r:.80}, not text")
    return text


def _cut(text: str, every: int) -> tuple[str, str]:
    """The last 1/`every` of a text apart from the rest, cut at a line's or word's end where there is one."""
    about = len(text) - max(1, len(text) // every)
    ends = [place + 1 for mark in ("\n", " ") if (place := text.rfind(mark, about // 2, about)) >= 0]
    place = ends[0] if ends else about
    return text[:place], text[place:]
