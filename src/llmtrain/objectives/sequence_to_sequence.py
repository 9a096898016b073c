"""A sequence from another: the objective of encoder-decoders, in span corruption and in fine-tuning.

Shapes: B rows, S tokens of the inputs, T tokens of the targets.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from llmtrain.objectives.batch import Batch, Metrics
from llmtrain.objectives.logprobs import cross_entropy_sum
from llmtrain.objectives.next_token import losses_of_sources
from llmtrain.objectives.routing import Stack, before_padding, up_to_the_last


@dataclasses.dataclass(frozen=True)
class SequencePairBatch(Batch):
    """What the encoder reads and what the decoder writes, both padded on the right."""

    inputs: Tensor
    """[B, S] int64: what the encoder reads."""
    tokens: Tensor
    """[B, T] int64: what the decoder reads, the start token and the targets but their last."""
    targets: Tensor
    """[B, T] int64: what it writes."""
    loss_mask: Tensor
    """[B, T] bool: the targets that are learned."""
    source: Tensor
    """[B] int64: number of the source that the row comes from."""
    input_lengths: Tensor | None = None
    """[B] int64: tokens of each row's inputs; None where no row is padded."""

    def counted_tokens(self) -> dict[Stack, Tensor]:
        """All inputs that are no padding, [B, S] bool, and what targets are predicted from, [B, T] bool."""
        inputs = before_padding(self.inputs, self.input_lengths)
        return {"encoder": inputs, "decoder": up_to_the_last(self.loss_mask)}

    def predicted(self) -> Tensor:
        """The tokens that are to be predicted, [N]."""
        return self.targets[self.loss_mask]

    def num_tokens(self) -> int:
        """Tokens of inputs and targets, padding included."""
        return self.inputs.numel() + self.targets.numel()

    def num_predicted(self) -> int:
        """Tokens of the targets, padding included."""
        return self.targets.numel()


class SequenceToSequence:
    """Cross-entropy of the targets given the inputs, averaged over the tokens to be predicted.

    Sutskever et al. 2014 (arXiv 1409.3215, equation 1). `z_loss`, `label_smoothing` and `source_names` as in
    `NextToken`.
    """

    def __init__(self, z_loss: float = 0.0, source_names: Sequence[str] = (), label_smoothing: float = 0.0) -> None:
        self.z_loss, self.label_smoothing, self.source_names = z_loss, label_smoothing, tuple(source_names)

    def weight(self, batch: SequencePairBatch) -> Tensor:
        """Number of predicted tokens."""
        return batch.loss_mask.sum().float()

    def __call__(self, model: nn.Module, batch: SequencePairBatch) -> tuple[Tensor, Metrics]:
        """The summed loss; metrics: loss in nats per token, over all and for each source."""

        def read(hidden: Tensor, head_weight: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
            losses: dict[str, Any] = {"z_loss": self.z_loss, "label_smoothing": self.label_smoothing}
            return cross_entropy_sum(hidden, head_weight, batch.targets, batch.loss_mask, **losses, **options)

        loss, nll = model(batch.tokens, source=batch.inputs, source_lengths=batch.input_lengths, read=read)
        metrics: Metrics = {"loss": (nll.sum(), self.weight(batch))}
        return loss, metrics | losses_of_sources(self.source_names, batch.source, nll, batch.loss_mask)
