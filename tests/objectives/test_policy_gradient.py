"""PPO's parts against plain float64 loops and published numbers; updates for any number of processes."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from llmtrain.config.errors import ConfigError
from llmtrain.objectives.policy_gradient import (
    AdaptiveKL,
    Ppo,
    Trajectory,
    gae,
    kl_k1,
    kl_k3,
    policy_and_values,
    ppo_policy_loss,
    ppo_value_loss,
    rows_of_process,
    token_rewards,
    whiten,
)

GAMMA, LAMBDA, CLIP, VALUE_CLIP = 0.97, 0.9, 0.2, 0.15


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
    found = token_rewards(torch.tensor([5.0, -5.0]), logprobs, reference, mask, 0.1)
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


# --- losses ---


def policy_loop(new, old, advantages, mask):
    total = 0.0
    for row, t in mask.nonzero().tolist():
        ratio = math.exp(float(new[row, t]) - float(old[row, t]))
        clipped = min(max(ratio, 1 - CLIP), 1 + CLIP)
        total += -min(ratio * float(advantages[row, t]), clipped * float(advantages[row, t]))
    return total


def value_loop(new, old, returns, mask):
    total = 0.0
    for row, t in mask.nonzero().tolist():
        value, before, wanted = (float(x[row, t]) for x in (new, old, returns))
        clipped = min(max(value, before - VALUE_CLIP), before + VALUE_CLIP)
        total += 0.5 * max((value - wanted) ** 2, (clipped - wanted) ** 2)
    return total


@pytest.mark.parametrize(
    ("loss", "loop", "clip"),
    [(ppo_policy_loss, policy_loop, CLIP), (ppo_value_loss, value_loop, VALUE_CLIP)],
    ids=["policy", "value"],
)
def test_clipped_losses_and_their_gradients(tokens_and_mask, loss, loop, clip):
    mask = tokens_and_mask[1][:, 1:]
    old, change, target = random_like(mask, "old", "change", "target")
    new = (old + 0.3 * change).requires_grad_()  # some inside the clip range, some beyond
    found = loss(new, old, target, mask, clip_range=clip)
    assert found[~mask].eq(0).all()
    assert found.sum().item() == pytest.approx(loop(new.detach(), old, target, mask), rel=1e-9)
    single = loss(*(x.detach().float() for x in (new, old, target)), mask, clip_range=clip)
    assert single.sum().item() == pytest.approx(found.sum().item(), rel=1e-6)
    found.sum().backward()
    with torch.no_grad():
        for row, t in mask.nonzero()[::5].tolist():
            differences = []
            for step in (1e-6, -1e-6):
                moved = new.detach().clone()
                moved[row, t] += step
                differences.append(loop(moved, old, target, mask))
            slope = (differences[0] - differences[1]) / 2e-6
            assert new.grad[row, t].item() == pytest.approx(slope, rel=1e-5, abs=1e-6)
    assert not new.grad[~mask].any()


def test_kl_estimators_are_unbiased():
    """Their mean under π is KL(π ‖ reference), here computed exactly over a small vocabulary."""
    policy, reference = (
        torch.randn(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ).log_softmax(-1)
    exact = float((policy.exp() * (policy - reference)).sum())
    for estimator in (kl_k1, kl_k3):
        assert float((policy.exp() * estimator(policy, reference)).sum()) == pytest.approx(exact, rel=1e-9)
    assert (kl_k3(policy, reference) >= 0).all()


# --- the adaptive coefficient ---


def test_adaptive_coefficient_follows_the_clipped_error():
    kl = AdaptiveKL(0.15, target=6.0, horizon=10_000)
    kl.update(torch.tensor(6.6), 512)  # 10 % too high
    assert kl.coefficient.item() == pytest.approx(0.15 * (1 + 0.1 * 512 / 10_000), rel=1e-6)
    before = kl.coefficient.item()
    kl.update(torch.tensor(600.0), 512)
    assert kl.coefficient.item() == pytest.approx(before * (1 + 0.2 * 512 / 10_000), rel=1e-6)
    before = kl.coefficient.item()
    kl.update(torch.tensor(0.0), 512)
    assert kl.coefficient.item() == pytest.approx(before * (1 - 0.2 * 512 / 10_000), rel=1e-6)
    other = AdaptiveKL(0.15, target=6.0)
    other.load_state_dict(kl.state_dict())
    assert torch.equal(other.coefficient, kl.coefficient)


def test_fixed_coefficient_stays():
    kl = AdaptiveKL(0.05)
    kl.update(torch.tensor(100.0), 512)
    assert kl.coefficient.item() == pytest.approx(0.05)


# --- the trajectory and its updates ---

ROWS, MINIBATCHES, EPOCHS = 24, 3, 2


def trajectory(tokens, mask, *, first_slot=0, minibatches=2, step=4, **known) -> Trajectory:
    nothing = torch.zeros(tokens.shape[0], tokens.shape[1] - 1)
    tensors = {name: known.get(name, nothing) for name in ("logprobs", "values", "advantages", "returns")}
    return Trajectory(
        tokens=tokens, response_mask=mask, **tensors,
        epochs=EPOCHS, minibatches=minibatches, first_slot=first_slot, seed=11, step=step,
    )  # fmt: skip


def updates_of_world(world: int, step: int = 4) -> list[list[int]]:
    """The global rows of each update, over all processes; a row's token is its number."""
    updates: list[list[int]] = []
    for rank in range(world):
        rows = rows_of_process(rank, world, ROWS, MINIBATCHES)
        tokens = rows[:, None].expand(-1, 4)
        held = trajectory(
            tokens,
            torch.ones_like(tokens, dtype=torch.bool),
            first_slot=int(rows[0]),
            minibatches=MINIBATCHES,
            step=step,
        )
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


