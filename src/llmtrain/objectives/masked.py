"""Masked language modelling, with or without next-sentence prediction (Devlin et al. 2019, arXiv 1810.04805).

Only the positions that are predicted go through the head: their hidden states are gathered first. Each row has the same
number of places for them, so that shapes are known beforehand; those that a row does not need count for nothing.

Shapes: B rows, S tokens of a row, M places for predictions in each.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.objectives.batch import Batch, Metrics
from llmtrain.objectives.logprobs import cross_entropy_sum_and_hits
from llmtrain.objectives.next_token import losses_of_sources
from llmtrain.objectives.routing import Stack, before_padding


@dataclasses.dataclass(frozen=True)
class MaskedBatch(Batch):
    """Rows of text with some tokens hidden."""

    tokens: Tensor
    """[B, S] int64, as the model reads them."""
    places: Tensor
    """[B, M] int64: the positions that are predicted, ascending; 0 where a row has fewer."""
    targets: Tensor
    """[B, M] int64: the tokens that stood there."""
    loss_mask: Tensor
    """[B, M] bool: the places that are used."""
    source: Tensor
    """[B] int64: number of the source that the row comes from."""
    documents: Tensor | None = None
    """[B, S] int32, non-decreasing in a row: the document of each token, where none sees another document than its own.
    Padding has a number of its own."""
    lengths: Tensor | None = None
    """[B] int64: tokens of each row that are no padding; None where no row is padded."""
    segments: Tensor | None = None
    """[B, S] int64: 0 in the first segment, 1 in the second one, where there are two."""
    is_other: Tensor | None = None
    """[B] int64: 0 where the second segment goes on from the first, 1 where it is from another place."""

    def counted_tokens(self) -> dict[Stack, Tensor]:
        """All that is no padding, [B, S] bool."""
        return {"encoder": before_padding(self.tokens, self.lengths)}

    def predicted(self) -> Tensor:
        """The tokens that are to be predicted, [N]."""
        return self.targets[self.loss_mask]

    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return self.tokens.numel()

    def num_predicted(self) -> int:
        """The places for predictions; those that a row has not filled are counted too."""
        return self.places.numel()


class MaskedTokens:
    """Cross-entropy of the hidden tokens, averaged over them, and of the second segment's label, averaged over rows.

    As in BERT, the two means are added; the label's is weighed by `next_sentence_weight`. A row's label counts as much
    as its M places, so they are these means exactly where every row has M tokens to predict. `z_loss`,
    `label_smoothing` and `source_names` as in `NextToken`.
    """

    def __init__(
        self, z_loss: float = 0.0, source_names: Sequence[str] = (), label_smoothing: float = 0.0,
        next_sentence_weight: float = 1.0,
    ) -> None:  # fmt: skip
        self.z_loss, self.label_smoothing, self.source_names = z_loss, label_smoothing, tuple(source_names)
        self.next_sentence_weight = next_sentence_weight

    def weight(self, batch: MaskedBatch) -> Tensor:
        """Number of predicted tokens."""
        return batch.loss_mask.sum().float()

    def __call__(self, model: nn.Module, batch: MaskedBatch) -> tuple[Tensor, Metrics]:
        """The summed loss; metrics: `loss` in nats per token, over all and for each source, and `masked_accuracy`;
        with labels `next_sentence_loss` and `next_sentence_accuracy`."""

        def read(hidden: Tensor, head_weight: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
            where = batch.places[..., None].expand(-1, -1, hidden.shape[-1])
            losses: dict[str, Any] = {"z_loss": self.z_loss, "label_smoothing": self.label_smoothing}
            return cross_entropy_sum_and_hits(
                hidden.gather(1, where), head_weight, batch.targets, batch.loss_mask, **losses, **options
            )

        options: dict[str, Any] = {"read": read, "documents": batch.documents}
        options |= {} if batch.segments is None else {"segments": batch.segments}
        if batch.is_other is None:
            loss, nll, hits = model(batch.tokens, **options)
            metrics: Metrics = {}
        else:
            (loss, nll, hits), logits = model(batch.tokens, pooled=True, **options)
            added, metrics = self._next_sentence(logits, batch.is_other)
            loss = loss + self.next_sentence_weight * batch.places.shape[1] * added
        metrics |= {"loss": (nll.sum(), self.weight(batch)), "masked_accuracy": (hits.sum(), self.weight(batch))}
        return loss, metrics | losses_of_sources(self.source_names, batch.source, nll, batch.loss_mask)

    def _next_sentence(self, logits: Tensor, is_other: Tensor) -> tuple[Tensor, Metrics]:
        """The summed loss of the labels [B], from logits [B, 2], and its metrics."""
        loss = F.cross_entropy(logits.float(), is_other, reduction="sum")
        right, rows = (logits.argmax(dim=-1) == is_other).sum().float(), loss.new_full((), len(is_other))
        return loss, {"next_sentence_loss": (loss, rows), "next_sentence_accuracy": (right, rows)}
