"""Packed conversations are trained on as if each stood alone."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmtrain.config.schema import ModelConfig
from llmtrain.data.batches import PackedBatches, RowOrder, collate_conversations, collate_packed
from llmtrain.data.encoding import TokenRow
from llmtrain.data.mixture import Phase, PhasedMixture
from llmtrain.data.packing import PackedConversations
from llmtrain.models.heads import LanguageModel
from llmtrain.objectives.batch import Batch
from llmtrain.objectives.next_token import NextToken, TokenBatch, next_tokens, token_logprobs

VOCAB_SIZE, LENGTH, PAD = 61, 48, 0
LLAMA = ModelConfig(num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, max_sequence_length=LENGTH)
GPT2 = ModelConfig(
    num_layers=2, hidden_size=32, num_heads=4, max_sequence_length=LENGTH, positions="learned", norm="layernorm",
    activation="gelu", bias=True,
)  # fmt: skip
BOTH = pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])


def build(config: ModelConfig) -> LanguageModel:
    model = LanguageModel(config, VOCAB_SIZE).initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
    return model


def conversations() -> list[TokenRow]:
    """A few turns each, of which every other one is learned."""
    draw, made = np.random.default_rng(0), []
    for length in (48, 5, 31, 17, 2, 40, 9, 8, 3, 22):
        turns = np.cumsum(draw.random(length) < 0.3) % 2 == 1
        turns[-1] = True
        made.append(TokenRow(draw.integers(1, VOCAB_SIZE, length).astype(np.int32), turns))
    return made


def losses(model: LanguageModel, batch: TokenBatch) -> Tensor:
    """−log p of each token that is learned, at its own place, [B, S]."""
    targets, mask = next_tokens(batch.tokens, batch.loss_mask)
    nll = -model(
        batch.tokens, read=lambda hidden, head: token_logprobs(hidden, head, targets, mask), documents=batch.documents
    )
    return torch.cat((nll.new_zeros(len(nll), 1), nll[:, :-1]), dim=1)


def packed_batch(rows: list[TokenRow]) -> tuple[PackedConversations, TokenBatch]:
    packed = PackedConversations(rows, LENGTH)
    batch = collate_packed([packed[row] for row in range(len(packed))], [0] * len(packed), PAD, LENGTH)
    return packed, batch


@BOTH
def test_loss_of_each_conversation_is_as_unpacked(config: ModelConfig) -> None:
    model, rows = build(config).requires_grad_(False), conversations()
    alone = losses(model, collate_conversations(rows, [0] * len(rows), PAD, LENGTH)).sum(dim=1)
    packed, batch = packed_batch(rows)
    assert len(packed) < len(rows)
    together = losses(model, batch)
    for row in range(len(packed)):
        place = 0
        for piece in packed.packed[row]:
            found = together[row, place : place + piece.length].sum()
            assert found.item() == pytest.approx(alone[piece.document].item(), rel=1e-5)
            place += piece.length


@BOTH
def test_summed_loss_and_gradient_are_as_unpacked(config: ModelConfig) -> None:
    rows = conversations()
    found = []
    for batch in (collate_conversations(rows, [0] * len(rows), PAD, LENGTH), packed_batch(rows)[1]):
        model, objective = build(config), NextToken()
        loss, _ = objective(model, batch)
        loss.backward()
        found.append((objective.weight(batch), loss, {name: each.grad for name, each in model.named_parameters()}))
    (weight, loss, gradients), (packed_weight, packed_loss, packed_gradients) = found
    assert weight == packed_weight
    assert packed_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    for name, each in gradients.items():
        assert (packed_gradients[name] - each).norm() <= 1e-5 * each.norm(), name


def test_an_epoch_of_packed_rows_shows_every_conversation_once() -> None:
    rows = conversations()
    packed = PackedConversations(rows, LENGTH)
    order = RowOrder(PhasedMixture([Phase(0, {"a": 1.0})]), {"a": len(packed)}, batch_rows=1, seed=1)
    batches = PackedBatches({"a": packed}, order, length=LENGTH, pad_id=PAD)
    seen: list[Any] = []
    for step in range(len(packed)):
        batch: Batch = batches(step)
        for number in range(int(batch.documents.max())):
            seen.append(tuple(batch.tokens[batch.documents == number].tolist()))
        seen.append(tuple(token for token in batch.tokens[batch.documents == batch.documents.max()].tolist() if token))
    assert sorted(each for each in seen if each) == sorted(tuple(row.tokens.tolist()) for row in rows)
