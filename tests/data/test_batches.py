import json

import numpy as np
import pytest
import torch

from llmtrain.config.schema import CorpusConfig, SourceConfig
from llmtrain.data.batches import (
    ConversationBatches,
    PairBatches,
    PromptBatches,
    RowOrder,
    TokenBatches,
    held_out_text,
    share,
)
from llmtrain.data.encoding import PairRow, PromptRow, TokenRow
from llmtrain.data.mixture import Phase, PhasedMixture
from llmtrain.data.preparation import prepare_sources
from llmtrain.data.shards import TokenSource
from llmtrain.data.tokenizers import Tokenizer, train_tokenizer

LENGTH = 16


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([f"{i}" for i in range(100)], 300)


@pytest.fixture(scope="module")
def sources(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenSource]:
    folder = tmp_path_factory.mktemp("tokens")
    sources = {}
    for name, count in (("a", 200), ("b", 77)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(count)))
        sources[name] = SourceConfig(path=str(folder / f"{name}.jsonl"))
    prepared = prepare_sources(CorpusConfig(sources=sources), tokenizer=tokenizer, cache_dir=folder, processes=1)
    return {name: source.train for name, source in prepared.items()}


def mixed(weights: dict[str, float]) -> PhasedMixture:
    return PhasedMixture([Phase(0, weights)])


def order(weights: dict[str, float], sizes: dict[str, int], batch_rows: int, seed: int = 0) -> RowOrder:
    return RowOrder(mixed(weights), sizes, batch_rows, seed)


def batches(sources: dict[str, TokenSource], rank: int = 0, world: int = 1, seed: int = 1) -> TokenBatches:
    sizes = {name: source.num_blocks(LENGTH) for name, source in sources.items()}
    return TokenBatches(
        sources, order({"a": 0.75, "b": 0.25}, sizes, 8, seed), sequence_length=LENGTH, rank=rank, world=world
    )


