import json
from pathlib import Path

import pytest

from llmtrain.config.errors import DataError
from llmtrain.config.schema import SourceConfig
from llmtrain.data.documents import read_documents
from llmtrain.data.records import Faults


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_training_and_validation_share_no_document(tmp_path: Path) -> None:
    source = SourceConfig(path=write(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(100)]))
    train = list(read_documents(source, 10, "train", tmp_path, Faults()))
    held_out = list(read_documents(source, 10, "validation", tmp_path, Faults()))
    assert (len(train), len(held_out)) == (90, 10)
    assert set(train) | set(held_out) == {str(i) for i in range(100)}


def test_a_single_document_gives_its_end(tmp_path: Path) -> None:
    text = "".join(f"line number {i}\n" for i in range(1000))
    source = SourceConfig(path=write(tmp_path / "a.jsonl", [{"text": text}]))
    [train] = read_documents(source, 50, "train", tmp_path, Faults())
    [held_out] = read_documents(source, 50, "validation", tmp_path, Faults())
    assert train + held_out == text
    assert train.endswith("\n")
    assert 0.01 < len(held_out) / len(text) < 0.03


def test_own_validation_files_column_and_limit(tmp_path: Path) -> None:
    source = SourceConfig(
        path=write(tmp_path / "a.jsonl", [{"body": f"a{i}"} for i in range(9)]), text_column="body", max_documents=4,
        validation_path=write(tmp_path / "b.jsonl", [{"body": "b"}]),
    )  # fmt: skip
    assert list(read_documents(source, 2, "train", tmp_path, Faults())) == ["a0", "a1", "a2", "a3"]
    assert list(read_documents(source, 2, "validation", tmp_path, Faults())) == ["b"]


def test_embedded_text_is_a_source() -> None:
    source = SourceConfig(path="embedded:arithmetic", max_documents=10)
    assert len(list(read_documents(source, 5, "train", Path(), Faults()))) == 8


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no documents in there"),
        ([{"text": ""}], "no documents in there"),
        ([{"body": "b", "url": "u"}], r"line 1: no column 'text'; there are: body, url"),
        ([{"text": "a"}, {"text": None}], "line 2: column 'text' holds None, not text"),
    ],
)
def test_faults_are_named(tmp_path: Path, rows: list[dict], message: str) -> None:
    source = SourceConfig(path=write(tmp_path / "a.jsonl", rows))
    with pytest.raises(DataError, match=message):
        list(read_documents(source, 50, "train", tmp_path, Faults()))
