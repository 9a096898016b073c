"""From judged answers to advantages: what the policy-gradient methods learn from.

Shapes: B rows of this process, S tokens of the longest row, T = S − 1; quantities per token belong to tokens[:, 1:].
"""

import dataclasses
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.config.schema import PpoConfig
from llmtrain.engine.distributed import Layout, total
from llmtrain.generation.rollouts import SampledAnswers, means
from llmtrain.objectives.advantages import gae, token_rewards, whiten
from llmtrain.objectives.batch import Metrics
from llmtrain.objectives.kl import KL_ESTIMATORS, AdaptiveKL, KLStop
from llmtrain.objectives.logprobs import token_logprobs
from llmtrain.objectives.policy_gradient import answer_kl, over_mask, policy_logprobs
from llmtrain.objectives.ppo import policy_and_values
from llmtrain.objectives.shared_positions import group_leaders, shared_positions
from llmtrain.objectives.trajectories import JudgedAnswers, Rollout, Trajectory


@dataclasses.dataclass(kw_only=True)
class PpoEstimator:
    """Log-probabilities and values → KL penalty → whitened rewards → GAE → Trajectory."""

    model: nn.Module
    """The actor-critic as spread over the processes."""
    reference: nn.Module
    settings: PpoConfig
    kl: AdaptiveKL
    kl_stop: KLStop | None
    micro_batch_rows: int | None
    layout: Layout
    autocast: Callable[[], torch.autocast]

    def __call__(self, answers: SampledAnswers) -> Trajectory:
        """Rewards, advantages and returns, with statistics over the whole rollout of all processes."""
        settings, mask = self.settings, answers.response_mask[:, 1:]
        batch, reference = self._read(answers)
        kl = KL_ESTIMATORS[settings.kl_estimator](batch.logprobs, reference)
        rewards = token_rewards(answers.rewards, kl, mask, self.kl.coefficient)
        if settings.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False, reduce=self._reduce)
        advantages, returns = gae(rewards, batch.values, mask, gamma=settings.gamma, lam=settings.gae_lambda)
        moved = answer_kl(batch.logprobs, reference, mask)
        measured = answers.measured | self._measured(batch, moved, returns)
        if settings.whiten_advantages:
            advantages = whiten(advantages, mask, reduce=self._reduce)
        return dataclasses.replace(batch, advantages=advantages, returns=returns, kl=moved, measured=measured)

    def _read(self, answers: SampledAnswers) -> tuple[Trajectory, Tensor]:
        """The answers with the policy's log-probabilities and values, and the reference's log-probabilities."""
        nothing = answers.tokens.new_zeros(answers.tokens[:, 1:].shape, dtype=torch.float32)
        batch = Trajectory(
            **rows_and_key(answers), logprobs=nothing, values=nothing, advantages=nothing, returns=nothing,
            epochs=self.settings.epochs, minibatches=self.settings.minibatches, kl_stop=self.kl_stop,
        )  # fmt: skip
        logprobs, values, reference = (torch.zeros_like(nothing) for _ in range(3))
        temperature = self.settings.temperature
        with self.autocast():
            for rows in first_portions(batch, self.micro_batch_rows):
                tokens, mask = batch.tokens[rows], batch.response_mask[rows]
                logprobs[rows], _, values[rows] = policy_and_values(self.model, tokens, mask, temperature)
                reference[rows] = answer_token_logprobs(self.reference, tokens, mask, temperature)
        return dataclasses.replace(batch, logprobs=logprobs, values=values), reference

    def _measured(self, batch: Trajectory, kl: Tensor, returns: Tensor) -> Metrics:
        """KL per answer [B] and its coefficient, which adapts to it; how well the values foretold the returns."""
        mask = batch.response_mask[:, 1:]
        count = kl.new_tensor(float(len(kl)))
        measured: Metrics = {"align/kl": means(kl), "align/kl_coefficient": (self.kl.coefficient * count, count)}
        measured |= over_mask(mask, **{"align/value_error": (returns - batch.values).square()})
        spread, missed = (self._variance(values, mask) for values in (returns, returns - batch.values))
        measured["align/explained_variance"] = (spread - missed, spread)
        summed, answers = self._reduce(torch.stack([kl.sum(), count])).unbind()
        self.kl.update(summed / answers, int(answers))
        return measured

    def _variance(self, values: Tensor, mask: Tensor) -> Tensor:
        """The variance of the masked values over all processes, 0-dim."""
        kept = torch.where(mask, values, 0.0).double()
        summed, squares, count = self._reduce(torch.stack([kept.sum(), kept.square().sum(), mask.sum().double()]))
        return (squares / count - (summed / count).square()).float()

    def _reduce(self, value: Tensor) -> Tensor:
        return total(value, self.layout)


