"""Best-fit decreasing against the plain loop."""

import bisect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.encoding import TokenRow
from llmtrain.data.packing import PackedConversations, Piece, pack


def plain_rows(lengths: list[int], capacity: int) -> list[int]:
    """The space left in each row, by the textbook's loop over pieces."""
    pieces = [capacity for length in lengths for _ in range(length // capacity)]
    pieces += [length % capacity for length in lengths if length % capacity]
    spaces: list[int] = []
    for piece in sorted(pieces, reverse=True):
        place = bisect.bisect_left(spaces, piece)
        space = spaces.pop(place) if place < len(spaces) else capacity
        bisect.insort(spaces, space - piece)
    return spaces


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 40), st.lists(st.integers(0, 130), max_size=120))
def test_as_the_plain_loop_and_every_token_once(capacity: int, lengths: list[int]) -> None:
    packed = pack(np.array(lengths, dtype=np.int64), capacity)
    rows = [packed[row] for row in range(len(packed))]
    spaces = [capacity - sum(piece.length for piece in row) for row in rows]
    assert sorted(spaces) == plain_rows(lengths, capacity)
    assert all(row and min(piece.length for piece in row) > 0 for row in rows)
    tokens = [(piece.document, piece.start + i) for row in rows for piece in row for i in range(piece.length)]
    assert len(tokens) == len(set(tokens))
    assert set(tokens) == {(number, i) for number, length in enumerate(lengths) for i in range(length)}


def test_documents_that_fit_stay_whole() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 500)
    packed = pack(lengths, 64)
    pieces = np.bincount(packed.document, minlength=500)
    assert (pieces == np.where(lengths > 64, 2, 1)).all()


def test_a_small_case_in_full() -> None:
    packed = pack(np.array([3, 25, 6, 7, 4]), 10)
    assert [packed[row] for row in range(len(packed))] == [
        [Piece(1, 0, 10)],
        [Piece(1, 10, 10)],
        [Piece(3, 0, 7), Piece(0, 0, 3)],
        [Piece(2, 0, 6), Piece(4, 0, 4)],
        [Piece(1, 20, 5)],
    ]


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_nothing_gives_no_rows(lengths: list[int]) -> None:
    assert len(pack(np.array(lengths, dtype=np.int64), 8)) == 0


def test_many_documents_leave_little_padding() -> None:
    lengths = np.exp(np.random.default_rng(0).normal(6, 1.2, 300_000)).astype(np.int64) + 1
    packed = pack(lengths, 2048)
    assert len(packed) * 2048 < 1.001 * lengths.sum()
    assert packed.length.sum() == lengths.sum()
    assert (np.add.reduceat(packed.length, packed.borders[:-1]) <= 2048).all()


def test_packed_conversations_are_whole() -> None:
    rows = [TokenRow(np.full(length, length, dtype=np.int32), np.ones(length, dtype=np.bool_)) for length in (5, 3, 7)]
    packed = PackedConversations(rows, 8)
    assert [[row.tokens.tolist() for row in packed[number]] for number in range(len(packed))] == [
        [[7] * 7],
        [[5] * 5, [3] * 3],
    ]
