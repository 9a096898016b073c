"""Prepared text → the rows that a model is pretrained on: blocks of running text, or whole documents packed.

Each row is found by its number alone. Shapes: S tokens of a row.
"""

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from llmtrain.config.schema import CorpusConfig
from llmtrain.data.packing import pack
from llmtrain.data.shards import TokenSource


class TextRow(NamedTuple):
    """One row of pretraining text."""

    tokens: NDArray[np.int64]
    """[S]"""
    mask: NDArray[np.bool_]
    """[S]: which tokens are to be predicted; the first of a row never is."""
    documents: NDArray[np.int32] | None
    """[S]: number of each token's document in the row, where attention stays within documents."""


class TextRows(Protocol):
    """The rows of a source, by number."""

    def __len__(self) -> int:
        """Number of rows."""

    def __getitem__(self, row: int) -> TextRow:
        """A row."""

    def spans(self, row: int) -> list[tuple[int, int]]:
        """From where to where in the tokens of the source it goes."""

    def holding(self, start: int, end: int) -> list[int]:
        """The rows that hold some of the source's tokens [start, end)."""


def text_rows(source: TokenSource, config: CorpusConfig, length: int, pad_id: int) -> TextRows:
    """The rows of `length` tokens of a source, as `data.sequences` and `data.attend_across_documents` want them."""
    if config.sequences == "documents":
        return PackedDocuments(source, length, pad_id, config.attend_across_documents)
    return Blocks(source, length, config.attend_across_documents)


class RunningText(Protocol):
    """Tokens one after another, and where documents end."""

    def num_blocks(self, length: int) -> int: ...
    def tokens(self, start: int, end: int) -> NDArray[np.int64]: ...
    def ends_within(self, start: int, end: int) -> NDArray[np.int64]: ...


class Blocks:
    """Running text cut into blocks of `length` tokens; what is left at the end of the source is not used."""

    def __init__(self, source: RunningText, length: int, attend_across: bool = True) -> None:
        self.source, self.length, self.attend_across = source, length, attend_across

    def __len__(self) -> int:
        return self.source.num_blocks(self.length)

    def __getitem__(self, row: int) -> TextRow:
        [(start, end)] = self.spans(row)
        tokens = self.source.tokens(start, end)
        documents = None
        if not self.attend_across:
            borders = np.zeros(self.length + 1, dtype=np.int32)
            borders[self.source.ends_within(start, end) - start] = 1  # a document ends before this token
            documents = np.cumsum(borders[:-1], dtype=np.int32)
        return TextRow(tokens, _predicted(self.length, documents), documents)

    def spans(self, row: int) -> list[tuple[int, int]]:
        """From where to where in the tokens of the source it goes."""
        return [(row * self.length, (row + 1) * self.length)]

    def holding(self, start: int, end: int) -> list[int]:
        """The rows that hold some of the source's tokens [start, end)."""
        return list(range(start // self.length, min((end - 1) // self.length + 1, len(self))))


class PackedDocuments:
    """Whole documents, best-fit packed into rows of `length` tokens and padded; longer ones are cut."""

    def __init__(self, source: TokenSource, length: int, pad_id: int, attend_across: bool = True) -> None:
        self.source, self.length, self.pad_id, self.attend_across = source, length, pad_id, attend_across
        self._ends = source.ends()
        self._packed = pack(np.diff(self._ends, prepend=0), length)

    def __len__(self) -> int:
        return len(self._packed)

    def __getitem__(self, row: int) -> TextRow:
        tokens = np.full(self.length, self.pad_id, dtype=np.int64)
        numbers = np.full(self.length, np.iinfo(np.int32).max, dtype=np.int32)
        place = 0
        for number, (start, end) in enumerate(self.spans(row)):
            behind = place + end - start
            tokens[place:behind], numbers[place:behind] = self.source.tokens(start, end), number
            place = behind
        numbers[place:] = numbers[place - 1] + 1  # padding is a document of its own
        mask = _predicted(self.length, None if self.attend_across else numbers)
        mask[place:] = False
        return TextRow(tokens, mask, None if self.attend_across else numbers)

    def spans(self, row: int) -> list[tuple[int, int]]:
        """From where to where in the tokens of the source each of its documents goes."""
        begins = [(int(self._ends[p.document - 1]) if p.document else 0, p) for p in self._packed[row]]
        return [(begin + piece.start, begin + piece.start + piece.length) for begin, piece in begins]

    def holding(self, start: int, end: int) -> list[int]:
        """The rows that hold some of the source's tokens [start, end)."""
        first, last = np.searchsorted(self._ends, [start, end - 1], side="right")
        pieces = np.flatnonzero((self._packed.document >= first) & (self._packed.document <= last))
        rows = np.searchsorted(self._packed.borders, pieces, side="right") - 1
        return sorted(
            row for row in set(rows.tolist()) if any(a < end and start < b for a, b in self.spans(row))
        )  # fmt: skip


def row_of_documents(pieces: list[NDArray[np.int64]], attend_across: bool) -> TextRow:
    """The row that consecutive pieces of documents make, each of another document."""
    documents = None
    if not attend_across:
        lengths = [len(piece) for piece in pieces]
        documents = np.repeat(np.arange(len(pieces), dtype=np.int32), lengths)
    tokens = np.concatenate(pieces)
    return TextRow(tokens, _predicted(len(tokens), documents), documents)


def _predicted(length: int, documents: NDArray[np.int32] | None) -> NDArray[np.bool_]:
    """All tokens but the first of the row, or but the first of each document."""
    mask = np.ones(length, dtype=np.bool_)
    mask[0] = False
    if documents is not None:
        mask[1:] = documents[1:] == documents[:-1]
    return mask
