"""PPO's losses against plain float64 loops."""

import dataclasses
import math

import pytest
import torch

from llmtrain.objectives.policy_gradient import clipped_policy_loss
from llmtrain.objectives.ppo import Ppo, policy_and_values, ppo_value_loss
from llmtrain.objectives.trajectories import Trajectory

CLIP, VALUE_CLIP = 0.2, 0.15


@pytest.fixture
def tokens_and_mask(kit):
    return kit.ragged_rows(rows=8, width=12, seed=3)


def random_like(mask: torch.Tensor, *names: str, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(mask.shape, generator=generator, dtype=dtype) for _ in names]


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
    [(clipped_policy_loss, policy_loop, CLIP), (ppo_value_loss, value_loop, VALUE_CLIP)],
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


def rollout(kit, tokens, mask, temperature=0.7) -> Trajectory:
    """As a rollout leaves it: read by an actor-critic, with made-up advantages and returns."""
    with torch.no_grad():
        logprobs, _, values = policy_and_values(kit.actor_critic(0), tokens, mask, temperature)
    advantages, returns = random_like(values, "advantages", "returns", dtype=torch.float32)
    return Trajectory(
        tokens=tokens, response_mask=mask, logprobs=logprobs, values=values, advantages=advantages, returns=returns,
        epochs=2, minibatches=2, first_slot=0, seed=11, step=4,
    )  # fmt: skip


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
    assert metrics["ratio_max"][0] == metrics["ratio_min"][0] == 1.0
    assert mean(metrics, "approx_kl") == 0.0
    assert mean(metrics, "clip_fraction") == 0.0
    mask = batch.response_mask[:, 1:]
    assert mean(metrics, "policy_loss") == pytest.approx(-batch.advantages[mask].mean().item(), rel=1e-5)
    assert mean(metrics, "entropy") > 0


def test_values_learn_alone_at_first(kit, tokens_and_mask):
    batch = rollout(kit, *tokens_and_mask)
    moved = {}
    for step in (2, 3):
        model = kit.actor_critic(0)
        loss, _ = Ppo(value_warmup_steps=3)(model, dataclasses.replace(batch, step=step))
        loss.backward()
        moved[step] = {name: bool(each.grad.any()) for name, each in model.named_parameters()}
    assert moved[2]["score"]
    assert not moved[2]["head"]
    assert all(moved[3].values())


def test_another_policy_moves_the_metrics(kit, tokens_and_mask):
    _, metrics = Ppo(temperature=0.7)(kit.actor_critic(1), rollout(kit, *tokens_and_mask))
    assert mean(metrics, "approx_kl") > 0.01
    assert 0.1 < mean(metrics, "clip_fraction") <= 1
    assert metrics["ratio_max"][0] > 1 > metrics["ratio_min"][0] > 0


@pytest.mark.parametrize("limit", [None, 1.5])
def test_gradient_of_the_objective_is_that_of_the_loop(kit, tokens_and_mask, limit):
    """The whole objective again, in float64, token by token; with a limit, other kernels have sampled."""
    batch = rollout(kit, *tokens_and_mask)
    if limit is not None:
        off = torch.rand(batch.logprobs.shape, generator=torch.Generator().manual_seed(6)) * 2 - 1
        batch = dataclasses.replace(batch, sampler_logprobs=batch.logprobs + off, importance_limit=limit)
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
        told = batch.logprobs if batch.sampler_logprobs is None else batch.sampler_logprobs
        weight = min(math.exp(batch.logprobs[row, t] - told[row, t]), limit or 1.0)
        total = total - weight * torch.min(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
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
