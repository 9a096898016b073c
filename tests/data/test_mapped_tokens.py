import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.data.token_bytes import write_flat, write_indexed, write_npy

from llmtrain.config.errors import DataError
from llmtrain.config.schema import CleaningConfig, CorpusConfig, SourceConfig
from llmtrain.data import mapped_tokens, token_files
from llmtrain.data.preparation import prepare_sources
from llmtrain.data.sequences import text_rows
from llmtrain.data.shards import PreparedSource
from llmtrain.data.tokenizers import Tokenizer, train_tokenizer

TEXTS = [f"document number {i} says something, {i * i} times.\n" * (1 + i % 3) for i in range(24)]
LENGTH = 16


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 300)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (token_files, mapped_tokens):
        monkeypatch.setattr(module, "CHUNK", 50)


def encoded(tokenizer: Tokenizer, texts: list[str] = TEXTS) -> list[list[int]]:
    return [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]


def opened(path: str, tokenizer: Tokenizer, cache: Path, **options: object) -> PreparedSource:
    corpus = {name: options.pop(name) for name in list(options) if name in CorpusConfig.__dataclass_fields__}
    data = CorpusConfig(sources={"a": SourceConfig(path=path, **options)}, **corpus)
    return prepare_sources(data, tokenizer=tokenizer, cache_dir=cache, processes=1)["a"]


def write_folder(folder: Path, documents: list[list[int]], kind: str) -> str:
    """The documents in three files of one kind."""
    folder.mkdir(parents=True)
    for number in range(3):
        some = documents[number * 8 : number * 8 + 8]
        if kind == "indexed":
            write_indexed(folder / str(number), [[each] for each in some])
        elif kind == "npy":
            write_npy(folder / f"{number}.npy", some, "int32")
        else:
            write_flat(folder / f"{number}.bin", some, magic=20240520 if kind == "header" else None)
    return str(folder)


KINDS = pytest.mark.parametrize("kind", ["flat", "header", "npy", "indexed"])


