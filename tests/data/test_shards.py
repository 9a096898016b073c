import json
import os
from pathlib import Path

import numpy as np
import pytest

from llmtrain.config.errors import DataError
from llmtrain.config.schema import SourceConfig
from llmtrain.data import shards
from llmtrain.data.shards import TokenSource, prepare_tokens
from llmtrain.data.tokenizers import Tokenizer, train_tokenizer

TEXTS = [f"document number {i} says something, {i * i} times.\n" * (1 + i % 5) for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 300)


@pytest.fixture
def source(tmp_path: Path) -> SourceConfig:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return SourceConfig(path=str(file))


def prepare(source: SourceConfig, tokenizer: Tokenizer, tmp_path: Path, split: shards.Split = "train") -> TokenSource:
    return prepare_tokens(source, tokenizer=tokenizer, split=split, validation_every=10, cache_dir=tmp_path / "cache")


def test_blocks_are_the_documents_and_their_ends(source: SourceConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokens = prepare(source, tokenizer, tmp_path)
    train = [text for i, text in enumerate(TEXTS) if (i + 1) % 10]
    expected = [token for text in train for token in [*tokenizer.encode(text), tokenizer.eos_id]]
    found = np.concatenate([tokens.block(i, 32) for i in range(tokens.num_blocks(32))])
    assert found.tolist() == expected[: len(expected) // 32 * 32]
    said = tokens.manifest
    assert (said.documents, said.tokens) == (54, len(expected))
    assert said.bytes == sum(len(text.encode()) for text in train)
    assert tokens.token_counts(tokenizer.vocab_size)[tokenizer.eos_id] == 54


def test_blocks_reach_over_shards(
    source: SourceConfig, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare(source, tokenizer, tmp_path)
    monkeypatch.setattr(shards, "SHARD_TOKENS", 50)
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", 100)
    cut = prepare_tokens(source, tokenizer=tokenizer, split="train", validation_every=10, cache_dir=tmp_path / "other")
    assert len(cut.manifest.shards) > 5
    assert cut.manifest.content == whole.manifest.content
    for i in range(whole.num_blocks(70)):
        assert (whole.block(i, 70) == cut.block(i, 70)).all()


def test_prepared_tokens_are_used_again(
    source: SourceConfig, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(source, tokenizer, tmp_path)
    monkeypatch.setattr(shards, "read_documents", lambda *_: pytest.fail("read again"))
    os.utime(source.path)  # touched, not changed
    assert prepare(source, tokenizer, tmp_path).folder == first.folder


def test_a_changed_file_is_noticed(source: SourceConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    first = prepare(source, tokenizer, tmp_path)
    with open(source.path, "a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    second = prepare(source, tokenizer, tmp_path)
    assert second.folder != first.folder
    assert second.manifest.documents == first.manifest.documents + 1


def test_splits_and_tokenizers_are_kept_apart(source: SourceConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    held_out = prepare(source, tokenizer, tmp_path, "validation")
    assert held_out.manifest.documents == 6
    other = prepare(source, train_tokenizer(TEXTS, 280), tmp_path)
    assert len({held_out.folder, other.folder, prepare(source, tokenizer, tmp_path).folder}) == 3


def test_nothing_is_left_of_a_source_that_cannot_be_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "good"}\n{"text": 3}\n')
    with pytest.raises(DataError, match="line 2"):
        prepare(SourceConfig(path=str(file)), tokenizer, tmp_path)
    assert not list((tmp_path / "cache").glob("tokens-*"))


def test_a_damaged_folder_is_refused(source: SourceConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokens = prepare(source, tokenizer, tmp_path)
    manifest = tokens.folder / "manifest.json"
    said = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**said, "tokens": said["tokens"] + 1}))
    with pytest.raises(DataError, match="do not agree"):
        prepare(source, tokenizer, tmp_path)
