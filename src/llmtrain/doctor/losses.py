"""Losses and estimators: against published numbers, plain float64 and what must hold at a first step."""

import copy
import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.config.schema import PpoConfig
from llmtrain.data.encoding import PromptRow
from llmtrain.doctor.measurement import Measurement, largest_difference, relative_difference
from llmtrain.doctor.subject import VOCAB_SIZE, language_model, loaded_for_alignment, prompts, ragged_rows
from llmtrain.engine.distributed import Layout
from llmtrain.generation.engines import OwnEngine
from llmtrain.generation.estimators import PpoEstimator
from llmtrain.generation.rollouts import Rollouts
from llmtrain.models.heads import ActorCritic
from llmtrain.objectives.advantages import gae, whiten
from llmtrain.objectives.batch import Metrics
from llmtrain.objectives.kl import AdaptiveKL
from llmtrain.objectives.logprobs import cross_entropy_sum
from llmtrain.objectives.pairs import PairBatch
from llmtrain.objectives.ppo import Ppo, policy_and_values
from llmtrain.objectives.preference import OnTheFly, Preference, dpo_loss
from llmtrain.objectives.trajectories import Trajectory
from llmtrain.rewards.answers import Answer
from llmtrain.rewards.sums import WeightedSum

# Of openai/lm-human-preferences (tests of `whiten`), as printed in the "N implementation details of RLHF with PPO":
# mean kept, biased variance, four decimals.
REWARDS = [[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]]
WHITENED = [[0.0508, 0.4381, 0.8254], [1.2127, 1.6000, 1.9873], [2.3746, 2.7619, 3.1492]]
GAMMA, LAMBDA, BETA = 0.97, 0.9, 0.1


def whitening(device: torch.device) -> list[Measurement]:
    """Rewards are whitened as published; advantages come to mean 0 and variance 1."""
    rewards, mask = torch.tensor(REWARDS, device=device), torch.ones(3, 3, dtype=torch.bool, device=device)
    kept, shifted = whiten(rewards, mask, shift_mean=False), whiten(rewards, mask)
    off = largest_difference(kept, torch.tensor(WHITENED, device=device))
    return [
        Measurement("whitening: difference from the published matrix", 0.0, off, 6e-5),
        Measurement("whitening: mean of shifted values", 0.0, float(shifted.double().mean()), 1e-6),
        Measurement("whitening: variance of shifted values", 1.0, float(shifted.double().var(correction=0)), 1e-5),
    ]


def advantages(device: torch.device) -> list[Measurement]:
    """Generalised advantage estimates are those of a float64 loop over rows of different lengths."""
    mask = ragged_rows(8, 24, seed=3)[1]
    draw = torch.Generator().manual_seed(5)
    rewards, values = (torch.randn(mask.shape, generator=draw) for _ in range(2))
    wanted = gae_loop(rewards, values, mask)
    found, returns = gae(rewards.to(device), values.to(device), mask.to(device), gamma=GAMMA, lam=LAMBDA)
    wanted_returns = torch.where(mask, wanted + values.double(), 0.0)
    return [
        Measurement("GAE: difference from a float64 loop", 0.0, largest_difference(found.cpu(), wanted), 1e-5),
        Measurement("GAE: returns, the same", 0.0, largest_difference(returns.cpu(), wanted_returns), 1e-5),
    ]


