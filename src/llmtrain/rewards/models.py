"""The learned reward: the normalised score of a reward model.

Shapes: B answers, S tokens of the longest prompt with its answer.
"""

from collections.abc import Sequence

import torch

from llmtrain.data.batches import WIDTH_MULTIPLE
from llmtrain.models.heads import ScalarModel
from llmtrain.objectives.pairs import answer_scores
from llmtrain.rewards.answers import Answer


class LearnedReward:
    """A reward model's score at an answer's last token, shifted and scaled to mean 0 and standard deviation 1.

    Prompts and answers are padded on the right to a multiple of 8 and read in portions of `micro_batch_rows`. It
    computes in the precision (autocast) of whoever calls it. The model is in evaluation mode, on its device.
    """

    def __init__(self, model: ScalarModel, *, pad_id: int, micro_batch_rows: int | None = None) -> None:
        self.model, self.pad_id, self.micro_batch_rows = model, pad_id, micro_batch_rows

    @torch.no_grad()
    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """The scores, [B]; float32 numbers."""
        if not answers:
            return []
        rows = [[*each.prompt_tokens, *each.tokens] for each in answers]
        width = -(-max(map(len, rows)) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        tokens = torch.full((len(rows), width), self.pad_id)
        mask = torch.zeros(tokens.shape, dtype=torch.bool)
        for number, (row, answer) in enumerate(zip(rows, answers, strict=True)):
            tokens[number, : len(row)] = torch.tensor(row)
            mask[number, len(answer.prompt_tokens) : len(row)] = True
        tokens, mask = (each.to(self.model.score.weight.device) for each in (tokens, mask))
        portions = range(0, len(rows), self.micro_batch_rows or len(rows))
        size = self.micro_batch_rows or len(rows)
        scores = [answer_scores(self.model(tokens[at : at + size]), mask[at : at + size]) for at in portions]
        found: list[float] = self.model.normalised(torch.cat(scores).float()).tolist()
        return found
