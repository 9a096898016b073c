"""Kahneman-Tversky optimisation: a policy learns from answers of which each is good or not, in no pairs.

Shapes: B answers, S tokens of the longest row.
"""

import dataclasses

import torch
from torch import Tensor, nn

from llmtrain.objectives.batch import Batch, Metrics
from llmtrain.objectives.pairs import answer_logprobs, over_pairs
from llmtrain.objectives.routing import Stack, before_the_last


@dataclasses.dataclass(frozen=True)
class AnswerBatch(Batch):
    """Judged answers, each beside a mismatched one: the same prompt with an answer to another, padded on the right."""

    answers: Tensor
    """[B, S] int64: prompts with their answers."""
    mismatched: Tensor
    """[B, S] int64: the same prompts with answers to others."""
    answers_mask: Tensor
    """[B, S] bool: the tokens of the answer, its end token included."""
    mismatched_mask: Tensor
    """[B, S] bool."""
    desirable: Tensor
    """[B] bool: whether the answer is good."""
    source: Tensor
    """[B] int64: number of the source that the answer comes from."""
    reference: Tensor | None = None
    """[B, 2] float32: the reference's log-probabilities of answer and mismatched answer; None until they are known."""
    baseline: Tensor | None = None
    """[B] float32: the estimate of the KL divergence for the whole step's batch, the same in every row."""

    def rows(self) -> tuple[Tensor, Tensor]:
        """Tokens and answer mask of all rows, [2·B, S] each: first the answers, then the mismatched ones."""
        tokens = torch.cat([self.answers, self.mismatched])
        return tokens, torch.cat([self.answers_mask, self.mismatched_mask])

    def counted_tokens(self) -> dict[Stack, Tensor]:
        """What answers are predicted from, [B, S] bool; of the mismatched ones there is no gradient."""
        return {"decoder": before_the_last(self.answers_mask)}


class Kto:
    """λ (1 − σ(β (log-ratio − baseline))) of a good answer, λ (1 − σ(β (baseline − log-ratio))) of another; the mean.

    Ethayarajh et al. 2024 (arXiv 2402.01306), equation 7. The log-ratio is log π(answer) − log π_reference(answer);
    the baseline estimates KL(π ‖ π_reference) by the mean log-ratio of the mismatched answers, not below 0, and has no
    gradient. A batch brings that of its whole step; one that does not is its own estimate.
    """

    def __init__(
        self, *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
    ) -> None:  # fmt: skip
        self.beta, self.desirable_weight, self.undesirable_weight = beta, desirable_weight, undesirable_weight

    def weight(self, batch: AnswerBatch) -> Tensor:
        """Number of answers."""
        return torch.tensor(float(len(batch)), device=batch.answers.device)

    def __call__(self, model: nn.Module, batch: AnswerBatch) -> tuple[Tensor, Metrics]:
        """The summed loss; the batch must know the reference's log-probabilities.

        Metrics: loss, accuracy (a good answer above the baseline or another below it), log_ratio (of the
        answers), kl_baseline, and chosen_reward and rejected_reward, β times the log-ratio of good and other answers.
        """
        assert batch.reference is not None
        ratios = answer_logprobs(model, batch.answers, batch.answers_mask) - batch.reference[:, 0]
        baseline = batch.baseline
        if baseline is None:
            baseline = mismatched_ratios(model, batch).mean().clamp(min=0).expand(len(batch))
        above = torch.where(batch.desirable, 1.0, -1.0) * (ratios - baseline)
        weights = torch.where(batch.desirable, self.desirable_weight, self.undesirable_weight)
        losses = weights * (1 - torch.sigmoid(self.beta * above))
        metrics = over_pairs(loss=losses, accuracy=above > 0, log_ratio=ratios, kl_baseline=baseline)
        rewards = self.beta * ratios.detach()
        for name, kind in (("chosen_reward", batch.desirable), ("rejected_reward", ~batch.desirable)):
            metrics[name] = (torch.where(kind, rewards, 0.0).sum(), kind.sum().float())
        return losses.sum(), metrics


@torch.no_grad()
def mismatched_ratios(model: nn.Module, batch: AnswerBatch) -> Tensor:
    """The log-ratio [B] of each mismatched answer."""
    assert batch.reference is not None
    return answer_logprobs(model, batch.mismatched, batch.mismatched_mask) - batch.reference[:, 1]
