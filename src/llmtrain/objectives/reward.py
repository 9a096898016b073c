"""Reward modelling: a score for an answer, learned from which of two answers people prefer.

Shapes: B pairs, S tokens of the longest row.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.objectives.batch import Metrics
from llmtrain.objectives.pairs import PairBatch, answer_scores, num_pairs, over_pairs


class BradleyTerry:
    """−log σ(score of the chosen − score of the rejected answer), averaged over pairs.

    Ouyang et al. 2022 (arXiv 2203.02155), equation 1, with one pair for each prompt. The model maps tokens [B, S] to
    scores [B, S]; an answer's score stands at its last token.
    """

    def weight(self, batch: PairBatch) -> Tensor:
        """Number of pairs."""
        return num_pairs(batch)

    def __call__(self, model: nn.Module, batch: PairBatch) -> tuple[Tensor, Metrics]:
        """The summed loss; metrics: loss, accuracy (a tie is wrong), margin and both mean scores."""
        tokens, mask = batch.rows()
        chosen, rejected = answer_scores(model(tokens), mask).chunk(2)
        losses = -F.logsigmoid(chosen - rejected)
        return losses.sum(), over_pairs(
            loss=losses,
            accuracy=chosen > rejected,
            margin=chosen - rejected,
            chosen_score=chosen,
            rejected_score=rejected,
        )
