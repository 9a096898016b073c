"""Policy gradients without a value model: GRPO, and REINFORCE with any baseline; the clipped surrogate of PPO.

Shapes as in `trajectories.py`: B rows, S tokens of the longest row, T = S − 1.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from llmtrain.objectives.batch import Metrics
from llmtrain.objectives.kl import kl_k1, kl_k3
from llmtrain.objectives.logprobs import token_logprobs_and_entropy
from llmtrain.objectives.shared_positions import group_leaders, shared_positions
from llmtrain.objectives.trajectories import JudgedAnswers, Rollout

LossAverage = Literal["sequence", "token", "constant"]


def policy_logprobs(
    model: nn.Module, tokens: Tensor, response_mask: Tensor, temperature: float, group_rows: int = 1
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the sampled tokens and entropies, [B, T] float32 each, zero outside the answer.

    The prompt of a group, as many rows as stand side by side here, is computed once. Rollouts and updates both read the
    model through this function, so the ratio of the first update is 1.
    """
    same_as = shared_positions(tokens, response_mask, group_leaders(tokens, group_rows))
    reader = logprobs_reader(tokens, response_mask, temperature)
    read: tuple[Tensor, Tensor] = model(tokens, read=reader, same_as=same_as)
    return read


def logprobs_reader(
    tokens: Tensor, response_mask: Tensor, temperature: float
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """What makes these log-probabilities and entropies of hidden states [B, S, H] and the head's weight [V, H]."""

    def read(hidden: Tensor, head_weight: Tensor, softcap: float | None = None) -> tuple[Tensor, Tensor]:
        return token_logprobs_and_entropy(
            hidden[:, :-1],
            head_weight,
            tokens[:, 1:],
            response_mask[:, 1:],
            temperature=temperature,
            softcap=softcap,
        )

    return read


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip_range: float,
    clip_range_high: float | None = None,
) -> Tensor:  # fmt: skip
    """Clipped surrogate loss of each choice, zero outside the mask: −min(ratio · A, clip(ratio) · A).

    Schulman et al. 2017 (arXiv 1707.06347), equation 7; with a range of its own above 1 as in DAPO (Yu et al. 2025,
    arXiv 2503.14476, equation 10). A choice is a token [B, T], or a whole answer [B].
    """
    ratio = ratio_of(logprobs, old_logprobs, mask)
    clipped = ratio.clamp(1 - clip_range, 1 + (clip_range if clip_range_high is None else clip_range_high))
    return torch.where(mask, -torch.minimum(ratio * advantages, clipped * advantages), 0.0)


