"""Prefixes: of rows and of documents, all lengths between two shares as likely."""

import numpy as np
import pytest
import torch

from llmtrain.config.schema import PrefixConfig
from llmtrain.data.corruption import row_key
from llmtrain.data.prefixes import Prefixes
from llmtrain.objectives.next_token import TokenBatch

PAD, ROWS, LENGTH = 0, 4000, 21


def with_prefix(batch: TokenBatch, low: float = 0.0, high: float = 1.0) -> TokenBatch:
    prefixes = Prefixes(PrefixConfig(min_share=low, max_share=high), PAD)
    return prefixes(batch, [row_key(0, 0, row) for row in range(len(batch))])


def rows(length: int = LENGTH, padding: int = 0, count: int = ROWS) -> TokenBatch:
    tokens = torch.arange(1, length + 1).repeat(count, 1)
    mask = torch.arange(length).repeat(count, 1) > 0
    tokens[:, length - padding :], mask[:, length - padding :] = PAD, False
    return TokenBatch(tokens, mask, torch.zeros(count, dtype=torch.int64))


@pytest.mark.parametrize(("low", "high", "shortest", "longest"), [(0, 1, 1, 20), (0.25, 0.5, 5, 10), (0.4, 0.4, 8, 8)])
def test_lengths_lie_between_the_shares(low: float, high: float, shortest: int, longest: int) -> None:
    batch = with_prefix(rows(), low, high)
    assert batch.prefix is not None
    lengths = batch.prefix.sum(dim=1)
    assert torch.equal(batch.prefix, torch.arange(LENGTH) < lengths[:, None])  # from the beginning on
    assert torch.equal(batch.loss_mask, ~batch.prefix)  # all else is predicted
    counts = np.bincount(lengths.numpy(), minlength=LENGTH)[shortest : longest + 1]
    expected = ROWS / (longest - shortest + 1)
    assert counts.sum() == ROWS
    assert abs(counts - expected).max() <= 4.5 * expected**0.5


def test_padding_is_in_no_prefix() -> None:
    batch = with_prefix(rows(padding=11))
    assert batch.prefix is not None
    assert batch.prefix.sum(dim=1).max() == LENGTH - 11 - 1
    assert torch.equal(batch.loss_mask[:, : LENGTH - 11], ~batch.prefix[:, : LENGTH - 11])
    assert not batch.loss_mask[:, LENGTH - 11 :].any()


def test_each_document_has_its_own() -> None:
    plain = rows(count=500)
    documents = torch.tensor([0] * 9 + [1] + [2] * 6 + [3] * 5, dtype=torch.int32).repeat(500, 1)  # the last is padding
    mask = torch.zeros_like(plain.loss_mask)
    mask[:, 1:] = documents[:, 1:] == documents[:, :-1]
    mask[:, 16:], plain.tokens[:, 16:] = False, PAD
    batch = with_prefix(TokenBatch(plain.tokens, mask, plain.source, documents))
    assert batch.prefix is not None
    found = set()
    for prefix, counts in zip(batch.prefix.tolist(), batch.loss_mask.tolist(), strict=True):
        first, alone, last = sum(prefix[:9]), prefix[9], sum(prefix[10:16])
        assert prefix == [True] * first + [False] * (9 - first) + [alone] + [True] * last + [False] * (11 - last)
        assert counts == [each and not seen for each, seen in zip(mask[0].tolist(), prefix, strict=True)]
        found.add((first, last))
    assert {first for first, _ in found} == set(range(1, 9))
    assert {last for _, last in found} == set(range(1, 6))
    assert len(found) > 30  # of forty: the two are drawn apart
