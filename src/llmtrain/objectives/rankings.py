"""Rankings of answers: the batch type, and what is read of a model about each answer.

Shapes: B rankings, K answers of the largest one, A answers of all rankings, S tokens of the longest row.
"""

import dataclasses

import torch
from torch import Tensor, nn

from llmtrain.objectives.batch import Batch
from llmtrain.objectives.pairs import answer_scores
from llmtrain.objectives.routing import Stack, before_the_last


@dataclasses.dataclass(frozen=True)
class RankingBatch(Batch):
    """Several answers to each prompt and which is better than which; padded on the right to one length.

    Rankings of fewer answers than the largest are filled up with answers that have nothing in their mask; these are
    never read. A pair is a ranking of two.
    """

    tokens: Tensor
    """[B, K, S] int64."""
    mask: Tensor
    """[B, K, S] bool: the tokens of the answer, its end token included."""
    better: Tensor
    """[B, K, K] bool: whether the answer of the row is better than that of the column; in each ranking some is."""
    margins: Tensor
    """[B, K, K] float32: how much better, in the data's own unit; 0 where it is not said."""
    source: Tensor
    """[B] int64: number of the source that the ranking comes from."""

    @property
    def there(self) -> Tensor:
        """[K, B] bool: which answers there are. The first of all rankings come first, then the second, ..."""
        return self.mask.any(dim=2).T

    def rows(self) -> tuple[Tensor, Tensor]:
        """Tokens and answer mask of the answers that there are, [A, S] each, in the order of `there`."""
        there = self.there
        return self.tokens.transpose(0, 1)[there], self.mask.transpose(0, 1)[there]

    def counted_tokens(self) -> dict[Stack, Tensor]:
        """What answers of all rows are predicted from, [A, S] bool."""
        return {"decoder": before_the_last(self.rows()[1])}

    def by_ranking(self, values: Tensor) -> Tensor:
        """Values [A] of the answers in the order of `there`, as [B, K]; 0 where there is no answer."""
        there = self.there
        return values.new_zeros(there.shape).masked_scatter(there, values).T

    def mean_over_pairs(self, values: Tensor) -> Tensor:
        """The mean over the pairs of each ranking, [B], of values of its pairs, [B, K, K]."""
        return torch.where(self.better, values, 0.0).sum(dim=(1, 2)) / self.better.sum(dim=(1, 2))

    def num_tokens(self) -> int:
        """Tokens the model is run over, padding included."""
        return int(self.there.sum()) * self.tokens.shape[2]


def ranking_scores(model: nn.Module, batch: RankingBatch) -> Tensor:
    """The score [B, K] of each answer, at its last token; each goes through the model once, all in one pass."""
    tokens, mask = batch.rows()
    return batch.by_ranking(answer_scores(model(tokens), mask))