def gae_loop(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Advantages [B, T] float64, backwards through each row: A(t) = δ(t) + γλ A(t + 1), the value after the end 0."""
    found = torch.zeros(mask.shape, dtype=torch.float64)
    for row in range(mask.shape[0]):
        advantage = following = 0.0
        for t in reversed(mask[row].nonzero().flatten().tolist()):
            residual = float(rewards[row, t]) + GAMMA * following - float(values[row, t])
            advantage = residual + GAMMA * LAMBDA * advantage
            following = float(values[row, t])
            found[row, t] = advantage
    return found


def cross_entropy(device: torch.device) -> list[Measurement]:
    """The loss made in portions, and its gradient, are torch's in float64."""
    draw = torch.Generator().manual_seed(1)
    hidden, head = torch.randn(6, 20, 32, generator=draw), torch.randn(VOCAB_SIZE, 32, generator=draw)
    targets, mask = ragged_rows(6, 20, seed=2)
    ours = {"hidden": hidden.to(device).requires_grad_(), "head": head.to(device).requires_grad_()}
    exact = {name: tensor.detach().cpu().double().requires_grad_() for name, tensor in ours.items()}
    loss, _ = cross_entropy_sum(ours["hidden"], ours["head"], targets.to(device), mask.to(device))
    wanted = F.cross_entropy((exact["hidden"] @ exact["head"].T)[mask], targets[mask], reduction="sum")
    slopes = dict(zip(ours, (slope.cpu() for slope in torch.autograd.grad(loss, [*ours.values()])), strict=True))
    exact_slopes = dict(zip(exact, torch.autograd.grad(wanted, [*exact.values()]), strict=True))
    return [
        Measurement("cross-entropy: ratio to torch's in float64", 1.0, loss.item() / wanted.item(), 1e-6),
        Measurement("cross-entropy: gradient, off by", 0.0, relative_difference(slopes, exact_slopes), 1e-5),
    ]


def first_ppo_update(device: torch.device) -> list[Measurement]:
    """At a rollout's first update the policy is the one that sampled: ratio 1, KL 0, nothing clipped, to the bit.

    With dropout it would not be; the models had it when they were trained.
    """
    (policy, value), layout = loaded_for_alignment(device), Layout(0, 1, device)
    reference, actor_critic = copy.deepcopy(policy), ActorCritic(policy, value).train()
    asked = [PromptRow(prompt, "", None) for prompt in prompts(16, seed=4)]
    settings = PpoConfig(max_new_tokens=12, minibatches=2, temperature=0.7)

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=False)

    estimator = PpoEstimator(
        model=actor_critic, reference=reference, settings=settings, kl=AdaptiveKL(0.05).to(device), kl_stop=None,
        micro_batch_rows=None, layout=layout, autocast=autocast,
    )  # fmt: skip
    rollouts = Rollouts(
        engine=OwnEngine(policy), prompts=SamePrompts(asked), reward=WeightedSum({"length": lengths}, {"length": 1.0}),
        learn_from=estimator, decode=str, stop_tokens=frozenset(range(8)), pad_id=0, settings=settings,
        batch_rows=len(asked), minibatches=settings.minibatches, seed=0, layout=layout, autocast=autocast,
    )  # fmt: skip
    rollout = rollouts(0)
    assert isinstance(rollout, Trajectory)
    update = next(rollout.updates())
    objective = Ppo(settings.clip_range, settings.value_clip_range, settings.value_weight, settings.temperature)
    metrics = means(objective(actor_critic, update)[1])
    logprobs, _, values = policy_and_values(actor_critic, update.tokens, update.response_mask, settings.temperature)
    off, values_off = largest_difference(logprobs, update.logprobs), largest_difference(values, update.values)
    return [
        Measurement("PPO, first update: log-probabilities, rollout against training", 0.0, off),
        Measurement("PPO, first update: values, rollout against training", 0.0, values_off),
        Measurement("PPO, first update: ratio", 1.0, metrics["ratio"]),
        Measurement("PPO, first update: KL to the policy that sampled", 0.0, metrics["approx_kl"]),
        Measurement("PPO, first update: clip fraction", 0.0, metrics["clip_fraction"]),
        Measurement("PPO, first rollout: KL to the reference", 0.0, means(rollout.metrics())["align/kl"], 1e-5),
    ]


class SamePrompts:
    """The same prompts at every step."""

    def __init__(self, rows: Sequence[PromptRow]) -> None:
        self.rows = rows

    def __call__(self, step: int, replacement: int = 0) -> Sequence[PromptRow]:
        return self.rows

    def counts(self, step: int) -> dict[str, float]:
        return {}


def lengths(answers: Sequence[Answer]) -> list[float]:
    """A reward like any other."""
    return [float(len(answer.tokens)) for answer in answers]


def first_dpo_step(device: torch.device) -> list[Measurement]:
    """Where the policy is its reference, the loss is ln 2 and no margin is seen."""
    policy = language_model(device)
    (chosen, chosen_mask), (rejected, rejected_mask) = (ragged_rows(8, 20, seed=seed) for seed in (6, 7))
    batch = PairBatch(chosen, rejected, chosen_mask, rejected_mask, torch.zeros(8, dtype=torch.int64)).to(device)
    objective = Preference(functools.partial(dpo_loss, beta=BETA), OnTheFly(copy.deepcopy(policy)), beta=BETA)
    metrics = means(objective(policy, batch)[1])
    return [
        Measurement("DPO, first step: loss (ln 2)", math.log(2), metrics["loss"], 1e-6),
        Measurement("DPO, first step: margin", 0.0, metrics["margin"]),
        Measurement("DPO, first step: log-ratio to the reference", 0.0, metrics["log_ratio"]),
    ]


def means(metrics: Metrics) -> dict[str, float]:
    """The mean that each (sum, weight) pair stands for."""
    return {name: float(value / weight) for name, (value, weight) in metrics.items()}