@dataclasses.dataclass(kw_only=True)
class AnswerEstimator:
    """Log-probabilities → KL penalty on an answer's reward → one advantage for each answer → JudgedAnswers.

    The policy is read only where its log-probabilities from before the updates are wanted. With a single update those
    are the ones that the objective reads itself, and the ratio is 1.
    """

    model: nn.Module
    """The policy as spread over the processes."""
    reference: nn.Module | None
    """None: no KL is asked for."""
    advantages: Callable[[Tensor], Tensor]
    """Rewards [B] → advantages [B]."""
    temperature: float
    kl_in_reward: float = 0.0
    """Taken from an answer's reward for each nat of log-ratio to the reference (k1)."""
    kl_in_loss: bool = False
    """Whether the objective asks for the reference's log-probabilities."""
    mask_unfinished: bool = False
    """Learn nothing from answers without end token; they take part in their group's statistics."""
    epochs: int = 1
    minibatches: int = 1
    kl_stop: KLStop | None = None
    micro_batch_rows: int | None
    autocast: Callable[[], torch.autocast]

    def __call__(self, answers: SampledAnswers) -> JudgedAnswers:
        """One advantage for each answer."""
        batch, reference = self._read(answers)
        rewards, measured, kl = answers.rewards, answers.measured, None
        if reference is not None and batch.logprobs is not None:
            kl = answer_kl(batch.logprobs, reference, answers.response_mask[:, 1:])
            rewards, measured = rewards - self.kl_in_reward * kl, measured | {"align/kl": means(kl)}
        return dataclasses.replace(
            batch, learned=answers.finished if self.mask_unfinished else None, advantages=self.advantages(rewards),
            reference_logprobs=reference if self.kl_in_loss else None, kl=kl, measured=measured,
        )  # fmt: skip

    def _read(self, answers: SampledAnswers) -> tuple[JudgedAnswers, Tensor | None]:
        """The answers with the policy's log-probabilities, and the reference's [B, T]."""
        nothing = answers.tokens.new_zeros(answers.tokens[:, 1:].shape, dtype=torch.float32)
        logprobs = torch.zeros_like(nothing) if self._wants_logprobs() else None
        reference = torch.zeros_like(nothing)
        batch = JudgedAnswers(
            **rows_and_key(answers), logprobs=logprobs, advantages=answers.rewards,
            epochs=self.epochs, minibatches=self.minibatches, kl_stop=self.kl_stop,
        )  # fmt: skip
        with self.autocast():
            for rows in first_portions(batch, self.micro_batch_rows):
                tokens, mask = batch.tokens[rows], batch.response_mask[rows]
                how = (tokens, mask, self.temperature, batch.group_rows)
                if logprobs is not None:
                    logprobs[rows] = policy_logprobs(self.model, *how)[0]
                if self.reference is not None:
                    reference[rows] = answer_token_logprobs(self.reference, *how)
        return batch, reference if self.reference is not None else None

    def _wants_logprobs(self) -> bool:
        """Whether the policy's log-probabilities count before the update, or after the first one."""
        kl_now = self.reference is not None and self.kl_in_reward != 0.0
        return kl_now or self.epochs * self.minibatches > 1


def rows_and_key(answers: SampledAnswers) -> dict[str, Any]:
    """The fields that a rollout has in common with the answers that it is made of."""
    shared = (
        "tokens", "response_mask", "group_rows", "first_slot", "seed", "step", "measured", "sampler_logprobs",
        "importance_limit",
    )  # fmt: skip
    return {name: getattr(answers, name) for name in shared}


def first_portions(batch: Rollout, micro_batch_rows: int | None) -> Iterator[Tensor]:
    """Row numbers, in the very portions that the first epoch trains on: so the first update's ratio is exactly 1."""
    for minibatch in islice(batch.update_rows(), batch.minibatches):
        yield from minibatch.split(micro_batch_rows or len(minibatch))


def answer_token_logprobs(
    model: nn.Module, tokens: Tensor, response_mask: Tensor, temperature: float, group_rows: int = 1
) -> Tensor:
    """Log-probabilities [B, T] of the sampled tokens, zero outside the answer; read as the policy's are."""
    same_as = shared_positions(tokens, response_mask, group_leaders(tokens, group_rows))

    def read(hidden: Tensor, head_weight: Tensor, softcap: float | None = None) -> Tensor:
        return token_logprobs(
            hidden[:, :-1], head_weight, tokens[:, 1:], response_mask[:, 1:], temperature=temperature, softcap=softcap
        )

    logprobs: Tensor = model(tokens, read=read, same_as=same_as)
    return logprobs
