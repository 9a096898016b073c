"""Step → the rows of one process: what a stage trains on, as a function of the step's number.

The rows of a global batch follow from the step alone; process `rank` of `world` takes its share of them, so that the
batches are the same however many processes there are. Shapes: B rows of one process, S tokens of a row.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmtrain.config.seeds import derive_seed
from llmtrain.data.encoding import PairRow, PromptRow, TokenRow
from llmtrain.data.mixture import Integers, PhasedMixture, shuffled
from llmtrain.data.shards import TokenSource
from llmtrain.objectives.next_token import TokenBatch
from llmtrain.objectives.preference import PairBatch

WIDTH_MULTIPLE = 8  # matrix products are faster when a row's length is a multiple of this


class RowOrder:
    """Which row of which source stands at each place of each batch: mixed by weight, shuffled anew in every epoch.

    `sizes` are the rows of every source of the mixture, of those too that are drawn from no longer.
    """

    def __init__(self, mixture: PhasedMixture, sizes: Mapping[str, int], batch_rows: int, seed: int) -> None:
        self.mixture = mixture
        self.names = mixture.names
        self.sizes = np.array([sizes[name] for name in self.mixture.names])
        self.keys = np.array([derive_seed(seed, "order", name) for name in self.mixture.names])
        self.batch_rows = batch_rows

    def __call__(self, step: int) -> tuple[Integers, Integers]:
        """Source number and row number of each row of the step's global batch, [batch_rows] each."""
        source, sample = self.mixture(np.arange(step * self.batch_rows, (step + 1) * self.batch_rows))
        return source, shuffled(sample, self.sizes[source], self.keys[source])

    def counts(self, steps: int, unit: str, per_row: int = 1) -> dict[str, float]:
        """What `steps` steps have used of each source: `data/<name>/<unit>` and `data/<name>/epochs`."""
        counts: dict[str, float] = {}
        for (name, rows), size in zip(
            self.mixture.counts(steps * self.batch_rows).items(), self.sizes.tolist(), strict=True
        ):
            counts[f"data/{name}/{unit}"] = rows * per_row
            counts[f"data/{name}/epochs"] = rows / max(size, 1)
        return counts


