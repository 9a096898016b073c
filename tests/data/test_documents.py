import json
import time
from pathlib import Path

import pytest

from llmtrain.config.errors import DataError
from llmtrain.config.schema import SourceConfig
from llmtrain.data import documents, pieces
from llmtrain.data.documents import assign_splits, find_portions, read_documents, read_portion
from llmtrain.data.records import Faults, read_records


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def split(source: SourceConfig, every: int, cache: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"train": [], "validation": []}
    for portion in find_portions(source, cache):
        before = 0
        for batch in read_portion(portion, source, cache):
            for document in assign_splits(portion, batch, before, every):
                found[document.split].append(document.text)
            before += len(batch.documents)
    return found


def test_training_and_validation_share_no_document(tmp_path: Path) -> None:
    source = SourceConfig(path=write(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(100)]))
    found = split(source, 10, tmp_path)
    assert found["validation"] == [str(i) for i in range(9, 100, 10)]
    assert sorted(found["train"] + found["validation"]) == sorted(str(i) for i in range(100))
    assert list(read_documents(source, 10, tmp_path, Faults())) == found["train"]


def test_a_single_document_gives_its_end(tmp_path: Path) -> None:
    text = "".join(f"line number {i}\n" for i in range(1000))
    source = SourceConfig(path=write(tmp_path / "a.jsonl", [{"text": text}]))
    found = split(source, 50, tmp_path)
    [train], [held_out] = found["train"], found["validation"]
    assert train + held_out == text
    assert train.endswith("\n")
    assert 0.01 < len(held_out) / len(text) < 0.03


def test_own_validation_files_column_and_limit(tmp_path: Path) -> None:
    source = SourceConfig(
        path=write(tmp_path / "a.jsonl", [{"body": f"a{i}"} for i in range(9)]), text_column="body", max_documents=4,
        validation_path=write(tmp_path / "b.jsonl", [{"body": "b"}]),
    )  # fmt: skip
    assert split(source, 2, tmp_path) == {"train": ["a0", "a1", "a2", "a3"], "validation": ["b"]}


def test_embedded_text_is_a_source() -> None:
    source = SourceConfig(path="embedded:arithmetic", max_documents=10)
    assert len(list(read_documents(source, 5, Path(), Faults()))) == 8


def test_pieces_of_a_file_hold_every_line_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": f"{i} " + "x" * (i * 37 % 101)} for i in range(200)]
    path = write(tmp_path / "a.jsonl", rows)
    for size in (1, 7, 100, 999, 10**6):
        monkeypatch.setattr(pieces, "PIECE_BYTES", size)
        placed = list(read_records(path, split="train", name=None, cache_dir=tmp_path))
        assert [record for _, record in placed] == rows
        assert [str(place) for place, _ in placed[::19]] == [f"{path}, line {i + 1}" for i in range(200)[::19]]


def test_batches_end_at_the_same_rows_from_wherever_reading_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "BATCH_CHARACTERS", 60)
    rows = [{"text": "x" * (i * 7 % 31)} if i % 5 else {"text": i} for i in range(100)]
    source = SourceConfig(path=write(tmp_path / "a.jsonl", rows))
    [portion] = find_portions(source, tmp_path)
    batches = list(read_portion(portion, source, tmp_path))
    assert sum(batch.rows for batch in batches) == 100
    first = sum(batch.rows for batch in batches[:4])
    again = list(read_portion(portion, source, tmp_path, first_row=first))
    assert [(batch.rows, batch.documents) for batch in again] == [(b.rows, b.documents) for b in batches[4:]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"body": "b", "url": "u"}], r"line 1: no column 'text'; there are: body, url"),
        ([{"text": "a"}, {"text": None}], "line 2: column 'text' holds None, not text"),
    ],
)
def test_faults_are_named(tmp_path: Path, rows: list[dict], message: str) -> None:
    source = SourceConfig(path=write(tmp_path / "a.jsonl", rows))
    with pytest.raises(DataError, match=message):
        list(read_documents(source, 50, tmp_path, Faults()))


def test_many_small_files_are_quickly_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = [pieces.Piece(str(number), "lines", 10) for number in range(20_000)]
    monkeypatch.setattr(documents, "find_pieces", lambda *_, **__: many)
    start = time.monotonic()
    [portion] = find_portions(SourceConfig(path="many", max_documents=9), tmp_path)
    assert portion.size == 200_000
    assert time.monotonic() - start < 3
