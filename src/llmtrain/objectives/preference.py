"""Preference optimisation: a policy learns from pairs of answers directly, without a reward model.

Shapes: B pairs, S tokens of the longest row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.objectives.batch import Metrics
from llmtrain.objectives.pairs import PairBatch, answer_logprobs, num_pairs, over_pairs


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
        return num_pairs(batch)

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
        return losses.sum(), over_pairs(
            loss=losses,
            accuracy=chosen > rejected,
            margin=self.beta * (chosen - rejected),
            chosen_reward=self.beta * chosen,
            rejected_reward=self.beta * rejected,
            kl=(chosen + rejected) / 2,
            sft_loss=sft,
        )
