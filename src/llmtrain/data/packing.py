"""Whole documents into rows of one length: best-fit decreasing.

Ding et al. 2024 ("Fewer Truncations Improve Language Modeling", arXiv 2404.10830, section 3): documents longer than a
row are cut into rows, and what is left of them goes, like all others, longest first, to the row with the least space
that still holds it. Here all documents of one length are placed together, so ten million take seconds. The result is
three flat arrays and the border of each row in them: a row is found in constant time.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmtrain.data.encoding import TokenRow


class Piece(NamedTuple):
    """Tokens [start, start + length) of a document."""

    document: int
    start: int
    length: int


@dataclass(frozen=True)
class Packed:
    """Rows of pieces; the longest piece of a row stands first."""

    borders: NDArray[np.int64]
    """[rows + 1]: row r holds pieces borders[r] to borders[r + 1]."""
    document: NDArray[np.int32]
    """[pieces]: number of the document."""
    start: NDArray[np.int64]
    """[pieces]: where the piece begins in its document."""
    length: NDArray[np.int32]
    """[pieces]: its tokens."""

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.borders) - 1

    def __getitem__(self, row: int) -> list[Piece]:
        """The pieces of a row, in order."""
        here = slice(int(self.borders[row]), int(self.borders[row + 1]))
        columns = (self.document[here].tolist(), self.start[here].tolist(), self.length[here].tolist())
        return [Piece(*piece) for piece in zip(*columns, strict=True)]


def pack(lengths: NDArray[np.integer], capacity: int) -> Packed:
    """Documents of these lengths [documents] packed into rows of at most `capacity` tokens; empty ones are left out.

    A function of its arguments alone. Rows that a long document fills come first.
    """
    assert capacity >= 1
    assert len(lengths) < 2**31
    full, left = np.divmod(np.asarray(lengths, dtype=np.int64), capacity)
    cut = np.repeat(np.arange(len(lengths), dtype=np.int32), full)
    number = np.arange(len(cut)) - np.repeat(np.cumsum(full) - full, full)  # of a piece within its document
    order = np.argsort(-left, kind="stable")[: np.count_nonzero(left)].astype(np.int32)
    row, rows = _best_fit_decreasing(left[order], capacity)
    by_row = np.argsort(row, kind="stable")
    rest = order[by_row]
    per_row = np.concatenate((np.ones(len(cut), dtype=np.int64), np.bincount(row, minlength=rows)))
    return Packed(
        borders=np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(per_row))),
        document=np.concatenate((cut, rest)),
        start=np.concatenate((number * capacity, full[rest] * capacity)),
        length=np.concatenate((np.full(len(cut), capacity, dtype=np.int32), left[rest].astype(np.int32))),
    )


class PackedConversations(Sequence[list[TokenRow]]):
    """The conversations of a source, packed whole into rows of at most `length` tokens."""

    def __init__(self, conversations: Sequence[TokenRow], length: int) -> None:
        self.conversations = conversations
        self.packed = pack(np.array([len(each.tokens) for each in conversations], dtype=np.int64), length)
        assert not self.packed.start.any(), "a conversation is longer than a row"

    def __len__(self) -> int:
        """Number of packed rows."""
        return len(self.packed)

    def __getitem__(self, row: int) -> list[TokenRow]:  # type: ignore[override]
        """The conversations of a packed row."""
        return [self.conversations[piece.document] for piece in self.packed[row]]


def _best_fit_decreasing(lengths: NDArray[np.int64], capacity: int) -> tuple[NDArray[np.int32], int]:
    """The row of each item, longest first [items], and the number of rows.

    The row with the least sufficient space r takes items of length l until less than l is left, r // l of them: no
    other fits better meanwhile. So the rows of one space are filled together, and are then of use to shorter items
    only; hence some `capacity` fillings in all, however many items there are.
    """
    filling = _Filling(len(lengths), capacity)
    begins = np.flatnonzero(np.diff(lengths, prepend=-1))
    for begin, end in pairwise([*begins.tolist(), len(lengths)]):
        length = int(lengths[begin])
        for space in filling.spaces(length):
            if begin < end:
                begin = filling.fill(space, filling.take(space), length, begin, end)
        if begin < end:
            new = -(-(end - begin) // (capacity // length))
            filling.fill(capacity, filling.open(new), length, begin, end)
    return filling.row, filling.rows


class _Filling:
    """Which items lie where, and the space that is left, while rows are filled."""

    def __init__(self, items: int, capacity: int) -> None:
        self.row = np.empty(items, dtype=np.int32)
        self.rows = 0
        self._with_space: dict[int, list[NDArray[np.int32]]] = defaultdict(list)
        self._is_there = np.zeros(capacity + 1, dtype=np.bool_)  # [space]

    def spaces(self, length: int) -> list[int]:
        """Spaces that hold `length`, the least first."""
        spaces: list[int] = (np.flatnonzero(self._is_there[length:]) + length).tolist()
        return spaces

    def take(self, space: int) -> NDArray[np.int32]:
        """The rows with this space; `fill` gives them back."""
        self._is_there[space] = False
        return np.concatenate(self._with_space.pop(space))

    def open(self, count: int) -> NDArray[np.int32]:
        """New rows."""
        self.rows += count
        return np.arange(self.rows - count, self.rows, dtype=np.int32)

    def fill(self, space: int, rows: NDArray[np.int32], length: int, begin: int, end: int) -> int:
        """Put items [begin, end) of one length into rows with this space; the first item that is left over."""
        each = space // length
        full, others = divmod(min(end - begin, each * len(rows)), each)
        used, behind = full + (others > 0), begin + full * each + others
        self.row[begin:behind] = np.repeat(rows[:used], each)[: behind - begin]
        self._keep(space - each * length, rows[:full])
        self._keep(space - others * length, rows[full:used])
        self._keep(space, rows[used:])
        return behind

    def _keep(self, space: int, rows: NDArray[np.int32]) -> None:
        if space and len(rows):
            self._with_space[space].append(rows)
            self._is_there[space] = True
