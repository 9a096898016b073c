"""The updates of a rollout: the same rows in each for any number of processes, whole groups, an early end."""

import dataclasses

import pytest
import torch

from llmtrain.config.errors import ConfigError
from llmtrain.objectives.kl import KLStop
from llmtrain.objectives.trajectories import Rollout, rows_of_process

ROWS, MINIBATCHES, EPOCHS = 24, 3, 2


def rollout(tokens, *, first_slot=0, minibatches=2, step=4, **options) -> Rollout:
    return Rollout(
        tokens=tokens, response_mask=torch.ones_like(tokens, dtype=torch.bool),
        epochs=EPOCHS, minibatches=minibatches, first_slot=first_slot, seed=11, step=step, **options,
    )  # fmt: skip


def updates_of_world(world: int, step: int = 4, group_rows: int = 1) -> list[list[int]]:
    """The global rows of each update, over all processes; a row's token is its number."""
    updates: list[list[int]] = []
    for rank in range(world):
        rows = rows_of_process(rank, world, ROWS, MINIBATCHES, group_rows)
        tokens = rows[:, None].expand(-1, 4)
        first_slot = int(rows[0]) // group_rows
        held = rollout(tokens, first_slot=first_slot, minibatches=MINIBATCHES, step=step, group_rows=group_rows)
        for index, update in enumerate(held.updates()):
            assert len(update) == ROWS // MINIBATCHES // world
            if rank == 0:
                updates.append([])
            updates[index] += update.tokens[:, 0].tolist()
    return updates


def test_processes_share_the_rows_out():
    for world in (1, 2, 4):
        rows = torch.cat([rows_of_process(rank, world, ROWS, MINIBATCHES) for rank in range(world)])
        assert sorted(rows.tolist()) == list(range(ROWS))


def test_updates_hold_the_same_rows_for_any_number_of_processes():
    alone = updates_of_world(1)
    assert len(alone) == EPOCHS * MINIBATCHES
    for world in (2, 4):
        assert [sorted(update) for update in updates_of_world(world)] == [sorted(update) for update in alone]


@pytest.mark.parametrize("group_rows", [2, 4])
def test_groups_stay_whole_and_the_same_for_any_number_of_processes(group_rows):
    alone = updates_of_world(1, group_rows=group_rows)
    assert [sorted(update) for update in updates_of_world(2, group_rows=group_rows)] == [sorted(u) for u in alone]
    for update in alone:
        groups = torch.tensor(update).view(-1, group_rows)
        assert (groups == groups[:, :1] + torch.arange(group_rows)).all()
        assert (groups[:, 0] % group_rows == 0).all()
    assert sorted(row for update in alone[:MINIBATCHES] for row in update) == list(range(ROWS))
    assert alone[:MINIBATCHES] != alone[MINIBATCHES:]


def test_every_epoch_holds_each_row_once_and_is_shuffled():
    updates = updates_of_world(1)
    epochs = [updates[:MINIBATCHES], updates[MINIBATCHES:]]
    for epoch in epochs:
        assert sorted(row for update in epoch for row in update) == list(range(ROWS))
    assert {frozenset(update) for update in epochs[0]} != {frozenset(update) for update in epochs[1]}
    assert updates_of_world(1, step=5) != updates
    assert updates_of_world(1) == updates


def test_rows_that_cannot_be_shared_are_refused():
    with pytest.raises(ConfigError, match=r"batch_rows=10 cannot be split into method.minibatches=4"):
        rows_of_process(0, 1, 10, 4)
    with pytest.raises(ConfigError, match=r"3 rows in each minibatch .* 2 processes"):
        rows_of_process(0, 2, 6, 2)
    with pytest.raises(ConfigError, match=r"groups of method.samples_per_prompt=4"):
        rows_of_process(0, 1, 10, 1, 4)


def test_updates_end_at_the_limit_and_the_next_rollout_begins_anew():
    stop = KLStop(0.1, reduce=lambda value: value)
    held = rollout(torch.arange(8)[:, None].expand(-1, 4), kl_stop=stop)
    for _ in range(2):
        done = 0
        for _ in held.updates():
            kl = 0.05 if done < 2 else 0.25  # a mean over 10 tokens in two micro-batches
            stop.add(torch.tensor(kl * 4), torch.tensor(4))
            stop.add(torch.tensor(kl * 6), torch.tensor(6))
            done += 1
        assert done == 3


def test_rows_of_a_rollout_keep_what_is_no_tensor():
    stop = KLStop(0.1, reduce=lambda value: value)
    held = rollout(torch.arange(8)[:, None].expand(-1, 4), kl_stop=stop)
    assert next(held.updates()).kl_stop is stop
    assert dataclasses.replace(held, group_rows=2)[:4].group_rows == 2
