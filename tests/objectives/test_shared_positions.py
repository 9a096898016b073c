"""Which positions are computed, against a loop over them."""

import pytest
import torch
from torch import Tensor

from llmtrain.objectives.shared_positions import group_leaders, shared_positions


def rows() -> tuple[Tensor, Tensor]:
    """Three rows that share a prompt of 3, the third with an answer that begins as the first one's; then one alone."""
    tokens = torch.tensor([[5, 6, 7, 1, 2, 3, 0], [5, 6, 7, 4, 4, 0, 0], [5, 6, 7, 1, 9, 9, 9], [5, 6, 8, 1, 2, 0, 0]])
    lengths = torch.tensor([[6], [5], [7], [5]])
    columns = torch.arange(7)
    return tokens, (columns >= 3) & (columns < lengths)


def test_what_is_the_same_is_computed_once_and_the_rest_not_at_all() -> None:
    found = shared_positions(*rows(), torch.tensor([0, 0, 0, 3]))
    assert found.tolist() == [
        [0, 1, 2, 3, 4, -1, -1],
        [0, 1, 2, 10, -1, -1, -1],
        [0, 1, 2, 3, 18, 19, -1],
        [21, 22, 23, 24, -1, -1, -1],
    ]


def test_a_leader_is_computed_as_far_as_others_need_it() -> None:
    tokens, mask = rows()
    mask[0] = False
    assert shared_positions(tokens, mask, torch.tensor([0, 0, 0, 3]))[0].tolist() == [0, 1, 2, 3, -1, -1, -1]
    tokens[1], mask[1] = tokens[0], mask[2]  # all of it
    assert shared_positions(tokens, mask, torch.tensor([0, 0, 0, 3]))[:2].tolist() == [[0, 1, 2, 3, 4, 5, -1]] * 2


def test_there_is_always_something_to_compute() -> None:
    tokens, mask = rows()
    found = shared_positions(tokens, torch.zeros_like(mask), torch.tensor([0, 0, 0, 3]))
    assert (found >= 0).nonzero().tolist() == [[0, 0], [3, 0]]


@pytest.mark.parametrize("group_rows", [1, 2, 4])
def test_any_rows_against_a_loop(group_rows: int) -> None:
    draw = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 2, (8, 6), generator=draw)
    begin = torch.randint(1, 5, (8, 1), generator=draw)
    mask = (torch.arange(6) >= begin) & (torch.arange(6) <= begin + 1)
    wanted, answers = set(), {}
    for row in range(8):
        leader = row // group_rows * group_rows
        for column in range(int(begin[row]) + 1):
            same = tokens[row, : column + 1].equal(tokens[leader, : column + 1])
            answers[row, column] = 6 * (leader if same else row) + column
            wanted.add(answers[row, column])
    found = shared_positions(tokens, mask, group_leaders(tokens, group_rows))
    for (row, column), number in answers.items():
        assert found[row, column] == number
    assert set(found[found >= 0].tolist()) == wanted


def test_a_portion_keeps_of_a_group_what_it_has() -> None:
    assert group_leaders(torch.zeros(8, 2), 4).tolist() == [0, 0, 0, 0, 4, 4, 4, 4]
    assert group_leaders(torch.zeros(2, 2), 4).tolist() == [0, 0]  # half a group
    assert group_leaders(torch.zeros(6, 2), 4).tolist() == [0, 0, 2, 2, 4, 4]  # the second one begins with half a group
