"""Reward modelling: a score for an answer, learned from which answers people prefer.

Shapes: B rankings, K answers of the largest one, P pairs, S tokens of the longest row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.objectives.batch import Metrics
from llmtrain.objectives.pairs import over_pairs
from llmtrain.objectives.rankings import RankingBatch, ranking_scores


class BradleyTerry:
    """−log σ(score of the better − score of the worse answer), averaged over a ranking's pairs, then over rankings.

    Ouyang et al. 2022 (arXiv 2203.02155), equation 1: each answer is read once for all its pairs. With `margin_weight`,
    that weight times a pair's margin is taken off the difference of scores (Touvron et al. 2023, arXiv 2307.09288,
    equation 2). With `centring_weight`, that weight times (sum of both scores)² is added for each pair, which pulls the
    mean score to 0 (Eisenstein et al. 2023, arXiv 2312.09244, equation 2). The model maps tokens [A, S] to scores
    [A, S]; an answer's score stands at its last token.
    """

    def __init__(self, margin_weight: float = 0.0, centring_weight: float = 0.0) -> None:
        self.margin_weight, self.centring_weight = margin_weight, centring_weight

    def weight(self, batch: RankingBatch) -> Tensor:
        """Number of rankings."""
        return torch.tensor(float(len(batch)), device=batch.tokens.device)

    def __call__(self, model: nn.Module, batch: RankingBatch) -> tuple[Tensor, Metrics]:
        """The summed loss, and the metrics of `loss`."""
        return self.loss(ranking_scores(model, batch), batch)

    def loss(self, scores: Tensor, batch: RankingBatch) -> tuple[Tensor, Metrics]:
        """The summed loss of scores [B, K].

        Metrics, each averaged over the pairs of a ranking: loss (all that is minimised), accuracy (a tie is wrong),
        margin (the difference of scores) and both mean scores.
        """
        chosen, rejected = scores[:, :, None], scores[:, None, :]
        lead = torch.where(batch.better, chosen - rejected, 0.0)
        losses = -F.logsigmoid(lead - self.margin_weight * batch.margins if self.margin_weight else lead)
        if self.centring_weight:
            losses = losses + self.centring_weight * (chosen + rejected).square()
        loss = batch.mean_over_pairs(losses)
        return loss.sum(), over_pairs(
            loss=loss,
            accuracy=batch.mean_over_pairs((lead > 0).float()),
            margin=batch.mean_over_pairs(lead),
            chosen_score=batch.mean_over_pairs(chosen),
            rejected_score=batch.mean_over_pairs(rejected),
        )


def calibration_error(leads: Tensor, bins: int = 10) -> float:
    """How far a reward model's certainty is from how often it is right, between 0 and 1; 0 without pairs.

    It holds the answer with the higher score for the better one, with probability σ(difference of scores). Expected
    calibration error (Guo et al. 2017, arXiv 1706.04599, equation 5) over bins of equal width between 1/2 and 1.

    Args:
        leads: score of the better answer less that of the worse one, [P].
    """
    certainty = torch.sigmoid(leads.double().abs())
    number = ((certainty - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    gap = (leads.double().sign() + 1) / 2 - certainty  # a tie is half right
    return float(torch.zeros(bins, dtype=torch.float64).index_add(0, number, gap).abs().sum() / max(len(leads), 1))


def correlation(one: Tensor, other: Tensor) -> float | None:
    """Pearson's correlation of two series [N]; None where one of them does not vary."""
    deviations = [each.double() - each.double().mean() for each in (one, other)]
    product = float(deviations[0].norm() * deviations[1].norm())
    return float(deviations[0] @ deviations[1]) / product if product else None
