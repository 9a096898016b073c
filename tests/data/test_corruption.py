"""Draws by key, and corrupted rows that depend on the step and the row alone."""

import numpy as np
import pytest
import torch

from llmtrain.config.schema import (
    FillInTheMiddleConfig,
    MaskedConfig,
    PrefixConfig,
    SpanCorruptionConfig,
)
from llmtrain.data.batches import share
from llmtrain.data.corruption import CorruptedBatches, Corruption, draws, row_key, text_lengths, whole
from llmtrain.data.infilling import Infilling
from llmtrain.data.masking import Masking
from llmtrain.data.prefixes import Prefixes
from llmtrain.data.sequences import TextRow
from llmtrain.data.spans import SpanCorruption
from llmtrain.data.special_tokens import infilling_tokens, mask_tokens, sentinels
from llmtrain.data.tokenizers import Tokenizer, train_tokenizer
from llmtrain.objectives.batch import Batch
from llmtrain.objectives.next_token import TokenBatch

ROWS, LENGTH = 8, 40
KINDS = ("masked", "whole words", "two segments", "spans", "prefix", "infilling")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = [f"the quick brown fox jumps over {i} lazy dogs and goes home" for i in range(50)]
    return train_tokenizer(texts, 450, objectives=("masked", "span_corruption", "fill_in_the_middle"))


class Text:
    """A batch source: rows of text that know their step and number."""

    def __init__(self, tokenizer: Tokenizer, rank: int = 0, world: int = 1) -> None:
        self.tokenizer, self.share = tokenizer, share(ROWS, rank, world)

    def __call__(self, step: int) -> TokenBatch:
        rows = [text_row(self.tokenizer, 100 * step + row) for row in range(ROWS)[self.share]]
        mask = torch.arange(LENGTH).expand(len(rows), -1) > 0
        return TokenBatch(torch.from_numpy(np.stack(rows)), mask, torch.zeros(len(rows), dtype=torch.int64))

    def counts(self, steps: int) -> dict[str, float]:
        return {"data/text/tokens": float(steps)}


def text_row(tokenizer: Tokenizer, number: int) -> np.ndarray:
    """Words, with an end token here and there."""
    draw = np.random.default_rng(number)
    return np.where(draw.random(LENGTH) < 0.05, tokenizer.eos_id, draw.integers(109, tokenizer.vocab_size, LENGTH))


class Others(list[TextRow]):
    """Rows that a second segment may come from."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(
            TextRow(text_row(tokenizer, 10**6 + number), np.ones(LENGTH, bool), None) for number in range(5)
        )


def corruption(kind: str, tokenizer: Tokenizer) -> Corruption[Batch]:
    if kind == "spans":
        ids = sentinels(tokenizer, 20, "it")
        return SpanCorruption(SpanCorruptionConfig(), ids, eos_id=tokenizer.eos_id, start_id=tokenizer.pad_id)
    if kind == "prefix":
        return Prefixes(PrefixConfig(), tokenizer.pad_id)
    if kind == "infilling":
        tokens = infilling_tokens(tokenizer, "it")
        return Infilling(FillInTheMiddleConfig(), tokens, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    config = MaskedConfig(whole_words=kind == "whole words", next_sentence=kind == "two segments")
    return Masking(config, tokenizer, mask_tokens(tokenizer, "it"), {0: Others(tokenizer)})  # type: ignore[dict-item]


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [2, 4])
def test_rows_do_not_depend_on_the_processes(kind: str, world: int, tokenizer: Tokenizer) -> None:
    corrupt = corruption(kind, tokenizer)
    alone = tensors(CorruptedBatches(Text(tokenizer), corrupt, seed=3)(5))
    parts = [tensors(CorruptedBatches(Text(tokenizer, rank, world), corrupt, seed=3)(5)) for rank in range(world)]
    for name, value in alone.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), value), name


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_a_function_of_seed_step_and_row(kind: str, tokenizer: Tokenizer) -> None:
    corrupt, batch = corruption(kind, tokenizer), Text(tokenizer)(0)

    def made(seed: int, step: int) -> list[tuple[object, ...]]:
        keys = [row_key(seed, step, row) for row in range(ROWS)]
        found = tensors(corrupt(batch, keys)).values()
        return [tuple(value[row].tolist() for value in found) for row in range(ROWS)]  # type: ignore[misc]

    first = made(1, 7)
    assert made(1, 7) == first
    for other in (made(2, 7), made(1, 8)):
        changed = sum(a != b for a, b in zip(first, other, strict=True))
        assert changed >= ROWS - 2  # of few tokens the same may be drawn
    alike = tensors(
        corrupt(batch[torch.zeros(ROWS, dtype=torch.int64)], [row_key(0, 0, row) for row in range(ROWS)])
    ).values()
    assert len({tuple(str(value[row].tolist()) for value in alike) for row in range(ROWS)}) > 2


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_of_a_batch_has_the_shape_of_any_other(kind: str, tokenizer: Tokenizer) -> None:
    corrupt = corruption(kind, tokenizer)
    found = [tensors(CorruptedBatches(Text(tokenizer), corrupt, seed=0)(step)) for step in range(6)]
    for other in found[1:]:
        assert {name: value.shape for name, value in other.items()} == {n: v.shape for n, v in found[0].items()}


def test_counts_are_those_of_the_text(tokenizer: Tokenizer) -> None:
    batches = CorruptedBatches(Text(tokenizer), corruption("masked", tokenizer), seed=0)
    assert batches.counts(9) == {"data/text/tokens": 9.0}


def test_draws_are_uniform_and_independent() -> None:
    found = draws([row_key(0, step, 0) for step in range(400)], 500)
    assert found.shape == (400, 500)
    assert 0 <= found.min() < 1e-4
    assert 1 - 1e-4 < found.max() < 1
    counts = np.histogram(found, bins=20, range=(0, 1))[0]
    assert abs(counts - 10_000).max() < 5 * np.sqrt(10_000)  # five standard deviations
    assert abs(np.corrcoef(found[:, :-1].ravel(), found[:, 1:].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(found[:-1].ravel(), found[1:].ravel())[0, 1]) < 0.01


def test_draws_of_a_key_are_those_of_splitmix64() -> None:
    # the first outputs of the generator started from 1234567, as in its authors' reference code
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert draws([1234567], 3).tolist() == [[(output >> 11) / 2**53 for output in outputs]]


def test_whole_numbers_reach_both_ends() -> None:
    assert whole(np.array([0.0, 0.999, 1 - 2.0**-53]), 3, 5).tolist() == [3, 5, 5]
    assert whole(np.array([0.4]), 2, 2).tolist() == [2]


def test_lengths_of_text_leave_padding_out() -> None:
    tokens = torch.tensor([[5, 6, 9, 9], [5, 9, 9, 9], [9, 9, 9, 9], [5, 6, 7, 9]])
    mask = torch.tensor([[0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1]]).bool()
    batch = TokenBatch(tokens, mask, torch.zeros(4, dtype=torch.int64))
    assert text_lengths(batch, 9).tolist() == [2, 2, 1, 4]
