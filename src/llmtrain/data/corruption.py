"""Rows of text → what a model is trained to mend: anew in every step, as a function of the step and the row.

Each row has a key of its own, and all its draws are numbers counted from there; so rows are corrupted alike whatever
processes and micro-batches they stand in, and nothing has to be saved. Shapes: B rows, S tokens of a row.
"""

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from llmtrain.config.seeds import derive_seed
from llmtrain.data.mixture import GOLDEN
from llmtrain.data.words import scramble
from llmtrain.objectives.batch import Batch
from llmtrain.objectives.next_token import TokenBatch

Corrupted = TypeVar("Corrupted", bound=Batch, covariant=True)


class Corruption(Protocol[Corrupted]):
    """One way to corrupt rows."""

    def __call__(self, batch: TokenBatch, keys: Sequence[int]) -> Corrupted:
        """The rows of a batch, corrupted as their keys [B] say."""


class TextBatches(Protocol):
    """Batches of text."""

    share: slice

    def __call__(self, step: int) -> TokenBatch: ...
    def counts(self, steps: int) -> dict[str, float]: ...


class CorruptedBatches(Generic[Corrupted]):
    """Other batches, corrupted."""

    def __init__(self, batches: TextBatches, corrupt: Corruption[Corrupted], seed: int) -> None:
        self.batches, self.corrupt, self.seed = batches, corrupt, seed

    def __call__(self, step: int) -> Corrupted:
        """This process's rows of the step."""
        batch, first = self.batches(step), self.batches.share.start
        return self.corrupt(batch, [row_key(self.seed, step, first + row) for row in range(len(batch))])

    def counts(self, steps: int) -> dict[str, float]:
        """What `steps` steps have used of each source."""
        return self.batches.counts(steps)


def row_key(seed: int, step: int, row: int) -> int:
    """The key of a row of a step, `row` being its number among the rows of all processes."""
    return derive_seed(seed, "corruption", step, row)


def held_out_key(source: int, row: int) -> int:
    """The key of a held-out row: the same in every run, so that runs are measured alike."""
    return derive_seed("held-out corruption", source, row)


def draws(keys: Sequence[int], count: int) -> NDArray[np.float64]:
    """Numbers in [0, 1), [B, count]: of each key the first `count` that SplitMix64 gives, starting from it."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * GOLDEN
    bits = scramble(np.array(keys, dtype=np.uint64)[:, None] + steps)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def whole(draw: NDArray[np.float64], low: NDArray[np.int64] | int, high: NDArray[np.int64] | int) -> NDArray[np.int64]:
    """Whole numbers from `low` to `high`, both included, all as likely, of draws in [0, 1)."""
    found = low + (draw * (np.asarray(high) - low + 1)).astype(np.int64)
    return np.minimum(found, high)  # a draw just below 1 may be rounded up


def text_lengths(batch: TokenBatch, pad_id: int) -> NDArray[np.int64]:
    """How many tokens of each row [B] are no padding."""
    is_padding = (batch.tokens.numpy() == pad_id) & ~batch.loss_mask.numpy()
    is_padding[:, 0] = False
    width: int = is_padding.shape[1]
    return width - np.logical_and.accumulate(is_padding[:, ::-1], axis=1).sum(axis=1)
