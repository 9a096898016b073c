"""Span corruption: texts with spans taken out, and the spans (Raffel et al. 2020, arXiv 1910.10683, section 3.1.4).

As the T5 code has it (`random_spans_noise_mask`): of rows of one length as many tokens are taken out, in as many spans,
with text before each; all ways to divide the ones and the others are as likely. So rows come to the same lengths.

Shapes: B rows, L tokens of text, S of the inputs, T of the targets.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from llmtrain.config.schema import SpanCorruptionConfig
from llmtrain.data.corruption import draws
from llmtrain.objectives.next_token import TokenBatch
from llmtrain.objectives.sequence_to_sequence import SequencePairBatch


class SpanCorruption:
    """Rows of text [L] → inputs [S], in which sentinels stand for the spans, and targets [T], each span behind its own.

    Both end with an end token. With `text_only`, sentinels and end tokens of the targets are not to be predicted: what
    a text costs, without what holds it together.
    """

    def __init__(
        self, config: SpanCorruptionConfig, sentinels: Sequence[int], *, eos_id: int, start_id: int,
        text_only: bool = False,
    ) -> None:  # fmt: skip
        self.config, self.sentinels = config, np.array(sentinels, dtype=np.int64)
        self.eos_id, self.start_id, self.text_only = eos_id, start_id, text_only

    def __call__(self, batch: TokenBatch, keys: Sequence[int]) -> SequencePairBatch:
        """Inputs and targets of the rows."""
        text = batch.tokens.numpy()
        is_noise = self.noise(text.shape[1], keys)
        inputs, targets = self._without(text, is_noise), self._without(text, ~is_noise)
        read = np.concatenate([np.full((len(text), 1), self.start_id), targets[:, :-1]], axis=1)
        learned = np.ones(targets.shape, dtype=np.bool_)
        if self.text_only:
            learned = ~np.isin(targets, [*self.sentinels, self.eos_id])
        return SequencePairBatch(
            inputs=torch.from_numpy(inputs), tokens=torch.from_numpy(read), targets=torch.from_numpy(targets),
            loss_mask=torch.from_numpy(learned), source=batch.source,
        )  # fmt: skip

    def noise(self, length: int, keys: Sequence[int]) -> NDArray[np.bool_]:
        """Which tokens are taken out, [B, L]."""
        lengths = self.config.lengths(length)
        kept = length - lengths.noise
        draw = draws(keys, length - 2)
        of_text = _divided(kept, lengths.spans, draw[:, : kept - 1])
        of_spans = _divided(lengths.noise, lengths.spans, draw[:, kept - 1 :])
        ends = np.stack([of_text, of_spans], axis=2).reshape(len(keys), -1).cumsum(axis=1)  # of both in turn
        return (np.arange(length) >= ends[..., None]).sum(axis=1) % 2 == 1

    def _without(self, text: NDArray[np.int64], taken: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The rows with a sentinel in the place of each run of `taken` tokens [B, L], and an end token."""
        begins = taken.copy()
        begins[:, 1:] &= ~taken[:, :-1]
        marked = np.where(begins, self.sentinels[np.maximum(begins.cumsum(axis=1) - 1, 0)], text)
        rows = marked[~taken | begins].reshape(len(text), -1)  # as many in every row
        return np.concatenate([rows, np.full((len(rows), 1), self.eos_id)], axis=1)


def _divided(items: int, parts: int, draw: NDArray[np.float64]) -> NDArray[np.int64]:
    """Sizes [B, parts] that add up to `items`, none 0, all such as likely; of draws [B, items - 1]."""
    borders = np.sort(np.argsort(draw, axis=1, kind="stable")[:, : parts - 1], axis=1) + 1
    return np.diff(borders, axis=1, prepend=0, append=items)
