"""Next-token prediction: the objective of pretraining and of supervised fine-tuning.

Shapes: B rows, S tokens of the longest row.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.objectives.batch import Batch, Metrics
from llmtrain.objectives.logprobs import cross_entropy_sum, token_logprobs
from llmtrain.objectives.routing import Stack, before_the_last

__all__ = ["NextToken", "TokenBatch", "cross_entropy_sum", "next_tokens", "token_logprobs"]


@dataclasses.dataclass(frozen=True)
class TokenBatch(Batch):
    """Rows of text. Padding stands on the right, so causal attention needs no mask of its own."""

    tokens: Tensor
    """[B, S] int64."""
    loss_mask: Tensor
    """[B, S] bool: the tokens that are to be predicted; the first of a row never is."""
    source: Tensor
    """[B] int64: number of the source that the row comes from."""
    documents: Tensor | None = None
    """[B, S] int32, non-decreasing in a row: the document of each token, where none sees another document than its own.
    Padding has a number of its own. `loss_mask` leaves out the first token of each document: nothing predicts it."""
    prefix: Tensor | None = None
    """[B, S] bool: the tokens that every token of their document sees, also those before them; none is predicted."""
    cut_into: int = 1
    """The short rows that were made of each full one; where micro-batches count rows, they count full ones."""

    def counted_tokens(self) -> dict[Stack, Tensor]:
        """What tokens are predicted from, [B, S] bool."""
        return {"decoder": before_the_last(self.loss_mask)}

    def predicted(self) -> Tensor:
        """The tokens that are to be predicted, [N]."""
        return self.tokens[self.loss_mask]

    def micro_batches(self, rows: int | None) -> Iterator[Self]:
        """The batch in portions of at most `rows` full rows (None: in one)."""
        return super().micro_batches(rows and rows * self.cut_into)


def next_tokens(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """What each position predicts, and whether it counts: [B, S] both; the last predicts nothing.

    The length stays S because round shapes are what matrix products like, and the hidden states need no copy.
    """
    return F.pad(tokens[:, 1:], (0, 1)), F.pad(mask[:, 1:], (0, 1))


class NextToken:
    """Cross-entropy of the next token, averaged over the tokens to be predicted.

    With a prefix in its batch, a prefix language model. `source_names`, in the order of `TokenBatch.source`, adds a
    metric `data/<name>/loss` for each source. `z_loss` and `label_smoothing` (`cross_entropy_sum`) are in what is
    minimised; the metric `loss` is without them.
    """

    def __init__(self, z_loss: float = 0.0, source_names: Sequence[str] = (), label_smoothing: float = 0.0) -> None:
        self.z_loss, self.label_smoothing = z_loss, label_smoothing
        self.source_names = tuple(source_names)

    def weight(self, batch: TokenBatch) -> Tensor:
        """Number of predicted tokens."""
        return batch.loss_mask[:, 1:].sum().float()

    def __call__(self, model: nn.Module, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        """The summed loss; metrics: loss in nats per token, over all and for each source."""
        targets, mask = next_tokens(batch.tokens, batch.loss_mask)

        def read(hidden: Tensor, head_weight: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
            losses: dict[str, Any] = {"z_loss": self.z_loss, "label_smoothing": self.label_smoothing}
            return cross_entropy_sum(hidden, head_weight, targets, mask, **losses, **options)

        prefix = {} if batch.prefix is None else {"prefix": batch.prefix}
        loss, nll = model(batch.tokens, read=read, documents=batch.documents, **prefix)
        metrics: Metrics = {"loss": (nll.sum(), self.weight(batch))}
        return loss, metrics | losses_of_sources(self.source_names, batch.source, nll, mask)


def losses_of_sources(names: Sequence[str], source: Tensor, nll: Tensor, mask: Tensor) -> Metrics:
    """`data/<name>/loss` of each source, of nll and mask [B, ...] of rows from sources [B]."""
    metrics: Metrics = {}
    for number, name in enumerate(names):
        of_source = (source == number)[:, None]
        metrics[f"data/{name}/loss"] = ((nll * of_source).sum(), (mask & of_source).sum().float())
    return metrics