def share(batch_rows: int, rank: int, world: int) -> slice:
    """The rows of the global batch that process `rank` of `world` takes."""
    return slice(rank * batch_rows // world, (rank + 1) * batch_rows // world)


class TokenBatches:
    """Pretraining: blocks of `sequence_length` tokens of running text; S = sequence_length."""

    def __init__(
        self, sources: Mapping[str, TokenSource], order: RowOrder, *, sequence_length: int, rank: int = 0,
        world: int = 1,
    ) -> None:  # fmt: skip
        self.order, self.length = order, sequence_length
        self.sources = sources
        self.share = share(order.batch_rows, rank, world)

    def __call__(self, step: int) -> TokenBatch:
        """This process's rows of the step."""
        names = self.order.names
        source, row = (each[self.share].tolist() for each in self.order(step))
        blocks = [
            self.sources[names[number]].block(block, self.length) for number, block in zip(source, row, strict=True)
        ]
        return running_text(blocks, source)

    def counts(self, steps: int) -> dict[str, float]:
        """Tokens and epochs of each source that `steps` steps have used."""
        return self.order.counts(steps, "tokens", self.length)


class ConversationBatches:
    """Supervised fine-tuning: conversations, padded on the right; S is the longest of the global batch, rounded up."""

    def __init__(
        self, rows: Mapping[str, Sequence[TokenRow]], order: RowOrder, *, max_length: int, pad_id: int,
        rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        self.order, self.rows = order, rows
        self.share, self.pad_id, self.max_length = share(order.batch_rows, rank, world), pad_id, max_length

    def __call__(self, step: int) -> TokenBatch:
        """This process's rows of the step."""
        source, number = self.order(step)
        rows = [self.rows[self.order.names[i]][j] for i, j in zip(source, number, strict=True)]
        width = batch_width(rows, self.max_length)
        return collate_conversations(rows[self.share], source[self.share], self.pad_id, width)

    def counts(self, steps: int) -> dict[str, float]:
        """Rows and epochs of each source that `steps` steps have used."""
        return self.order.counts(steps, "rows")


class PairBatches:
    """Reward model and DPO: pairs, padded on the right to one S, the longest of the global batch, rounded up."""

    def __init__(
        self, rows: Mapping[str, Sequence[PairRow]], order: RowOrder, *, max_length: int, pad_id: int,
        rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        self.order, self.rows = order, rows
        self.share, self.pad_id, self.max_length = share(order.batch_rows, rank, world), pad_id, max_length

    def __call__(self, step: int) -> PairBatch:
        """This process's pairs of the step."""
        source, number = self.order(step)
        rows = [self.rows[self.order.names[i]][j] for i, j in zip(source, number, strict=True)]
        width = batch_width([side for pair in rows for side in pair], self.max_length)
        return collate_pairs(rows[self.share], source[self.share], self.pad_id, width)

    def counts(self, steps: int) -> dict[str, float]:
        """Pairs and epochs of each source that `steps` steps have used."""
        return self.order.counts(steps, "rows")


class PromptBatches:
    """PPO: the prompts of a step, for the whole batch over all processes; a row's place names its random draws."""

    def __init__(self, rows: Mapping[str, Sequence[PromptRow]], order: RowOrder) -> None:
        self.order, self.rows = order, rows

    def __call__(self, step: int) -> list[list[int]]:
        """Ids of all prompts of the step."""
        return [self.rows[self.order.names[i]][j].tokens for i, j in zip(*self.order(step), strict=True)]

    def counts(self, steps: int) -> dict[str, float]:
        """Prompts and epochs of each source that `steps` steps have used."""
        return self.order.counts(steps, "rows")


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Held-out text of one source, in batches; `num_bytes` is what the tokens to be predicted stand for."""

    batches: list[TokenBatch]
    num_bytes: int


def held_out_text(
    source: TokenSource, number: int, token_bytes: NDArray[np.int64], *, max_blocks: int, batch_rows: int, length: int
) -> HeldOut:
    """The first blocks of a held-out source. Text shorter than `length` tokens makes one shorter block.

    `number` goes into `TokenBatch.source`; `token_bytes` [vocab_size] are the bytes of each token.
    """
    length = min(length, len(source))
    blocks = [source.block(index, length) for index in range(min(max_blocks, source.num_blocks(length)))]
    num_bytes = sum(int(token_bytes[block[1:]].sum()) for block in blocks)
    portions = [blocks[start : start + batch_rows] for start in range(0, len(blocks), batch_rows)]
    return HeldOut([running_text(portion, [number] * len(portion)) for portion in portions], num_bytes)


def running_text(blocks: Sequence[NDArray[np.int64]], source: Sequence[int]) -> TokenBatch:
    """Blocks of one length as a batch in which all tokens but the first of a row are to be predicted."""
    tokens = torch.from_numpy(np.stack(blocks))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 0] = False
    return TokenBatch(tokens=tokens, loss_mask=mask, source=torch.tensor(source))


def batch_width(rows: Sequence[TokenRow], max_length: int) -> int:
    """Length of the longest row, rounded up to a multiple of `WIDTH_MULTIPLE` but not above `max_length`."""
    longest = max(len(row.tokens) for row in rows)
    return max(longest, min(max_length, -(-longest // WIDTH_MULTIPLE) * WIDTH_MULTIPLE))


def collate_conversations(
    rows: Sequence[TokenRow], source: Sequence[int] | Integers, pad_id: int, width: int
) -> TokenBatch:
    """Conversations as a batch, padded to `width` tokens."""
    tokens, mask = _padded(rows, pad_id, width)
    return TokenBatch(tokens=tokens, loss_mask=mask, source=torch.as_tensor(source))


def collate_pairs(rows: Sequence[PairRow], source: Sequence[int] | Integers, pad_id: int, width: int) -> PairBatch:
    """Pairs as a batch, padded to `width` tokens."""
    chosen, chosen_mask = _padded([pair.chosen for pair in rows], pad_id, width)
    rejected, rejected_mask = _padded([pair.rejected for pair in rows], pad_id, width)
    return PairBatch(
        chosen=chosen, rejected=rejected, chosen_mask=chosen_mask, rejected_mask=rejected_mask,
        source=torch.as_tensor(source),
    )  # fmt: skip


def _padded(rows: Sequence[TokenRow], pad_id: int, width: int) -> tuple[Tensor, Tensor]:
    tokens = torch.full((len(rows), width), pad_id)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for number, row in enumerate(rows):
        tokens[number, : len(row.tokens)] = torch.from_numpy(row.tokens)
        mask[number, 1 : len(row.mask)] = torch.from_numpy(row.mask[1:])
    return tokens, mask
