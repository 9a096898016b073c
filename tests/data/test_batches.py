import json

import numpy as np
import pytest
import torch

from llmtrain.config.schema import CorpusConfig, SourceConfig
from llmtrain.data.batches import (
    ConversationBatches,
    LengthWarmup,
    PackedBatches,
    PairBatches,
    PromptBatches,
    RowOrder,
    TokenBatches,
    collate_packed,
    cut_rows,
    held_out_text,
    share,
)
from llmtrain.data.encoding import PairRow, PromptRow, RankingRow, TokenRow
from llmtrain.data.mixture import Phase, PhasedMixture
from llmtrain.data.packing import PackedConversations
from llmtrain.data.preparation import prepare_sources
from llmtrain.data.rankings import RankingBatches
from llmtrain.data.sequences import Blocks
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
    rows = {name: Blocks(source, LENGTH) for name, source in sources.items()}
    return TokenBatches(
        rows, order({"a": 0.75, "b": 0.25}, sizes, 8, seed), sequence_length=LENGTH, rank=rank, world=world
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
    alone = TokenBatches(
        {"b": Blocks(sources["b"], LENGTH)}, order({"b": 1.0}, {"b": blocks}, 1), sequence_length=LENGTH
    )
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


def test_rankings_share_one_width_and_know_what_is_better() -> None:
    rows = {
        "a": [
            RankingRow((row(3), row(6)), ((0, 1),), (None,)),
            RankingRow((row(4), row(17), row(5)), ((1, 0), (1, 2)), (0.5, 2.0)),
        ]
    }
    options = {"max_length": 64, "pad_id": 99}
    source = RankingBatches(rows, order({"a": 1.0}, {"a": 2}, 2), **options)
    batch = source(0)
    two, three = (int((batch.mask.any(2).sum(1) == count).nonzero()) for count in (2, 3))
    assert batch.tokens.shape == batch.mask.shape == (2, 3, 24)
    assert (batch.tokens != 99).sum(2)[[two, three]].tolist() == [[3, 6, 0], [4, 17, 5]]
    assert batch.better[[two, three]].nonzero().tolist() == [[0, 0, 1], [1, 1, 0], [1, 1, 2]]
    assert batch.margins[three].tolist() == [[0, 0, 0], [0.5, 0, 2.0], [0, 0, 0]]
    assert batch.num_tokens() == 5 * 24
    assert source.counts(3) == {"data/a/rows": 6, "data/a/epochs": 3.0}
    parts = [RankingBatches(rows, order({"a": 1.0}, {"a": 2}, 2), rank=rank, world=2, **options)(0) for rank in (0, 1)]
    assert [part.tokens.shape[2] for part in parts] == [24, 24]
    assert sorted(part.tokens.shape[1] for part in parts) == [2, 3]


def test_prompts_are_those_of_the_whole_batch() -> None:
    rows = {"a": [PromptRow([i], "", None) for i in range(6)]}
    source = PromptBatches(rows, order({"a": 1.0}, {"a": 6}, 3))
    assert sorted(row.tokens[0] for step in range(2) for row in source(step)) == list(range(6))
    assert source(0) != source(2)


def test_replaced_prompts_have_an_order_of_their_own() -> None:
    rows = {"a": [PromptRow([i], "", None) for i in range(60)]}
    mixture = order({"a": 1.0}, {"a": 60}, 20)
    other = RowOrder(mixture.mixture, {"a": 60}, 20, seed=77)
    source = PromptBatches(rows, mixture, [other])
    assert source(0, 1) != source(0)
    assert source(0, 1) == PromptBatches(rows, other)(0)
    assert sorted(row.tokens[0] for step in range(3) for row in source(step, 1)) == list(range(60))


def test_held_out_text_is_the_first_rows(sources: dict[str, TokenSource]) -> None:
    rows = Blocks(sources["b"], LENGTH)
    held_out = held_out_text(rows, 1, max_rows=5, batch_rows=2)
    assert [len(batch) for batch in held_out] == [2, 2, 1]
    assert torch.cat([batch.tokens for batch in held_out]).tolist() == [rows[row].tokens.tolist() for row in range(5)]
    assert held_out[0].source.tolist() == [1, 1]
    assert held_out[0].predicted().tolist() == held_out[0].tokens[:, 1:].flatten().tolist()


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


def documents(lengths: list[int]) -> list[TokenRow]:
    return [row(length, first=10 * number) for number, length in enumerate(lengths)]


def test_packed_rows_keep_documents_apart() -> None:
    batch = collate_packed([documents([3, 2]), documents([4])], [1, 0], pad_id=99, width=7)
    assert batch.tokens.tolist() == [[0, 1, 2, 10, 11, 99, 99], [0, 1, 2, 3, 99, 99, 99]]
    assert batch.documents is not None
    assert batch.documents.dtype == torch.int32
    assert batch.documents.tolist() == [[0, 0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 1, 1, 1]]
    assert batch.loss_mask.int().tolist() == [[0, 1, 1, 0, 1, 0, 0], [0, 0, 1, 1, 0, 0, 0]]
    assert batch.source.tolist() == [1, 0]
    assert batch.num_tokens() == 14
    assert batch[1:].documents.tolist() == [[0, 0, 0, 0, 1, 1, 1]]


def test_packed_rows_may_attend_across_documents() -> None:
    learned = [TokenRow(each.tokens, np.ones(len(each.tokens), dtype=np.bool_)) for each in documents([3, 2])]
    batch = collate_packed([learned], [0], pad_id=99, width=6, attend_across=True)
    assert batch.documents is None
    assert batch.loss_mask.int().tolist() == [[0, 1, 1, 1, 1, 0]]
    assert learned[0].mask.all()  # the rows themselves are left alone


@pytest.mark.parametrize("world", [1, 2, 4])
def test_packed_batches_are_a_function_of_the_step(world: int) -> None:
    rows = {"a": PackedConversations(documents([5, 3, 7, 2, 2, 6, 1]), 8), "b": PackedConversations(documents([4]), 8)}
    drawn = order({"a": 0.5, "b": 0.5}, {name: len(each) for name, each in rows.items()}, 4, seed=3)
    parts = [PackedBatches(rows, drawn, length=8, pad_id=99, rank=rank, world=world) for rank in range(world)]
    whole = PackedBatches(rows, drawn, length=8, pad_id=99)
    whole(2)
    for name in ("tokens", "loss_mask", "documents", "source"):
        assert torch.equal(torch.cat([getattr(part(5), name) for part in parts]), getattr(whole(5), name))
    assert whole(5).tokens.shape == (4, 8)
    assert whole.counts(2) == {"data/a/rows": 4, "data/b/rows": 4, "data/a/epochs": 4 / 4, "data/b/epochs": 4.0}


def test_length_warmup_cuts_the_same_tokens(sources: dict[str, TokenSource]) -> None:
    plain = batches(sources)
    warmed = LengthWarmup(plain, plain.counts, start_length=2, sequence_length=LENGTH, steps=9)
    lengths = [warmed(step).tokens.shape[1] for step in range(11)]
    assert lengths == [2, 2, 2, 4, 4, 4, 8, 8, 8, 16, 16]
    for step in (0, 4, 8, 10):
        short, full = warmed(step), plain(step)
        assert torch.equal(short.tokens.flatten(), full.tokens.flatten())
        assert short.num_tokens() == full.num_tokens()
        assert not short.loss_mask[:, 0].any()
        assert short.loss_mask[:, 1:].all()
        assert torch.equal(short.source, full.source.repeat_interleave(LENGTH // lengths[step]))
        sizes = [part.num_tokens() for part in short.micro_batches(3)]
        assert sizes == [part.num_tokens() for part in full.micro_batches(3)]
    assert warmed.counts(3) == plain.counts(3)


def test_cutting_rows_keeps_their_documents() -> None:
    batch = collate_packed([documents([3, 4])], [0], pad_id=99, width=8)
    short = cut_rows(batch, 4)
    assert short.documents.tolist() == [[0, 0, 0, 1], [1, 1, 1, 2]]
    assert cut_rows(batch, 8) is batch
