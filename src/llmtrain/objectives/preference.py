"""Learning from pairs of a chosen and a rejected answer: reward models (Bradley-Terry) and DPO.

Shapes: B pairs, S tokens of the longest row. Both answers of all pairs go through the model in one pass of 2·B rows,
the chosen ones first.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.objectives.batch import Batch, Metrics
from llmtrain.objectives.next_token import next_tokens, token_logprobs


@dataclasses.dataclass(frozen=True)
class PairBatch(Batch):
    """Pairs of conversations that differ in their last answer; padded on the right to one length."""

    chosen: Tensor
    """[B, S] int64."""
    rejected: Tensor
    """[B, S] int64."""
    chosen_mask: Tensor
    """[B, S] bool: the tokens of the answer, its end token included."""
    rejected_mask: Tensor
    """[B, S] bool."""
    source: Tensor
    """[B] int64: number of the source that the pair comes from."""

    def rows(self) -> tuple[Tensor, Tensor]:
        """Tokens and answer mask of all rows, [2·B, S] each: first the chosen, then the rejected."""
        return torch.cat([self.chosen, self.rejected]), torch.cat([self.chosen_mask, self.rejected_mask])


def answer_scores(scores: Tensor, mask: Tensor) -> Tensor:
    """The score [B] at the last answer token of each row, from scores [B, S] of all positions and the answer mask."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, 0).amax(dim=1, keepdim=True)
    return scores.gather(1, last)[:, 0]


class BradleyTerry:
    """−log σ(score of the chosen − score of the rejected answer), averaged over pairs.

    Ouyang et al. 2022 (arXiv 2203.02155), equation 1, with one pair for each prompt. The model maps tokens [B, S] to
    scores [B, S]; an answer's score stands at its last token.
    """

    def weight(self, batch: PairBatch) -> Tensor:
        """Number of pairs."""
        return _pairs(batch)

    def __call__(self, model: nn.Module, batch: PairBatch) -> tuple[Tensor, Metrics]:
        """The summed loss; metrics: loss, accuracy (a tie is wrong), margin and both mean scores."""
        tokens, mask = batch.rows()
        chosen, rejected = answer_scores(model(tokens), mask).chunk(2)
        losses = -F.logsigmoid(chosen - rejected)
        return losses.sum(), _over_pairs(
            loss=losses,
            accuracy=chosen > rejected,
            margin=chosen - rejected,
            chosen_score=chosen,
            rejected_score=rejected,
        )


def dpo_loss(chosen_ratios: Tensor, rejected_ratios: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Loss of each pair, [B], from the log-ratios log π(answer) − log π_reference(answer), [B] each.

    Rafailov et al. 2023 (arXiv 2305.18290), equation 7; with label smoothing ε the conservative form of Mitchell 2023
    ("A note on DPO with noisy preferences", equation 3): (1 − ε) times the loss plus ε times that of the flipped pair.
    """
    margin = beta * (chosen_ratios - rejected_ratios)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


class Dpo:
    """Direct preference optimisation against a fixed reference model, averaged over pairs.

    An answer's log-probability is the sum over its tokens. With `sft_weight`, that weight times the mean over the
    tokens of the chosen answer of −log p is added for each pair, so the weight of a batch stays its pairs.
    """

    def __init__(
        self, reference: nn.Module, beta: float = 0.1, label_smoothing: float = 0.0, sft_weight: float = 0.0
    ) -> None:
        self.reference = reference
        self.beta, self.label_smoothing, self.sft_weight = beta, label_smoothing, sft_weight

    def weight(self, batch: PairBatch) -> Tensor:
        """Number of pairs."""
        return _pairs(batch)

    def __call__(self, model: nn.Module, batch: PairBatch) -> tuple[Tensor, Metrics]:
        """The summed loss.

        Metrics: loss (all that is minimised), accuracy (a tie is wrong), margin and rewards (β times the log-ratios),
        kl (mean over both answers of the log-ratio to the reference: how far the policy has moved on them), sft_loss.
        """
        tokens, mask = batch.rows()
        logprobs = answer_logprobs(model, tokens, mask)
        with torch.no_grad():
            reference = answer_logprobs(self.reference, tokens, mask)
        chosen, rejected = (logprobs - reference).chunk(2)
        sft = -logprobs.chunk(2)[0] / batch.chosen_mask[:, 1:].sum(dim=1).clamp(min=1)
        losses = dpo_loss(chosen, rejected, beta=self.beta, label_smoothing=self.label_smoothing)
        if self.sft_weight:
            losses = losses + self.sft_weight * sft
        return losses.sum(), _over_pairs(
            loss=losses,
            accuracy=chosen > rejected,
            margin=self.beta * (chosen - rejected),
            chosen_reward=self.beta * chosen,
            rejected_reward=self.beta * rejected,
            kl=(chosen + rejected) / 2,
            sft_loss=sft,
        )


def answer_logprobs(model: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    """Log-probability [B] of each row's answer given what stands before it; tokens and answer mask are [B, S]."""
    targets, counts = next_tokens(tokens, mask)

    def read(hidden: Tensor, head_weight: Tensor) -> Tensor:
        return token_logprobs(hidden, head_weight, targets, counts)

    return model(tokens, read=read).sum(dim=1)


def _pairs(batch: PairBatch) -> Tensor:
    return torch.tensor(float(len(batch)), device=batch.chosen.device)


def _over_pairs(**values: Tensor) -> Metrics:
    """Values [B], one for each pair, as (sum, number of pairs)."""
    return {
        name: (value.detach().float().sum(), value.new_tensor(float(len(value)), dtype=torch.float32))
        for name, value in values.items()
    }