# --- the objective ---


def rollout(kit, tokens, mask, temperature=0.7) -> Trajectory:
    """As a rollout leaves it: read by an actor-critic, with made-up advantages and returns."""
    with torch.no_grad():
        logprobs, _, values = policy_and_values(kit.actor_critic(0), tokens, mask, temperature)
    advantages, returns = random_like(values, "advantages", "returns", dtype=torch.float32)
    return trajectory(tokens, mask, logprobs=logprobs, values=values, advantages=advantages, returns=returns)


def mean(metrics, name: str) -> float:
    return float(metrics[name][0] / metrics[name][1])


def test_logprobs_belong_to_the_next_token(kit, tokens_and_mask):
    tokens, mask = tokens_and_mask
    model = kit.actor_critic(0)
    logprobs, entropy, values = policy_and_values(model, tokens, mask, 0.7)
    hidden = model.trunk(tokens)
    table = (hidden @ model.head.T / 0.7).log_softmax(-1)
    row, position = 0, 5  # the sixth token is predicted by the fifth position
    assert logprobs[row, position - 1].item() == pytest.approx(
        table[row, position - 1, tokens[row, position]].item(), rel=1e-5
    )
    distribution = table[row, position - 1]
    assert entropy[row, position - 1].item() == pytest.approx(
        -(distribution.exp() * distribution).sum().item(), rel=1e-5
    )
    assert values[row, position - 1].item() == pytest.approx((hidden[row, position - 1] @ model.score).item(), rel=1e-5)
    assert not logprobs[~mask[:, 1:]].any()


def test_first_update_has_ratio_one_and_no_divergence(kit, tokens_and_mask):
    batch = rollout(kit, *tokens_and_mask)
    _, metrics = Ppo(temperature=0.7)(kit.actor_critic(0), batch)
    assert mean(metrics, "ratio") == 1.0
    assert mean(metrics, "approx_kl") == 0.0
    assert mean(metrics, "clip_fraction") == 0.0
    mask = batch.response_mask[:, 1:]
    assert mean(metrics, "policy_loss") == pytest.approx(-batch.advantages[mask].mean().item(), rel=1e-5)
    assert mean(metrics, "entropy") > 0


def test_another_policy_moves_the_metrics(kit, tokens_and_mask):
    _, metrics = Ppo(temperature=0.7)(kit.actor_critic(1), rollout(kit, *tokens_and_mask))
    assert mean(metrics, "approx_kl") > 0.01
    assert 0.1 < mean(metrics, "clip_fraction") <= 1


def test_gradient_of_the_objective_is_that_of_the_loop(kit, tokens_and_mask):
    """The whole objective again, in float64, token by token."""
    batch = rollout(kit, *tokens_and_mask)
    objective = Ppo(clip_range=CLIP, value_clip_range=VALUE_CLIP, value_weight=0.3, temperature=0.7)
    found = kit.gradients(objective, kit.actor_critic(1), batch)
    model = kit.actor_critic(1).double()
    hidden = model.trunk(batch.tokens)
    table, values = (hidden @ model.head.T / 0.7).log_softmax(-1), hidden @ model.score
    total = torch.zeros((), dtype=torch.float64)
    chosen = batch.response_mask[:, 1:].nonzero().tolist()
    for row, t in chosen:
        ratio = (table[row, t, batch.tokens[row, t + 1]] - batch.logprobs[row, t]).exp()
        advantage, wanted, before = batch.advantages[row, t], batch.returns[row, t], batch.values[row, t]
        total = total - torch.min(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
        clipped = values[row, t].clamp(before - VALUE_CLIP, before + VALUE_CLIP)
        total = total + 0.3 * 0.5 * torch.max((values[row, t] - wanted) ** 2, (clipped - wanted) ** 2)
    (total / len(chosen)).backward()
    wanted_gradients = {name: p.grad.float() for name, p in model.named_parameters()}
    kit.assert_same_gradients(found, wanted_gradients)


@pytest.mark.parametrize("micro_batch_rows", [1, 2, 4])
def test_micro_batches_do_not_change_the_gradient(kit, tokens_and_mask, micro_batch_rows):
    batch, objective, model = rollout(kit, *tokens_and_mask), Ppo(temperature=0.7), kit.actor_critic(1)
    whole = kit.gradients(objective, model, batch)
    kit.assert_same_gradients(kit.gradients(objective, model, batch, micro_batch_rows), whole)
