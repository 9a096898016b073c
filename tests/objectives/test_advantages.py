"""Whitening, rewards and advantages against plain float64 loops, published numbers and trl."""

import statistics
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from llmtrain.objectives.advantages import (
    batch_advantages,
    flat_groups,
    gae,
    group_advantages,
    leave_one_out_advantages,
    token_rewards,
    whiten,
)

GAMMA, LAMBDA = 0.97, 0.9


@pytest.fixture
def tokens_and_mask(kit):
    return kit.ragged_rows(rows=8, width=12, seed=3)


def random_like(mask: torch.Tensor, *names: str, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(mask.shape, generator=generator, dtype=dtype) for _ in names]


# --- whitening ---

REWARDS = torch.tensor([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]])


def test_whitening_of_the_published_matrix():
    found = whiten(REWARDS, torch.ones_like(REWARDS, dtype=torch.bool), shift_mean=False)
    wanted = torch.tensor([[0.0508, 0.4381, 0.8254], [1.2127, 1.6, 1.9873], [2.3746, 2.7619, 3.1492]])
    torch.testing.assert_close(found, wanted, rtol=0, atol=6e-5)


def test_whitening_counts_only_the_mask(tokens_and_mask):
    mask = tokens_and_mask[1]
    (values,) = random_like(mask, "values", dtype=torch.float32)
    values = values * 3 + 7
    found = whiten(torch.where(mask, values, float("nan")), mask)
    assert found[mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert found[mask].std(correction=0).item() == pytest.approx(1, rel=1e-6)
    assert not found[~mask].any()
    kept = whiten(values, mask, shift_mean=False)
    assert kept[mask].mean().item() == pytest.approx(values[mask].mean().item(), rel=1e-6)


def test_whitening_over_processes_is_whitening_of_everything():
    """Two threads stand for two processes."""
    shares: list[torch.Tensor] = [torch.zeros(()), torch.zeros(())]
    together = threading.Barrier(2, timeout=30)

    def process(rank: int) -> torch.Tensor:
        def add_up(own: torch.Tensor) -> torch.Tensor:
            shares[rank] = own
            together.wait()
            total = shares[0] + shares[1]
            together.wait()
            return total

        rows = REWARDS[:1] if rank == 0 else REWARDS[1:]
        return whiten(rows, rows > 1.25, reduce=add_up)

    with ThreadPoolExecutor(2) as pool:
        found = torch.cat(list(pool.map(process, (0, 1))))
    torch.testing.assert_close(found, whiten(REWARDS, REWARDS > 1.25))


# --- rewards and advantages ---


def test_rewards_by_hand():
    mask = torch.tensor([[False, True, True, False], [True, True, True, True]])
    logprobs, reference = torch.full((2, 4), -1.0), torch.full((2, 4), -3.0)
    found = token_rewards(torch.tensor([5.0, -5.0]), logprobs - reference, mask, 0.1)
    wanted = torch.tensor([[0.0, -0.2, 4.8, 0.0], [-0.2, -0.2, -0.2, -5.2]])
    torch.testing.assert_close(found, wanted)


def gae_loop(rewards, values, mask):
    """Equation 16 of Schulman et al. 2016 as it is written: a sum of discounted residuals for each token."""
    advantages = [[0.0] * mask.shape[1] for _ in mask]
    for row in range(mask.shape[0]):
        places = mask[row].nonzero().flatten().tolist()
        for start in range(len(places)):
            total = 0.0
            for distance, t in enumerate(places[start:]):
                following = float(values[row, t + 1]) if t + 1 <= places[-1] else 0.0
                residual = float(rewards[row, t]) + GAMMA * following - float(values[row, t])
                total += (GAMMA * LAMBDA) ** distance * residual
            advantages[row][places[start]] = total
    return torch.tensor(advantages, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_advantages_against_the_loop(tokens_and_mask, dtype):
    mask = tokens_and_mask[1][:, 1:]
    rewards, values = random_like(mask, "rewards", "values")
    wanted = gae_loop(rewards, values, mask)
    advantages, returns = gae(rewards.to(dtype), values.to(dtype), mask, gamma=GAMMA, lam=LAMBDA)
    torch.testing.assert_close(advantages.double(), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(returns.double(), wanted + values * mask, rtol=1e-6, atol=1e-6)


def test_advantages_do_not_see_padding(tokens_and_mask):
    mask = tokens_and_mask[1][:, 1:]
    rewards, values = random_like(mask, "rewards", "values")
    clean = gae(rewards, values, mask, gamma=GAMMA, lam=LAMBDA)
    spoilt = [torch.where(mask, value, float("nan")) for value in (rewards, values)]
    for found, wanted in zip(gae(*spoilt, mask, gamma=GAMMA, lam=LAMBDA), clean, strict=True):
        assert torch.equal(found, wanted)


def test_with_lambda_one_returns_are_discounted_sums():
    mask = torch.tensor([[True, True, True]])
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[9.0, -3.0, 0.5]])
    _, returns = gae(rewards, values, mask, gamma=0.5, lam=1.0)
    torch.testing.assert_close(returns, torch.tensor([[3.0, 4.0, 4.0]]))


# --- one advantage for each answer ---

G = 4


@pytest.fixture
def rewards():
    drawn = torch.randn(6, G, generator=torch.Generator().manual_seed(2)) * 2 + 1
    drawn[3] = 0.5  # a group that has nothing to tell
    return drawn.flatten()


def group_loop(rewards, scale):
    """Group by group, in double precision."""
    values = [float(reward) for reward in rewards]
    groups = [values[start : start + G] for start in range(0, len(values), G)]
    overall, found = statistics.stdev(values), []
    for group in groups:
        divisor = {"group": statistics.stdev(group) + 1e-4, "batch": overall + 1e-4, "none": 1.0}[scale]
        found += [(reward - statistics.mean(group)) / divisor for reward in group]
    return torch.tensor(found)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages_against_the_loop(rewards, scale):
    torch.testing.assert_close(group_advantages(rewards, G, scale), group_loop(rewards, scale), rtol=1e-5, atol=1e-5)
    assert not group_advantages(rewards, G, scale)[3 * G : 4 * G].any()


def test_leave_one_out_against_the_loop(rewards):
    wanted = []
    for start in range(0, len(rewards), G):
        group = rewards[start : start + G].tolist()
        wanted += [each - statistics.mean(group[:n] + group[n + 1 :]) for n, each in enumerate(group)]
    torch.testing.assert_close(leave_one_out_advantages(rewards, G), torch.tensor(wanted), rtol=1e-5, atol=1e-5)


def test_statistics_of_the_batch_are_over_all_processes(rewards):
    halves = rewards[:8], rewards[8:]

    def together(function, *arguments):
        """Each call of `reduce` adds what the other process gives it at the same place."""
        seen: list[list[torch.Tensor]] = [[], []]
        for _ in range(3):  # until the sums that later calls depend on have settled
            before = [list(each) for each in seen]
            found = []
            for rank in (0, 1):
                seen[rank].clear()

                def reduce(own, rank=rank, before=before):
                    seen[rank].append(own)
                    place = len(seen[rank]) - 1
                    return own + before[1 - rank][place] if place < len(before[1 - rank]) else own

                found.append(function(halves[rank], *arguments, reduce=reduce))
        return torch.cat(found)

    torch.testing.assert_close(together(batch_advantages), rewards - rewards.mean())
    torch.testing.assert_close(together(group_advantages, G, "batch"), group_advantages(rewards, G, "batch"))


def test_flat_groups_are_those_with_one_reward(rewards):
    assert flat_groups(rewards, G).tolist() == [False, False, False, True, False, False]