@KINDS
@pytest.mark.parametrize("sequences", ["blocks", "documents"])
def test_rows_are_those_of_the_same_text_prepared_here(
    kind: str, sequences: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    for name, texts in (("train", TEXTS), ("held_out", TEXTS[:5])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        write_folder(tmp_path / name, encoded(tokenizer, texts) + [[tokenizer.eos_id]] * (24 - len(texts)), kind)
    config = {"sequences": sequences, "attend_across_documents": False}
    held_out = str(tmp_path / "held_out.jsonl")
    ours = opened(str(tmp_path / "train.jsonl"), tokenizer, tmp_path, validation_path=held_out, **config).train
    held_out = str(tmp_path / "held_out")
    theirs = opened(str(tmp_path / "train"), tokenizer, tmp_path, validation_path=held_out, **config).train
    assert len(theirs) == len(ours)
    assert theirs.ends().tolist() == ours.ends().tolist()
    assert theirs.token_counts(300).tolist() == ours.token_counts(300).tolist()
    data = CorpusConfig(sources={}, **config)  # type: ignore[arg-type]
    rows, expected = (text_rows(each, data, LENGTH, tokenizer.pad_id) for each in (theirs, ours))
    assert len(rows) == len(expected)
    for number in range(len(rows)):
        for found, right in zip(rows[number], expected[number], strict=True):
            assert np.array_equal(found, right)  # type: ignore[arg-type]


@KINDS
def test_documents_have_numbers_and_places(kind: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    documents = encoded(tokenizer)
    path = write_folder(tmp_path / "data", documents, kind)
    suffix = "npy" if kind == "npy" else "bin"
    train, held_out = opened(path, tokenizer, tmp_path, validation_every=10)
    number = 0
    for split in (train, held_out):
        ends = split.ends().tolist()
        assert ends[-1] == len(split)
        assert split.documents(0, len(split)) == [
            each for start, end in zip([0, *ends], ends, strict=False) for each in split.documents(start, end)
        ]
        for count, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            [(document, place)] = split.documents(start, end)
            assert document == count
            assert str(place) == f"{path}/{number // 8}.{suffix}, document {number % 8 + 1}"
            assert split.tokens(start, end).tolist() == documents[number]
            number += 1
        assert [each for each, _ in split.documents(ends[0] - 1, ends[0] + 1)] == [0, 1][: len(ends)]
    assert number == 24


@KINDS
def test_the_end_is_held_out(kind: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    documents = encoded(tokenizer)
    path = write_folder(tmp_path / "data", documents, kind)
    train, held_out = opened(path, tokenizer, tmp_path, validation_every=4)
    whole = [token for document in documents for token in document]
    assert [*train.tokens(0, len(train)), *held_out.tokens(0, len(held_out))] == whole
    assert train.tokens(0, len(train))[-1] == tokenizer.eos_id
    if kind == "indexed":
        assert (train.summary.documents, held_out.summary.documents) == (18, 6)
    else:
        assert len(whole) // 8 <= len(held_out) <= len(whole) // 4
        assert train.summary.documents is None
    assert sum(held_out.token_counts(300)) == len(held_out)


def test_a_few_documents_give_the_end_of_the_last(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_indexed(tmp_path / "a", [[[1] * 50], [[2] * 50]])
    train, held_out = opened(path, tokenizer, tmp_path, validation_every=10)
    assert (train.ends().tolist(), held_out.ends().tolist()) == ([50, 90], [10])
    assert [number for number, _ in held_out.documents(0, 10)] == [0]
    with pytest.raises(DataError, match="3 tokens are too few"):
        opened(write_flat(tmp_path / "b.bin", [[1, 2, 3]]), tokenizer, tmp_path)


def test_nothing_is_written_and_a_changed_file_is_another_source(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_flat(tmp_path / "a.bin", encoded(tokenizer))
    first = opened(path, tokenizer, tmp_path / "cache").train
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["file-digests.json"]
    assert opened(path, tokenizer, tmp_path / "cache").train.summary == first.summary
    assert (
        opened(path, tokenizer, tmp_path / "cache", validation_every=3).train.summary.content != first.summary.content
    )
    write_flat(tmp_path / "a.bin", encoded(tokenizer, TEXTS[::-1]))
    changed = opened(path, tokenizer, tmp_path / "cache").train
    assert (len(changed), changed.summary.content == first.summary.content) == (len(first), False)


@pytest.mark.parametrize(
    ("write", "wrong"),
    [
        (lambda path, tokens: write_flat(path / "a.bin", [tokens]), 300),
        (lambda path, tokens: write_npy(path / "a.npy", [tokens], "int64"), -1),
        (lambda path, tokens: write_indexed(path / "a", [[tokens]]), 65535),
    ],
)
def test_a_token_that_the_tokenizer_lacks_is_told_where_it_is_read(
    write: Callable[[Path, list[int]], str], wrong: int, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokens = [1, 2] * 5000
    tokens[7000] = wrong
    path = write(tmp_path, tokens)
    train = opened(path, tokenizer, tmp_path).train
    assert train.tokens(0, 7000).tolist() == tokens[:7000]
    with pytest.raises(DataError) as caught:
        train.block(7000 // LENGTH, LENGTH)
    said = (
        f"{path}: token 7,000 (the first is 0) is {wrong}, but the tokenizer has only 0 to {tokenizer.vocab_size - 1}"
    )
    assert str(caught.value).startswith(said)
    tokens[3] = wrong
    write(tmp_path, tokens)
    with pytest.raises(DataError, match=r"token 3 \(the first is 0\)"):
        opened(path, tokenizer, tmp_path)


def test_a_large_source_is_counted_by_chunks(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped_tokens, "COUNTED_CHUNKS", 4)
    path = write_flat(tmp_path / "a.bin", [np.arange(1000) // 50 + 1])
    counts = opened(path, tokenizer, tmp_path).train.token_counts(300)
    assert np.flatnonzero(counts).tolist() == [1, 6, 11, 16]
    assert counts.sum() == 200


def test_files_without_documents_and_cleaning_are_told(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_flat(tmp_path / "a.bin", [[1, 2] * 50])
    with caplog.at_level(logging.WARNING, "llmtrain"):
        opened(path, tokenizer, tmp_path)
        assert not caplog.text
        opened(path, tokenizer, tmp_path, sequences="documents", cleaning=CleaningConfig(min_characters=5))
    assert f"{path}: no end token ({tokenizer.eos_id}) in its first 50 tokens" in caplog.text
    assert "data.sources.a: data.cleaning leaves token files as they are" in caplog.text
