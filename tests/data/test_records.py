import bz2
import gzip
import importlib
import json
import lzma
from pathlib import Path

import pytest

from llmtrain.config.errors import DataError
from llmtrain.data import records
from llmtrain.data.files import find_files
from llmtrain.data.records import Faults, Record, RowError, hold_out, read_records

ROWS = [{"text": f"text {i}", "meta": {"n": i} if i % 2 else "of another type"} for i in range(5)]
JSONL = "\n".join(json.dumps(row) for row in ROWS) + "\n"


def zstandard(data: bytes) -> bytes:
    return importlib.import_module("pyarrow").compress(data, codec="zstd", asbytes=True)


PACKED = {
    "a.jsonl.gz": gzip.compress, "a.jsonl.xz": lzma.compress, "a.jsonl.zst": zstandard, "a.jsonl.bz2": bz2.compress,
}  # fmt: skip


def read(path: Path, cache: Path, split: str = "train") -> list[dict]:
    return [usable(record) for _, record in read_records(str(path), split=split, name=None, cache_dir=cache)]


def usable(record: Record | RowError) -> Record:
    if isinstance(record, RowError):
        raise record
    return record


@pytest.mark.parametrize(("name", "pack"), [("a.ndjson", bytes), *PACKED.items()])
def test_json_lines(tmp_path: Path, name: str, pack) -> None:
    (tmp_path / name).write_bytes(pack(JSONL.encode()))
    assert read(tmp_path / name, tmp_path) == ROWS


def test_json_arrays_and_text(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "b.txt").write_text("one\ntwo\n")
    assert read(tmp_path, tmp_path) == [*ROWS, {"text": "one\ntwo\n"}]


def test_tables_go_through_the_datasets_library(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table({"text": ["a", "b"], "n": [1, 2]}), tmp_path / "a.parquet")
    (tmp_path / "b.csv").write_text('text,n\n"c, d",3\n')
    found = read(tmp_path, tmp_path / "cache")
    assert found == [{"text": "a", "n": 1}, {"text": "b", "n": 2}, {"text": "c, d", "n": 3}]


def test_folders_with_splits(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": split}))
    assert read(tmp_path, tmp_path) == [{"text": "train"}]
    assert read(tmp_path, tmp_path, "validation") == [{"text": "validation"}]
    with pytest.raises(DataError, match=r"no files for the split 'test'.*train, validation"):
        find_files(str(tmp_path), "test")


def test_globs_are_sorted(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.log"):
        (tmp_path / name).write_text(name)
    assert [Path(file).name for file in find_files(str(tmp_path / "*.txt"))] == ["a.txt", "b.txt"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", JSONL + "\n{broken", r"a\.jsonl, line 7: not valid JSON.*broken"),
        ("a.jsonl", JSONL + "[1, 2]", r"a\.jsonl, line 6: expected an object"),
        ("a.json", '[{"text": "a"},\n}]', r"a\.json, line 2: not valid JSON"),
        ("a.dat", "x", r"a\.dat: cannot tell what this is"),
    ],
)
def test_faults_are_named_by_their_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name, tmp_path)


def test_broken_bytes_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        read(tmp_path / "a.jsonl", tmp_path)
    for name, pack in PACKED.items():
        packed = pack(JSONL.encode() * 1000)
        (tmp_path / name).write_bytes(packed[: len(packed) // 2])
        with pytest.raises(DataError, match=rf"{name}: broken or cut off"):
            read(tmp_path / name, tmp_path)
    (tmp_path / "c.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"c\.parquet: cannot be read as parquet"):
        read(tmp_path / "c.parquet", tmp_path)


@pytest.mark.parametrize("name", ["missing.jsonl", "*.jsonl", "folder/", "some/where/deep.jsonl"])
def test_missing_files_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"no such file or folder|no file matches"):
        read(tmp_path / name, tmp_path)


def test_a_hub_name_without_network_says_what_it_was_taken_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"no/such: no file or folder here, nor a data set"):
        list(read_records("no/such", split="train", name=None, cache_dir=tmp_path))


def divide(item: int, number: int) -> tuple[int, int]:
    return item * 10, item * 100


def test_every_nth_item_is_held_out() -> None:
    items = range(1, 12)
    assert list(hold_out(items, 5, "validation", divide)) == [5, 10]
    assert list(hold_out(items, 5, "train", divide)) == [1, 2, 3, 4, 6, 7, 8, 9, 11]


def test_the_last_of_too_few_items_is_divided() -> None:
    assert list(hold_out([1, 2, 3], 5, "train", divide)) == [1, 2, 30]
    assert list(hold_out([1, 2, 3], 5, "validation", divide)) == [300]


def test_every_row_is_used_or_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "LINE_BYTES", 1000)
    lines = [
        b'{"text": "ok"}', b"{", b'"text"', b"\xff\xfe", b'{"text": "' + b"x" * 2000 + b'"}', b'{"n": 1}',
        b'{"text": "\\ud800"}', b'{"text": "\\ud83d\\ude00"}', b"[" * 900, b"", b"\x00", b'{"text": "last"}',
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    faults, used = Faults("skip"), []
    for _, record in read_records(str(tmp_path / "a.jsonl"), split="train", name=None, cache_dir=tmp_path):
        if isinstance(record, RowError):
            faults.add(record)
        else:
            used.append(record.get("text"))
    assert used == ["ok", None, "\U0001f600", "last"]
    assert faults.counts == {
        "not valid JSON": 3, "not an object with columns": 1, "not UTF-8": 1, "line too long": 1, "half characters": 1,
    }  # fmt: skip
    assert "a.jsonl, line 5: longer than 1,000 bytes" in faults.report()


def test_several_frames_of_one_file(tmp_path: Path) -> None:
    for name, pack in PACKED.items():
        (tmp_path / name).write_bytes(pack(JSONL.encode()) + pack(JSONL.encode()))
        assert read(tmp_path / name, tmp_path) == [*ROWS, *ROWS]