def row(length: int, first: int = 0) -> TokenRow:
    return TokenRow(np.arange(first, first + length, dtype=np.int32), np.arange(length) >= length // 2)


def test_batches_are_a_function_of_the_step(sources: dict[str, TokenSource]) -> None:
    one, two = batches(sources), batches(sources)
    two(0), two(5)
    assert torch.equal(one(3).tokens, two(3).tokens)
    assert not torch.equal(one(3).tokens, one(4).tokens)
    assert not torch.equal(one(3).tokens, batches(sources, seed=2)(3).tokens)


def test_pretraining_rows_predict_all_but_their_first_token(sources: dict[str, TokenSource]) -> None:
    batch = batches(sources)(0)
    assert batch.tokens.shape == (8, LENGTH)
    assert batch.tokens.dtype == torch.int64
    assert batch.loss_mask[:, 1:].all()
    assert not batch.loss_mask[:, 0].any()


@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_global_batch_does_not_depend_on_the_processes(sources: dict[str, TokenSource], world: int) -> None:
    whole = batches(sources)(7)
    parts = [batches(sources, rank, world)(7) for rank in range(world)]
    assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
    assert torch.equal(torch.cat([part.source for part in parts]), whole.source)


def test_shares_cover_the_batch() -> None:
    rows = list(range(10))
    assert [rows[share(10, rank, 4)] for rank in range(4)] == [[0, 1], [2, 3, 4], [5, 6], [7, 8, 9]]


def test_counts_are_what_was_used(sources: dict[str, TokenSource]) -> None:
    source = batches(sources)
    used = torch.cat([source(step).source for step in range(9)])
    counts = source.counts(9)
    for number, name in enumerate("ab"):
        rows = int((used == number).sum())
        assert counts[f"data/{name}/tokens"] == rows * LENGTH
        assert counts[f"data/{name}/epochs"] == rows / sources[name].num_blocks(LENGTH)


def test_an_epoch_shows_every_block_once(sources: dict[str, TokenSource]) -> None:
    blocks = sources["b"].num_blocks(LENGTH)
    alone = TokenBatches(sources, order({"b": 1.0}, {"b": blocks}, 1), sequence_length=LENGTH)
    seen = [tuple(alone(step).tokens[0].tolist()) for step in range(2 * blocks)]
    everything = sorted(tuple(sources["b"].block(i, LENGTH).tolist()) for i in range(blocks))
    assert sorted(seen[:blocks]) == sorted(seen[blocks:]) == everything
    assert seen[:blocks] != seen[blocks:]


def test_conversations_are_padded_to_the_global_longest() -> None:
    rows = {"a": [row(length) for length in (3, 5, 9, 12)]}
    options = {"max_length": 100, "pad_id": 99, "world": 2}
    parts = [ConversationBatches(rows, order({"a": 1.0}, {"a": 4}, 4), rank=rank, **options)(0) for rank in range(2)]
    tokens, mask = (torch.cat([getattr(part, name) for part in parts]) for name in ("tokens", "loss_mask"))
    assert tokens.shape == mask.shape == (4, 16)
    assert sorted((tokens != 99).sum(1).tolist()) == [3, 5, 9, 12]
    assert not mask[tokens == 99].any()
    assert mask.sum() == sum(int(each.mask[1:].sum()) for each in rows["a"])


def test_rows_are_not_padded_beyond_the_models_length() -> None:
    batch = ConversationBatches({"a": [row(9)]}, order({"a": 1.0}, {"a": 1}, 1), max_length=10, pad_id=0)(0)
    assert batch.tokens.shape == (1, 10)


def test_pairs_share_one_width() -> None:
    rows = {"a": [PairRow(row(3), row(6)), PairRow(row(4), row(17))]}
    source = PairBatches(rows, order({"a": 1.0}, {"a": 2}, 2), max_length=64, pad_id=99)
    batch = source(0)
    assert batch.chosen.shape == batch.rejected.shape == batch.rejected_mask.shape == (2, 24)
    assert sorted((batch.chosen != 99).sum(1).tolist()) == [3, 4]
    assert int(batch.rejected_mask.sum()) == 3 + 9
    assert source.counts(3) == {"data/a/rows": 6, "data/a/epochs": 3.0}


def test_prompts_are_those_of_the_whole_batch() -> None:
    rows = {"a": [PromptRow([i], "", None) for i in range(6)]}
    source = PromptBatches(rows, order({"a": 1.0}, {"a": 6}, 3))
    assert sorted(ids[0] for step in range(2) for ids in source(step)) == list(range(6))
    assert source(0) != source(2)


def test_held_out_text_knows_its_bytes(sources: dict[str, TokenSource], tokenizer: Tokenizer) -> None:
    held_out = held_out_text(sources["b"], 1, tokenizer.token_bytes, max_blocks=5, batch_rows=2, length=LENGTH)
    assert [len(batch) for batch in held_out.batches] == [2, 2, 1]
    predicted = [batch.tokens[i, 1:].tolist() for batch in held_out.batches for i in range(len(batch))]
    assert held_out.num_bytes == sum(len(tokenizer.decode(ids).encode()) for ids in predicted)
    assert held_out.batches[0].source.tolist() == [1, 1]


@pytest.mark.parametrize("processes", [1, 2, 8, 64])
def test_far_batches_of_many_sources_are_the_same_for_all_processes(processes: int) -> None:
    weights = {f"source {i}": float(i + 1) for i in range(22)}
    sizes = {name: 10**6 + 37 * i for i, name in enumerate(weights)}
    order = RowOrder(mixed(weights), sizes, batch_rows=1024, seed=3)
    step = 10**12 // 1024
    whole = np.stack(order(step))
    parts = [whole[:, share(1024, rank, processes)] for rank in range(processes)]
    assert all(part.shape[1] == 1024 // processes for part in parts)
    assert (np.concatenate(parts, axis=1) == whole).all()
    assert (whole[1] < np.array(list(sizes.values()))[whole[0]]).all()
