"""Conversations for encoder-decoders: each answer with all before it, and batches of such pairs."""

import numpy as np
import pytest
import torch

from llmtrain.config.errors import DataError
from llmtrain.data.batches import RowOrder
from llmtrain.data.conversations import encode_conversation, encode_prompt
from llmtrain.data.encoding import TokenRow
from llmtrain.data.mixture import Phase, PhasedMixture
from llmtrain.data.sequence_pairs import (
    SequencePairBatches,
    answers_by_source,
    answers_of,
    collate_sequence_pairs,
)
from llmtrain.data.tokenizers import Tokenizer, train_tokenizer

MESSAGES = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "It is this."},
    {"role": "user", "content": "And that?"},
    {"role": "assistant", "content": "That is another."},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["What is it? It is this. And that? That is another."] * 5, 330)


def encoded(tokenizer: Tokenizer, loss_on: str) -> TokenRow:
    ids, mask = encode_conversation(tokenizer, MESSAGES, loss_on)  # type: ignore[arg-type]
    return TokenRow(np.array(ids, dtype=np.int32), np.array(mask))


def test_inputs_are_the_prompt_and_targets_the_answer(tokenizer: Tokenizer) -> None:
    pairs = answers_of(encoded(tokenizer, "all"))
    assert len(pairs) == 2
    for pair, turn in zip(pairs, (2, 4), strict=True):
        assert pair.inputs.tokens.tolist() == encode_prompt(tokenizer, MESSAGES[:turn])
        assert pair.targets.tokens.tolist() == [*tokenizer.encode(MESSAGES[turn]["content"]), tokenizer.eos_id]
    [last] = answers_of(encoded(tokenizer, "last"))
    assert last.inputs.tokens.tolist() == pairs[1].inputs.tokens.tolist()
    assert last.targets.tokens.tolist() == pairs[1].targets.tokens.tolist()


def test_an_answer_without_anything_before_it_is_told() -> None:
    row = TokenRow(np.arange(4, dtype=np.int32), np.array([True, True, False, False]), "chats.jsonl, line 7")
    with pytest.raises(DataError, match=r"chats.jsonl, line 7: nothing stands before the answer"):
        answers_of(row)


def rows(count: int, seed: int) -> list[TokenRow]:
    draw, made = np.random.default_rng(seed), []
    for _ in range(count):
        length = int(draw.integers(4, 30))
        mask = np.zeros(length, bool)
        mask[int(draw.integers(1, length)) :] = True
        made.append(TokenRow(draw.integers(5, 99, length).astype(np.int32), mask))
    return made


@pytest.mark.parametrize("world", [1, 2, 4])
def test_batches_hold_each_pair_padded_to_the_longest_of_all_processes(world: int) -> None:
    pairs = answers_by_source({"a": rows(24, 1), "b": rows(24, 2)})
    order = RowOrder(PhasedMixture([Phase(0, {"a": 0.5, "b": 0.5})]), {"a": 24, "b": 24}, batch_rows=8, seed=0)
    parts = [
        SequencePairBatches(pairs, order, max_length=64, pad_id=0, rank=rank, world=world)(3) for rank in range(world)
    ]
    inputs, targets, tokens = (torch.cat([getattr(p, name) for p in parts]) for name in ("inputs", "targets", "tokens"))
    lengths, mask = torch.cat([part.input_lengths for part in parts]), torch.cat([part.loss_mask for part in parts])  # type: ignore[misc]
    source, number = order(3)
    expected = [pairs["ab"[i]][j] for i, j in zip(source.tolist(), number.tolist(), strict=True)]
    assert inputs.shape[1] == -(-max(len(pair.inputs.tokens) for pair in expected) // 8) * 8
    assert targets.shape[1] == -(-max(len(pair.targets.tokens) for pair in expected) // 8) * 8
    for row, pair in enumerate(expected):
        size = len(pair.targets.tokens)
        assert int(lengths[row]) == len(pair.inputs.tokens)
        assert inputs[row, : lengths[row]].tolist() == pair.inputs.tokens.tolist()
        assert not inputs[row, lengths[row] :].any()
        assert targets[row, :size].tolist() == pair.targets.tokens.tolist()
        assert tokens[row, : size + 1].tolist() == [0, *pair.targets.tokens.tolist()][: targets.shape[1]]
        assert mask[row].tolist() == [True] * size + [False] * (targets.shape[1] - size)
    assert torch.cat([part.source for part in parts]).tolist() == source.tolist()


def test_held_out_pairs_are_padded_to_one_width() -> None:
    [pair] = answers_of(rows(1, 3)[0])
    batch = collate_sequence_pairs([pair], [4], 0, 40)
    assert batch.inputs.shape == batch.targets.shape == (1, 40)
    assert batch.num_tokens() == 80
    assert batch.predicted().tolist() == pair.targets.tokens.tolist()
