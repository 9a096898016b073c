"""Conversations as pairs of sequences: what stands before an answer is read by an encoder, the answer is written.

Shapes: B rows, S tokens of the longest inputs, T of the longest targets.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llmtrain.config.errors import DataError
from llmtrain.data.batches import RowOrder, batch_width, share
from llmtrain.data.encoding import TokenRow
from llmtrain.data.mixture import Integers
from llmtrain.data.pieces import Place
from llmtrain.objectives.sequence_to_sequence import SequencePairBatch


class SequencePairRow(NamedTuple):
    """Inputs and targets; all of the targets are learned."""

    inputs: TokenRow
    targets: TokenRow
    place: Place | str | None = None

    @property
    def sides(self) -> tuple[TokenRow, TokenRow]:
        """Both sequences."""
        return self.inputs, self.targets


def answers_of(row: TokenRow) -> list[SequencePairRow]:
    """Each answer of a conversation that is learned, with all that stands before it as its inputs.

    Raises DataError for an answer that nothing stands before.
    """
    borders = np.flatnonzero(np.diff(row.mask.astype(np.int8), prepend=0, append=0))
    found = []
    for start, end in borders.reshape(-1, 2).tolist():
        if start == 0:
            raise DataError(f"{row.place}: nothing stands before the answer, so the encoder has nothing to read")
        inputs = TokenRow(row.tokens[:start], np.zeros(start, dtype=np.bool_))
        found.append(SequencePairRow(inputs, TokenRow(row.tokens[start:end], row.mask[start:end]), row.place))
    return found


def answers_by_source(rows: Mapping[str, Sequence[TokenRow]]) -> dict[str, list[SequencePairRow]]:
    """`answers_of` all conversations of each source, in order."""
    return {name: [pair for row in each for pair in answers_of(row)] for name, each in rows.items()}


class SequencePairBatches:
    """Fine-tuning of encoder-decoders; S and T are the longest of the global batch, rounded up."""

    def __init__(
        self, rows: Mapping[str, Sequence[SequencePairRow]], order: RowOrder, *, max_length: int, pad_id: int,
        rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        self.order, self.rows = order, rows
        self.share, self.pad_id, self.max_length = share(order.batch_rows, rank, world), pad_id, max_length

    def __call__(self, step: int) -> SequencePairBatch:
        """This process's rows of the step."""
        source, number = self.order(step)
        rows = [self.rows[self.order.names[i]][j] for i, j in zip(source, number, strict=True)]
        widths = [batch_width([row.sides[side] for row in rows], self.max_length) for side in (0, 1)]
        return collate_sequence_pairs(rows[self.share], source[self.share], self.pad_id, *widths)

    def counts(self, steps: int) -> dict[str, float]:
        """Rows and epochs of each source that `steps` steps have used."""
        return self.order.counts(steps, "rows")


def collate_sequence_pairs(
    rows: Sequence[SequencePairRow], source: Sequence[int] | Integers, pad_id: int, width: int,
    target_width: int | None = None,
) -> SequencePairBatch:  # fmt: skip
    """Pairs as a batch, inputs padded to `width` and targets to `target_width` tokens, or to `width` too.

    The decoder begins with the padding token, as T5's does.
    """
    inputs, lengths = _padded([row.inputs for row in rows], pad_id, width)
    targets, target_lengths = _padded([row.targets for row in rows], pad_id, target_width or width)
    return SequencePairBatch(
        inputs=inputs, tokens=torch.nn.functional.pad(targets[:, :-1], (1, 0), value=pad_id), targets=targets,
        loss_mask=torch.arange(targets.shape[1]) < target_lengths[:, None], source=torch.as_tensor(source),
        input_lengths=lengths,
    )  # fmt: skip


def _padded(rows: Sequence[TokenRow], pad_id: int, width: int) -> tuple[Tensor, Tensor]:
    tokens = torch.full((len(rows), width), pad_id)
    for number, row in enumerate(rows):
        tokens[number, : len(row.tokens)] = torch.from_numpy(row.tokens)
    return tokens, torch.tensor([len(row.tokens) for row in rows])
