"""Step → the rows of one process: what a stage trains on, as a function of the step's number.

The rows of a global batch follow from the step alone; process `rank` of `world` takes its share of them, so that the
batches are the same however many processes there are. Shapes: B rows of one process, S tokens of a row.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from llmtrain.config.seeds import derive_seed
from llmtrain.data.encoding import AnswerRow, PairRow, PromptRow, RankingRow, TokenRow
from llmtrain.data.mixture import Integers, PhasedMixture, sample_of, shuffled
from llmtrain.data.sequences import TextRow, TextRows
from llmtrain.objectives.kto import AnswerBatch
from llmtrain.objectives.next_token import TokenBatch
from llmtrain.objectives.pairs import PairBatch

TwoSided = TypeVar("TwoSided", PairRow, AnswerRow)
Sided = TypeVar("Sided", PairRow, AnswerRow, RankingRow)

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

    def rows(self, step: int) -> dict[str, list[int]]:
        """The row numbers of the step's global batch, by source."""
        source, number = self(step)
        return {self.names[each]: number[source == each].tolist() for each in sorted(set(source.tolist()))}

    def steps_of(self, name: str, row: int, steps: int) -> list[int]:
        """The steps, of the first `steps`, that have this row of a source."""
        number = self.names.index(name)
        found: list[int] = []
        for epoch in count():
            given = sample_of(row, int(self.sizes[number]), int(self.keys[number]), epoch)
            sample = self.mixture.sample_of(name, given)
            if sample is None or epoch * self.sizes[number] > self.mixture.counts(steps * self.batch_rows)[name]:
                return found
            if sample < steps * self.batch_rows:
                found.append(sample // self.batch_rows)
        raise AssertionError

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
    """Pretraining: rows of S tokens of text."""

    def __init__(
        self, rows: Mapping[str, TextRows], order: RowOrder, *, sequence_length: int, rank: int = 0, world: int = 1
    ) -> None:
        self.order, self.rows, self.length = order, rows, sequence_length
        self.share = share(order.batch_rows, rank, world)

    def __call__(self, step: int) -> TokenBatch:
        """This process's rows of the step."""
        names = self.order.names
        source, number = (each[self.share].tolist() for each in self.order(step))
        return collate_text([self.rows[names[i]][j] for i, j in zip(source, number, strict=True)], source)

    def counts(self, steps: int) -> dict[str, float]:
        """Tokens and epochs of each source that `steps` steps have used; of packed rows with their padding."""
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


class PackedBatches:
    """Rows of whole documents or conversations, padded to `length` tokens; S = length.

    `rows` are the packed rows of each source. With `attend_across`, tokens see all that stands before them in the
    row, and predict the first token of the next document; without, each document is as if it were alone.
    """

    def __init__(
        self, rows: Mapping[str, Sequence[Sequence[TokenRow]]], order: RowOrder, *, length: int, pad_id: int,
        attend_across: bool = False, rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        self.order, self.rows = order, rows
        self.share, self.length, self.pad_id = share(order.batch_rows, rank, world), length, pad_id
        self.attend_across = attend_across

    def __call__(self, step: int) -> TokenBatch:
        """This process's rows of the step."""
        source, number = (each[self.share] for each in self.order(step))
        names = self.order.names
        rows = [self.rows[names[i]][j] for i, j in zip(source.tolist(), number.tolist(), strict=True)]
        return collate_packed(rows, source, self.pad_id, self.length, attend_across=self.attend_across)

    def counts(self, steps: int) -> dict[str, float]:
        """Packed rows and epochs of each source that `steps` steps have used."""
        return self.order.counts(steps, "rows")


class LengthWarmup:
    """Another source's batches, in shorter rows during the first `steps` steps; their length doubles up to the full.

    Each row is cut into equal ones, [B, S] → [B · S / s, s], so the tokens of a step and their order stay what they
    are. Press et al. 2021 (arXiv 2012.15832) train in two such stages, Li et al. 2022 (arXiv 2108.06084) in many.
    """

    def __init__(
        self, batches: Callable[[int], TokenBatch], counts: Callable[[int], dict[str, float]], *,
        start_length: int, sequence_length: int, steps: int,
    ) -> None:  # fmt: skip
        self.batches, self.counts = batches, counts
        self.doublings = (sequence_length // start_length).bit_length() - 1
        assert start_length << self.doublings == sequence_length
        self.start_length, self.steps = start_length, steps

    def __call__(self, step: int) -> TokenBatch:
        """The batch of a step, in rows of that step's length."""
        return cut_rows(self.batches(step), self.length(step))

    def length(self, step: int) -> int:
        """Tokens of a row: each length below the full one lasts as many steps as any other."""
        return self.start_length << min(step * self.doublings // self.steps, self.doublings)


class SidedBatches(Generic[Sided]):
    """Rows of several continuations, padded on the right to one S, the longest of the global batch, rounded up."""

    def __init__(
        self, rows: Mapping[str, Sequence[Sided]], order: RowOrder, *, max_length: int, pad_id: int,
        rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        self.order = order
        self.rows: Mapping[str, Sequence[Sided]] = rows
        self.share, self.pad_id, self.max_length = share(order.batch_rows, rank, world), pad_id, max_length

    def of_step(self, step: int) -> tuple[list[Sided], Integers, int]:
        """This process's rows of the step, the source number of each, and S."""
        source, number = self.order(step)
        rows: list[Sided] = [self.rows[self.order.names[i]][j] for i, j in zip(source, number, strict=True)]
        width = batch_width([side for row in rows for side in row.sides], self.max_length)
        return rows[self.share], source[self.share], width

    def counts(self, steps: int) -> dict[str, float]:
        """Rows and epochs of each source that `steps` steps have used."""
        return self.order.counts(steps, "rows")


class PairBatches(SidedBatches[PairRow]):
    """DPO and kin: pairs."""

    def __call__(self, step: int) -> PairBatch:
        """This process's pairs of the step."""
        rows, source, width = self.of_step(step)
        return collate_pairs(rows, source, self.pad_id, width)


class AnswerBatches(SidedBatches[AnswerRow]):
    """KTO: judged answers, each beside a mismatched one."""

    def __call__(self, step: int) -> AnswerBatch:
        """This process's answers of the step."""
        rows, source, width = self.of_step(step)
        return collate_answers(rows, source, self.pad_id, width)


class PromptBatches:
    """Reinforcement learning: the prompts of a step, over all processes; a row's place names its random draws.

    `others` are further orders of the same rows: the n-th of them has what the n-th replacement asks.
    """

    def __init__(
        self, rows: Mapping[str, Sequence[PromptRow]], order: RowOrder, others: Sequence[RowOrder] = ()
    ) -> None:
        self.order, self.rows, self.others = order, rows, others

    def __call__(self, step: int, replacement: int = 0) -> list[PromptRow]:
        """All prompts of the step, or those that replace them."""
        order = self.others[replacement - 1] if replacement else self.order
        return [self.rows[order.names[i]][j] for i, j in zip(*order(step), strict=True)]

    def counts(self, steps: int) -> dict[str, float]:
        """Prompts and epochs of each source that `steps` steps have used, replacements not counted."""
        return self.order.counts(steps, "rows")


def held_out_text(rows: TextRows, number: int, *, max_rows: int, batch_rows: int) -> list[TokenBatch]:
    """The first rows of a held-out source, in batches; `number` goes into `TokenBatch.source`."""
    found = [rows[row] for row in range(min(max_rows, len(rows)))]
    portions = [found[start : start + batch_rows] for start in range(0, len(found), batch_rows)]
    return [collate_text(portion, [number] * len(portion)) for portion in portions]


def collate_text(rows: Sequence[TextRow], source: Sequence[int]) -> TokenBatch:
    """Rows of one length as a batch."""
    documents = [row.documents for row in rows if row.documents is not None]
    return TokenBatch(
        tokens=torch.from_numpy(np.stack([row.tokens for row in rows])),
        loss_mask=torch.from_numpy(np.stack([row.mask for row in rows])), source=torch.tensor(source),
        documents=torch.from_numpy(np.stack(documents)) if documents else None,
    )  # fmt: skip


def cut_rows(batch: TokenBatch, length: int) -> TokenBatch:
    """Each row [S] as S / length rows [length], of which the first tokens are not to be predicted any more."""
    parts = batch.tokens.shape[1] // length
    if parts == 1:
        return batch
    tokens, mask = (each.reshape(-1, length) for each in (batch.tokens, batch.loss_mask))
    mask = mask.clone()
    mask[:, 0] = False
    documents = None if batch.documents is None else batch.documents.reshape(-1, length)
    source = batch.source.repeat_interleave(parts)
    return TokenBatch(tokens=tokens, loss_mask=mask, source=source, documents=documents, cut_into=parts)


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


def collate_packed(
    rows: Sequence[Sequence[TokenRow]], source: Sequence[int] | Integers, pad_id: int, width: int, *,
    attend_across: bool = False,
) -> TokenBatch:  # fmt: skip
    """Rows of several documents, one behind the other, as a batch padded to `width` tokens.

    Without `attend_across` the first token of each document is not to be predicted, and padding is the last document.
    """
    tokens, mask = _padded([_joined(row, attend_across) for row in rows], pad_id, width)
    documents = None if attend_across else torch.stack([_numbers(row, width) for row in rows])
    return TokenBatch(tokens=tokens, loss_mask=mask, source=torch.as_tensor(source), documents=documents)


def _joined(row: Sequence[TokenRow], attend_across: bool) -> TokenRow:
    mask = np.concatenate([each.mask for each in row])
    if not attend_across:
        mask[np.cumsum([0, *(len(each.tokens) for each in row[:-1])])] = False
    return TokenRow(np.concatenate([each.tokens for each in row]), mask)


def _numbers(row: Sequence[TokenRow], width: int) -> Tensor:
    lengths = [len(each.tokens) for each in row]
    repeats = torch.tensor([*lengths, width - sum(lengths)])
    return torch.arange(len(repeats), dtype=torch.int32).repeat_interleave(repeats)


def collate_pairs(rows: Sequence[PairRow], source: Sequence[int] | Integers, pad_id: int, width: int) -> PairBatch:
    """Pairs as a batch, padded to `width` tokens."""
    chosen, chosen_mask = _padded([pair.chosen for pair in rows], pad_id, width)
    rejected, rejected_mask = _padded([pair.rejected for pair in rows], pad_id, width)
    return PairBatch(
        chosen=chosen, rejected=rejected, chosen_mask=chosen_mask, rejected_mask=rejected_mask,
        source=torch.as_tensor(source), reference=_reference(rows),
    )  # fmt: skip


def collate_answers(
    rows: Sequence[AnswerRow], source: Sequence[int] | Integers, pad_id: int, width: int
) -> AnswerBatch:
    """Judged answers as a batch, padded to `width` tokens."""
    answers, answers_mask = _padded([row.answer for row in rows], pad_id, width)
    mismatched, mismatched_mask = _padded([row.mismatched for row in rows], pad_id, width)
    return AnswerBatch(
        answers=answers, mismatched=mismatched, answers_mask=answers_mask, mismatched_mask=mismatched_mask,
        desirable=torch.tensor([row.desirable for row in rows]), source=torch.as_tensor(source),
        reference=_reference(rows),
    )  # fmt: skip


def _reference(rows: Sequence[TwoSided]) -> Tensor | None:
    known = [row.reference for row in rows if row.reference is not None]
    return torch.tensor(known) if known else None


def _padded(rows: Sequence[TokenRow], pad_id: int, width: int) -> tuple[Tensor, Tensor]:
    tokens = torch.full((len(rows), width), pad_id)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for number, row in enumerate(rows):
        tokens[number, : len(row.tokens)] = torch.from_numpy(row.tokens)
        mask[number, 1 : len(row.mask)] = torch.from_numpy(row.mask[1:])
    return tokens, mask
