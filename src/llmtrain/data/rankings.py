"""Step → the rankings of one process; see `batches.py`.

Shapes: B rankings, K answers of the largest one, S tokens of the longest answer with its prompt.
"""

from collections.abc import Sequence

import torch

from llmtrain.data.batches import SidedBatches, collate_conversations
from llmtrain.data.encoding import RankingRow
from llmtrain.data.mixture import Integers
from llmtrain.objectives.rankings import RankingBatch


class RankingBatches(SidedBatches[RankingRow]):
    """Reward model: rankings."""

    def __call__(self, step: int) -> RankingBatch:
        """This process's rankings of the step."""
        rows, source, width = self.of_step(step)
        return collate_rankings(rows, source, self.pad_id, width)


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
