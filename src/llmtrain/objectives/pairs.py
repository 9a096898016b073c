"""Pairs of a chosen and a rejected answer: the batch type, and what is read of a model about each answer.

Shapes: B pairs, S tokens of the longest row. Both answers of all pairs go through the model in one pass of 2·B rows,
the chosen ones first.
"""

import dataclasses

import torch
from torch import Tensor, nn

from llmtrain.objectives.batch import Batch, Metrics
from llmtrain.objectives.next_token import next_tokens, token_logprobs
from llmtrain.objectives.routing import Stack, before_the_last


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
    reference: Tensor | None = None
    """[B, 2] float32: the reference's log-probabilities of the chosen and the rejected answer, if known beforehand."""

    def rows(self) -> tuple[Tensor, Tensor]:
        """Tokens and answer mask of all rows, [2·B, S] each: first the chosen, then the rejected."""
        return torch.cat([self.chosen, self.rejected]), torch.cat([self.chosen_mask, self.rejected_mask])

    def counted_tokens(self) -> dict[Stack, Tensor]:
        """What answers of all rows are predicted from, [2·B, S] bool."""
        return {"decoder": before_the_last(self.rows()[1])}


def answer_scores(scores: Tensor, mask: Tensor) -> Tensor:
    """The score [B] at the last answer token of each row, from scores [B, S] of all positions and the answer mask."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, 0).amax(dim=1, keepdim=True)
    return scores.gather(1, last)[:, 0]


def answer_lengths(mask: Tensor) -> Tensor:
    """Tokens [B] of each row's answer that a model predicts, from the answer mask [B, S]; at least 1."""
    return mask[:, 1:].sum(dim=1).clamp(min=1)


def answer_logprobs(model: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    """Log-probability [B] of each row's answer given what stands before it; tokens and answer mask are [B, S]."""
    targets, counts = next_tokens(tokens, mask)

    def read(hidden: Tensor, head_weight: Tensor, softcap: float | None = None) -> Tensor:
        return token_logprobs(hidden, head_weight, targets, counts, softcap=softcap)

    return model(tokens, read=read).sum(dim=1)


def num_pairs(batch: PairBatch) -> Tensor:
    """Number of pairs, 0-dim float32: what the objectives on pairs average over."""
    return torch.tensor(float(len(batch)), device=batch.chosen.device)


def over_pairs(counted: Tensor | None = None, **values: Tensor) -> Metrics:
    """Values [B], one for each pair, as (sum, number of pairs), over those that are counted ([B] bool), or all."""
    found: Metrics = {}
    for name, value in values.items():
        weights = torch.ones_like(value, dtype=torch.float32) if counted is None else counted.float()
        found[name] = ((value.detach().float() * weights).sum(), weights.sum())
    return found
