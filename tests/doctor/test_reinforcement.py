"""The checks of PPO's parts: each notices the fault that it is there for. That they pass is held by test_checks.py."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.doctor import losses, reinforcement
from llmtrain.doctor.measurement import Measurement
from llmtrain.models import formats
from llmtrain.models.heads import ScalarModel, SharedActorCritic
from llmtrain.objectives.kl import AdaptiveKL
from llmtrain.rewards.models import LearnedReward

CPU = torch.device("cpu")


def off(found: list[Measurement]) -> list[str]:
    """What the measurements that do not pass are of."""
    return [each.what for each in found if not each.passed]


@pytest.mark.parametrize("deviation", [1 / 9, 8**-0.5, 0.02])
def test_a_head_of_another_deviation_is_noticed(deviation: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 / (H + 1) in place of its root; the root of 1 / H; the deviation of the other weights."""

    def drawn(self: ScalarModel, generator: torch.Generator) -> None:
        with torch.no_grad():
            self.score.weight.normal_(0.0, deviation, generator=generator)

    monkeypatch.setattr(ScalarModel, "initialise_score", drawn)
    assert off(reinforcement.score_heads(CPU)) == ["score head: variance of its weights, times H + 1"]


@pytest.mark.parametrize("broken", ["apart", "shared"])
def test_a_value_head_that_is_not_zero_is_noticed(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if broken == "apart":
        monkeypatch.setattr(ScalarModel, "zero_score", lambda self: self)
    else:
        monkeypatch.setattr(SharedActorCritic, "values", lambda self, hidden: hidden.sum(dim=-1))
    assert off(reinforcement.score_heads(CPU)) == ["value head of zeros: largest first value"]


def test_a_score_beside_the_last_token_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reinforcement, "answer_scores", lambda scores, mask: scores[:, -1])
    assert off(reinforcement.score_places(CPU)) == ["score: answers read elsewhere than at their last token"]


@pytest.mark.parametrize("broken", ["normalised", "mean of prompts"])
def test_a_reward_that_is_not_the_score_is_noticed(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = LearnedReward.__call__

    def of_all(self: LearnedReward, answers: Any) -> list[float]:
        found = torch.tensor(right(self, answers))
        return (found - found.mean()).tolist()

    if broken == "normalised":
        monkeypatch.setattr(ScalarModel, "normalised", lambda self, scores: scores)
    else:
        monkeypatch.setattr(LearnedReward, "__call__", of_all)
    assert off(reinforcement.score_places(CPU)) == ["score: difference from each answer alone, by hand"]


def score_at_every_token(scores: Tensor, kl: Tensor, mask: Tensor, coefficient: float) -> Tensor:
    return torch.where(mask, scores[:, None] - coefficient * kl, 0.0)


def kl_at_the_end(scores: Tensor, kl: Tensor, mask: Tensor, coefficient: float) -> Tensor:
    summed = torch.where(mask, kl, 0.0).sum(dim=1)
    last = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))
    return torch.where(last, (scores - coefficient * summed)[:, None], 0.0)


def without_a_mask(scores: Tensor, kl: Tensor, mask: Tensor, coefficient: float) -> Tensor:
    last = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))
    return torch.where(last, scores[:, None], 0.0) - coefficient * kl


@pytest.mark.parametrize(("broken", "count"), [(score_at_every_token, 1), (kl_at_the_end, 1), (without_a_mask, 2)])
def test_rewards_in_other_places_are_noticed(
    broken: Callable[..., Tensor], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reinforcement, "token_rewards", broken)
    names = ["rewards: KL at every token, score at the last: off by", "rewards: largest one of padding and prompts"]
    assert off(reinforcement.rewards_of_tokens(CPU)) == names[:count]


def test_the_kl_of_the_wrong_sign_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    estimators = {"k1": lambda policy, reference: reference - policy}
    monkeypatch.setattr(reinforcement, "KL_ESTIMATORS", estimators)
    assert off(reinforcement.rewards_of_tokens(CPU)) == [
        "rewards: KL at every token, score at the last: off by",
        "rewards: k1 on average, ratio to the KL",
    ]


def unclipped(self: AdaptiveKL, kl: Tensor, answers: int) -> None:
    if self.target is not None:
        self.coefficient.mul_(1 + (kl / self.target - 1) * answers / self.horizon)


def by_rollouts(self: AdaptiveKL, kl: Tensor, answers: int) -> None:
    if self.target is not None:
        self.coefficient.mul_(1 + float((kl / self.target - 1).clamp(-0.2, 0.2)) / self.horizon)


def never_fixed(self: AdaptiveKL, kl: Tensor, answers: int) -> None:
    self.coefficient.mul_(1 + float((kl / 6.0 - 1).clamp(-0.2, 0.2)) * answers / self.horizon)


FAR = ["adaptive KL: factor far above", "adaptive KL: factor far below"]


@pytest.mark.parametrize(
    ("broken", "what"),
    [
        (unclipped, FAR),
        (by_rollouts, ["adaptive KL: factor 10 % above its target", *FAR]),
        (never_fixed, ["fixed KL: factor far above"]),
    ],
)
def test_a_coefficient_that_moves_otherwise_is_noticed(
    broken: Callable[..., None], what: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AdaptiveKL, "update", broken)
    assert off(reinforcement.adaptive_kl(CPU)) == what


def clipped_to_the_return(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, *, clip_range: float) -> Tensor:
    """The smaller of both errors, which lets a value run away."""
    clipped = torch.clamp(values, old - clip_range, old + clip_range)
    return torch.where(mask, 0.5 * torch.minimum((values - returns).square(), (clipped - returns).square()), 0.0)


def unclipped_policy(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, *, clip_range: float) -> Tensor:
    return torch.where(mask, -(logprobs - old).exp() * advantages, 0.0)


@pytest.mark.parametrize(
    ("name", "broken", "what"),
    [("ppo_value_loss", clipped_to_the_return, "values"), ("clipped_policy_loss", unclipped_policy, "ratio")],
)
def test_losses_that_are_clipped_otherwise_are_noticed(
    name: str, broken: Callable[..., Tensor], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reinforcement, name, broken)
    assert off(reinforcement.clipping(CPU)) == [f"clipped {what}: loss, off by", f"clipped {what}: slope, off by"]


def test_dropout_that_stays_on_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_with_dropout", lambda config, dropout: config)
    found = off(losses.first_ppo_update(CPU))
    for quantity in ("log-probabilities, rollout against training", "values, rollout against training", "ratio"):
        assert f"PPO, first update: {quantity}" in found