def ratio_of(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """π / π_old of each choice; 1 outside the mask."""
    return torch.where(mask, logprobs - old_logprobs, 0.0).exp()


def ratio_metrics(ratio: Tensor, mask: Tensor, *, clip_range: float, clip_range_high: float | None = None) -> Metrics:
    """ratio (1 at a rollout's first update), ratio_max, ratio_min and clip_fraction over the masked choices."""
    ratio = ratio.detach()
    high = clip_range if clip_range_high is None else clip_range_high
    outside = (ratio - 1 > high) | (1 - ratio > clip_range)
    one = ratio.new_ones(())
    return over_mask(mask, ratio=ratio, clip_fraction=outside) | {
        "ratio_max": (ratio.max(), one), "ratio_min": (ratio.min(), one),
    }  # fmt: skip


def over_mask(mask: Tensor, **values: Tensor) -> Metrics:
    """Values where the mask counts, as (sum, number)."""
    count = mask.sum().float()
    return {
        name: (torch.where(mask, value.detach().float(), 0.0).sum(), count) for name, value in values.items()
    }  # fmt: skip


def answer_kl(logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor) -> Tensor:
    """The log-ratio of each answer, [B], from log-probabilities [B, T]: an estimate (k1) of its KL in nats."""
    return torch.where(mask, kl_k1(logprobs, reference_logprobs), 0.0).sum(dim=1)


def tell_stop(batch: Rollout, metrics: Metrics) -> None:
    """Let the rollout know how far the policy has moved, where a limit is set on that."""
    if batch.kl_stop:
        batch.kl_stop.add(*metrics["approx_kl"])


def importance(
    batch: Rollout, old_logprobs: Tensor, mask: Tensor, *, of_answers: bool = False
) -> tuple[Tensor | float, Metrics]:
    """What each choice's loss is multiplied by because other kernels have sampled it: min(π_old / π_sampler, limit).

    Truncated importance sampling (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
    training", fengyao.notion.site/off-policy-rl), of tokens [B, T] or whole answers [B]: the clipped ratio π / π_old
    says nothing of who has sampled. The metric sampler_mismatch is |log π_old − log π_sampler| over tokens.
    """
    if batch.sampler_logprobs is None:
        return 1.0, {}
    # a log-probability that is no number counts as the policy's own
    change = torch.where(mask, old_logprobs - batch.sampler_logprobs, 0.0).nan_to_num(nan=0.0)
    metrics = over_mask(mask, sampler_mismatch=change.abs())
    if batch.importance_limit is None:
        return 1.0, metrics
    return (change.sum(dim=1) if of_answers else change).exp().clamp(max=batch.importance_limit), metrics


class Grpo:
    """Group relative policy optimisation: PPO's clipped surrogate, one advantage for all tokens of an answer.

    Shao et al. 2024 (arXiv 2402.03300), equation 3, with the KL to the reference in the loss (equation 4: k3).

    Args:
        clip_range: of the ratio of each token, below 1 and, unless `clip_range_high` says otherwise, above it.
        clip_range_high: above 1 (DAPO's clip-higher).
        kl_coefficient: weight of the KL to the reference; 0: no reference is asked for.
        loss_average: over what losses of tokens are averaged. sequence: over the tokens of an answer, then over
            answers (the paper); token: over all tokens of an update (DAPO, equation 8); constant: over `max_new_tokens`
            of each answer, so that length weighs nothing (Dr. GRPO, Liu et al. 2025, arXiv 2503.20783).
        max_new_tokens: what `constant` divides by.
        temperature: what the answers were sampled at.
        unbiased_kl: multiply the KL by the ratio, which is 1 at the first update but has a gradient: only so is its
            expected gradient that of KL(π ‖ reference) (DeepSeek-V3.2, arXiv 2512.02556, section 3.1).
    """

    def __init__(
        self, clip_range: float = 0.2, clip_range_high: float | None = None, kl_coefficient: float = 0.04,
        loss_average: LossAverage = "sequence", max_new_tokens: int = 64, temperature: float = 1.0, *,
        unbiased_kl: bool = True,
    ) -> None:  # fmt: skip
        self.clip_range, self.clip_range_high = clip_range, clip_range_high
        self.kl_coefficient, self.temperature = kl_coefficient, temperature
        self.loss_average, self.max_new_tokens = loss_average, max_new_tokens
        self.unbiased_kl = unbiased_kl

    def weight(self, batch: JudgedAnswers) -> Tensor:
        """Number of answers, of tokens, or of answers times the longest they may be."""
        mask = batch.learned_mask()
        if self.loss_average == "token":
            return mask.sum().float()
        rows = mask.new_tensor(len(mask), dtype=torch.float32)
        return rows * self.max_new_tokens if self.loss_average == "constant" else rows

    def __call__(self, model: nn.Module, batch: JudgedAnswers) -> tuple[Tensor, Metrics]:
        """The summed loss.

        Metrics: loss, and over the sampled tokens those of `ratio_metrics` and `importance`, approx_kl (k3, against the
        policy that sampled), entropy in nats and, with a reference, reference_kl (k3); over answers align/kl (k1, to
        the reference), where the rollout could not tell it for want of log-probabilities.
        """
        mask = batch.learned_mask()
        logprobs, entropy = policy_logprobs(
            model, batch.tokens, batch.response_mask, self.temperature, batch.group_rows
        )
        old = batch.old_logprobs(logprobs)
        per_token = clipped_policy_loss(
            logprobs, old, batch.advantages[:, None], mask,
            clip_range=self.clip_range, clip_range_high=self.clip_range_high,
        )  # fmt: skip
        weights, metrics = importance(batch, old, mask)
        per_token = per_token * weights
        ratio = ratio_of(logprobs, old, mask)
        measured = {"approx_kl": kl_k3(old, logprobs), "entropy": entropy}
        if batch.reference_logprobs is not None:
            kl = torch.where(mask, kl_k3(logprobs, batch.reference_logprobs), 0.0)
            measured["reference_kl"] = kl
            if batch.logprobs is None:
                moved = answer_kl(old, batch.reference_logprobs, batch.response_mask[:, 1:])
                metrics["align/kl"] = moved.sum(), moved.new_tensor(float(len(moved)))
            per_token = per_token + self.kl_coefficient * (kl * ratio if self.unbiased_kl else kl)
        if self.loss_average == "sequence":
            per_token = per_token / mask.sum(dim=1, keepdim=True).clamp(min=1)
        loss = per_token.sum()
        metrics |= over_mask(mask, **measured) | ratio_metrics(
            ratio, mask, clip_range=self.clip_range, clip_range_high=self.clip_range_high
        )
        tell_stop(batch, metrics)
        return loss, metrics | {"loss": (loss.detach(), self.weight(batch))}


class Reinforce:
    """REINFORCE on whole answers: −min(ratio · A, clip(ratio) · A), ratio = π(answer) / π_old(answer), over answers.

    At the first update of a rollout the ratio is 1 and the gradient that of Williams 1992, −A · ∇ log π(answer).
    RLOO (Ahmadian et al. 2024, arXiv 2402.14740) is this with leave-one-out advantages; several updates with a
    clipped ratio are trl's extension of it.
    """

    def __init__(self, clip_range: float = 0.2, temperature: float = 1.0) -> None:
        self.clip_range, self.temperature = clip_range, temperature

    def weight(self, batch: JudgedAnswers) -> Tensor:
        """Number of answers."""
        return batch.advantages.new_tensor(float(len(batch)))

    def __call__(self, model: nn.Module, batch: JudgedAnswers) -> tuple[Tensor, Metrics]:
        """The summed loss.

        Metrics: over answers loss and those of `ratio_metrics`; over tokens those of `importance`, approx_kl (k3,
        against the policy that sampled) and entropy in nats.
        """
        mask = batch.learned_mask()
        logprobs, entropy = policy_logprobs(
            model, batch.tokens, batch.response_mask, self.temperature, batch.group_rows
        )
        old = batch.old_logprobs(logprobs)
        # the differences are summed, not the log-probabilities: so equal ones give a ratio of exactly 1
        change = torch.where(mask, logprobs - old, 0.0).sum(dim=1)
        everything, unmoved = torch.ones_like(change, dtype=torch.bool), torch.zeros_like(change)
        losses = clipped_policy_loss(change, unmoved, batch.advantages, everything, clip_range=self.clip_range)
        weights, metrics = importance(batch, old, mask, of_answers=True)
        losses = losses * weights
        ratio = ratio_of(change, unmoved, everything)
        metrics |= over_mask(mask, approx_kl=kl_k3(old, logprobs), entropy=entropy)
        tell_stop(batch, metrics)
        return losses.sum(), metrics | over_mask(everything, loss=losses) | ratio_metrics(
            ratio, everything, clip_range=self.clip_range
        )
