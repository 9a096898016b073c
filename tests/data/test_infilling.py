"""Fill-in-the-middle: the parts of a document put together are the document, and rows keep their length."""

import numpy as np
import pytest
import torch

from llmtrain.config.schema import FillInTheMiddleConfig
from llmtrain.data.corruption import row_key
from llmtrain.data.infilling import Infilling
from llmtrain.data.special_tokens import InfillingTokens
from llmtrain.objectives.next_token import TokenBatch

END, PAD, ROWS, LENGTH = 0, 1, 300, 60
TOKENS = InfillingTokens(prefix=2, suffix=3, middle=4)


def text(ends: bool = True, padding: int = 0, apart: bool = False, seed: int = 0) -> TokenBatch:
    """Rows of consecutive numbers, with an end token in one place of ten."""
    draw = np.random.default_rng(seed)
    tokens = np.arange(10, 10 + LENGTH) + 1000 * np.arange(ROWS)[:, None]
    if ends:
        tokens[draw.random(tokens.shape) < 0.1] = END
    mask = np.ones(tokens.shape, bool)
    mask[:, 0] = False
    documents = np.cumsum(np.roll(tokens == END, 1, axis=1) & (np.arange(LENGTH) > 0), axis=1)
    if apart:
        mask[:, 1:] &= documents[:, 1:] == documents[:, :-1]
    if padding:
        tokens[:, -padding:], mask[:, -padding:] = PAD, False
        documents[:, -padding:] = documents[:, -padding - 1 : -padding] + 1
    numbers = torch.from_numpy(documents.astype(np.int32)) if apart else None
    return TokenBatch(torch.from_numpy(tokens), torch.from_numpy(mask), torch.arange(ROWS), numbers)


def infilled(batch: TokenBatch, **options: float) -> TokenBatch:
    infilling = Infilling(FillInTheMiddleConfig(**options), TOKENS, eos_id=END, pad_id=PAD)
    return infilling(batch, [row_key(0, 0, row) for row in range(len(batch))])


def documents_of(row: list[int]) -> list[list[int]]:
    """The documents of a row, each with its end token."""
    found: list[list[int]] = [[]]
    for token in row:
        found[-1].append(token)
        if token == END:
            found.append([])
    return [each for each in found if each]


def put_together(document: list[int]) -> tuple[list[int], str]:
    """The document as it was written, and the order in which it stood."""
    if document[0] != TOKENS.prefix:
        return document, "as written"
    end = document[-1:] if document[-1] == END else []
    body = document[: len(document) - len(end)]
    suffix_at, middle_at = body.index(TOKENS.suffix), body.index(TOKENS.middle)
    if suffix_at == 1:  # with an empty prefix both orders are the same
        return [*body[middle_at + 1 :], *body[2:middle_at], *end], "suffix first"
    return [*body[1:suffix_at], *body[middle_at + 1 :], *body[suffix_at + 1 : middle_at], *end], "prefix first"


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("spm_rate", [0.0, 0.5, 1.0])
def test_parts_put_together_are_the_text(spm_rate: float, apart: bool) -> None:
    batch = text(apart=apart)
    found = infilled(batch, rate=0.7, spm_rate=spm_rate)
    assert found.tokens.shape == batch.tokens.shape
    orders: list[str] = []
    for read, written in zip(found.tokens.tolist(), batch.tokens.tolist(), strict=True):
        parts = [put_together(document) for document in documents_of(read)]
        together = [token for document, _ in parts for token in document]
        assert together == written[: len(together)]
        orders += [order for _, order in parts[:-1]]  # for the last there may be no room
        added = 3 * sum(order != "as written" for _, order in parts)
        assert len(together) == LENGTH - added
    shares = {order: orders.count(order) / len(orders) for order in ("suffix first", "prefix first")}
    assert sum(shares.values()) == pytest.approx(0.7, abs=4 * (0.21 / len(orders)) ** 0.5)
    if spm_rate != 0.5:
        # a document whose prefix is empty reads alike in both orders
        assert shares["prefix first" if spm_rate else "suffix first"] < 0.35
    else:
        assert shares["suffix first"] > shares["prefix first"] > 0.2


def test_cuts_lie_anywhere() -> None:
    found = infilled(text(ends=False), rate=1.0, spm_rate=0.0)
    sizes = np.array([
        [row.index(TOKENS.suffix) - 1, row.index(TOKENS.middle) - row.index(TOKENS.suffix) - 1]
        for row in found.tokens.tolist()
    ])  # fmt: skip
    kept = LENGTH - 3
    assert sizes.min() == 0
    assert sizes.max() > 0.8 * kept
    assert sizes.mean(axis=0) == pytest.approx([kept / 3, kept / 3], rel=0.1)  # thirds on average


def test_all_tokens_are_learned_but_the_first_of_what_sees_nothing() -> None:
    together, apart = infilled(text(), rate=0.6), infilled(text(apart=True), rate=0.6)
    assert torch.equal(together.tokens, apart.tokens)
    assert together.loss_mask[:, 1:].all()
    assert not together.loss_mask[:, 0].any()
    assert together.documents is None
    assert apart.documents is not None
    first = torch.ones_like(apart.loss_mask)
    first[:, 1:] = apart.documents[:, 1:] != apart.documents[:, :-1]
    assert torch.equal(apart.loss_mask, ~first)
    ends = (apart.tokens == END).roll(1, dims=1)
    ends[:, 0] = True
    assert torch.equal(first, ends)


@pytest.mark.parametrize("apart", [False, True])
def test_padding_makes_room(apart: bool) -> None:
    batch = text(padding=20, apart=apart)
    found = infilled(batch, rate=0.5)
    for read, written, mask in zip(found.tokens.tolist(), batch.tokens.tolist(), found.loss_mask.tolist(), strict=True):
        text_read = [token for token in read if token != PAD]
        assert read == text_read + [PAD] * (LENGTH - len(text_read))
        assert not any(mask[len(text_read) :])
        together = [token for document in documents_of(text_read) for token in put_together(document)[0]]
        assert together == written[: len(together)]
        if len(text_read) < LENGTH:
            assert len(together) == LENGTH - 20
    if apart:
        assert found.documents is not None
        assert (found.documents[:, 1:] >= found.documents[:, :-1]).all()
        padding = found.tokens == PAD
        assert (
            found.documents[padding] == found.documents.max(dim=1).values[:, None].expand_as(padding)[padding]
        ).all()


def test_short_rows_are_left_as_they_are() -> None:
    short = text(ends=False)
    short = TokenBatch(short.tokens[:, :3], short.loss_mask[:, :3], short.source)
    assert torch.equal(infilled(short, rate=1.0).tokens, short.tokens)
