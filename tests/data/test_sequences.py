import json
from itertools import pairwise

import numpy as np
import pytest

from llmtrain.config.schema import CorpusConfig, SourceConfig
from llmtrain.data import documents, preparation
from llmtrain.data.preparation import prepare_sources
from llmtrain.data.sequences import Blocks, PackedDocuments
from llmtrain.data.shards import TokenSource
from llmtrain.data.tokenizers import Tokenizer, train_tokenizer

TEXTS = [f"{i} " + "abc " * (i * 7 % 23) for i in range(90)]
LENGTH = 16


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 300)


@pytest.fixture(scope="module", params=[10, 10**6], ids=["many shards", "one shard"])
def source(
    request: pytest.FixtureRequest, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> TokenSource:
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "SHARD_TOKENS", request.param)
        patch.setattr(documents, "BATCH_CHARACTERS", request.param)
        data = CorpusConfig(sources={"a": SourceConfig(path=str(folder / "a.jsonl"))})
        return prepare_sources(data, tokenizer=tokenizer, cache_dir=folder, processes=1)["a"].train


def test_blocks_know_their_documents(source: TokenSource) -> None:
    ends = source.ends()
    number = np.searchsorted(ends, np.arange(len(source)), side="right")
    plain, masked = Blocks(source, LENGTH), Blocks(source, LENGTH, attend_across=False)
    assert len(plain) == len(masked) == len(source) // LENGTH
    for row in range(len(plain)):
        place = slice(row * LENGTH, (row + 1) * LENGTH)
        assert (plain[row].tokens == masked[row].tokens).all()
        assert plain[row].documents is None
        assert plain[row].mask.tolist() == [False] + [True] * (LENGTH - 1)
        assert (masked[row].documents == number[place] - number[place][0]).all()
        assert masked[row].mask.tolist() == [False, *(a == b for a, b in pairwise(number[place].tolist()))]


def test_packed_rows_hold_whole_documents_once(source: TokenSource, tokenizer: Tokenizer) -> None:
    ends = source.ends().tolist()
    expected = []
    for start, end in pairwise([0, *ends]):
        tokens = source.tokens(start, end).tolist()
        expected += [tokens[i : i + LENGTH] for i in range(0, len(tokens), LENGTH)]
    rows = PackedDocuments(source, LENGTH, tokenizer.pad_id, attend_across=False)
    found = []
    for number in range(len(rows)):
        row, spans = rows[number], rows.spans(number)
        assert row.documents is not None
        for document, (start, end) in enumerate(spans):
            tokens = row.tokens[row.documents == document]
            assert (tokens == source.tokens(start, end)).all()
            assert row.mask[row.documents == document].tolist() == [False] + [True] * (len(tokens) - 1)
            found.append(tokens.tolist())
        padding = row.documents > len(spans) - 1
        assert (row.tokens[padding] == tokenizer.pad_id).all()
        assert not row.mask[padding].any()
    assert sorted(found) == sorted(expected)
    across = PackedDocuments(source, LENGTH, tokenizer.pad_id)
    assert len(across) == len(rows)
    assert across[3].documents is None
    assert across[3].mask.sum() == sum(end - start for start, end in across.spans(3)) - 1
