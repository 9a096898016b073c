"""Step → the rankings of one process; see `batches.py`.

Shapes: B rankings, K answers of the largest one, S tokens of the longest answer with its prompt.
"""

from collections.abc import Mapping, Sequence

import torch

from llmtrain.data.batches import RowOrder, batch_width, collate_conversations, share
from llmtrain.data.encoding import RankingRow
from llmtrain.data.mixture import Integers
from llmtrain.objectives.rankings import RankingBatch


class RankingBatches:
    """Reward model: rankings, padded on the right to one S, the longest of the global batch, rounded up."""

    def __init__(
        self, rows: Mapping[str, Sequence[RankingRow]], order: RowOrder, *, max_length: int, pad_id: int,
        rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        self.order, self.rows = order, rows
        self.share, self.pad_id, self.max_length = share(order.batch_rows, rank, world), pad_id, max_length

    def __call__(self, step: int) -> RankingBatch:
        """This process's rankings of the step."""
        source, number = self.order(step)
        rows = [self.rows[self.order.names[i]][j] for i, j in zip(source, number, strict=True)]
        width = batch_width([side for row in rows for side in row.sides], self.max_length)
        return collate_rankings(rows[self.share], source[self.share], self.pad_id, width)

    def counts(self, steps: int) -> dict[str, float]:
        """Rankings and epochs of each source that `steps` steps have used."""
        return self.order.counts(steps, "rows")


def collate_rankings(
    rows: Sequence[RankingRow], source: Sequence[int] | Integers, pad_id: int, width: int
) -> RankingBatch:
    """Rankings as a batch, their answers padded to `width` tokens; a margin that is not known is 0."""
    size = max(len(row.answers) for row in rows)
    tokens = torch.full((len(rows), size, width), pad_id)
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    margins = torch.zeros(len(rows), size, size)
    better = torch.zeros(margins.shape, dtype=torch.bool)
    for number, row in enumerate(rows):
        answers = collate_conversations(row.answers, [0] * len(row.answers), pad_id, width)
        tokens[number, : len(answers)], mask[number, : len(answers)] = answers.tokens, answers.loss_mask
        for (best, worse), margin in zip(row.better, row.margins, strict=True):
            better[number, best, worse] = True
            margins[number, best, worse] = margin or 0.0
    return RankingBatch(tokens=tokens, mask=mask, better=better, margins=margins, source=torch.as_tensor(source))
