"""Data from anybody: files that unpack without end are read in bounded memory, what is no data is named."""

import json
import pickle
import resource
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.security.hostile import Canary, bomb, refused
from tests.tiny import ENVIRONMENT

from llmtrain.data import records, tables
from llmtrain.data.json_arrays import array_items
from llmtrain.data.records import RowError, read_records
from llmtrain.data.token_files import open_token_file

GIB = 2**30


def read(path: Path) -> int:
    """How many records; the first that cannot be used is raised."""
    number = 0
    for _, record in read_records(str(path), split="train", name=None, cache_dir=path.parent / "cache"):
        if isinstance(record, RowError):
            raise record
        number += 1
    return number


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.arrow", "a.csv", "a.jsonl.gz", "a.zst"])
def test_pickles_are_no_data(name: str, tmp_path: Path) -> None:
    canary = Canary(tmp_path / "canary")
    (tmp_path / name).write_bytes(canary.pickled)
    with refused(name):
        read(tmp_path / name)
    assert not canary.path.exists()


@pytest.mark.parametrize("kind", ["objects", "an archive", "a pickle"])
def test_arrays_of_objects_are_not_opened(kind: str, tmp_path: Path) -> None:
    canary, path = Canary(tmp_path / "canary"), tmp_path / "a.npy"
    objects = np.array([canary], dtype=object)
    if kind == "objects":
        np.save(path, objects, allow_pickle=True)
    elif kind == "an archive":
        with path.open("wb") as file:
            np.savez(file, a=objects)
    else:
        path.write_bytes(canary.pickled)
    with refused("a.npy"):
        open_token_file(str(path), None, 0)
    assert not canary.path.exists()


@pytest.mark.parametrize(
    "shape", ["(1000000000000000000,)", "(100000000000000000000000000,)", "(-5,)", "(10**9,)", "(1, 1)", "'a'"]
)
def test_array_headers(shape: str, tmp_path: Path) -> None:
    header = f"{{'descr': '<u2', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + b"\0" * 100)
    with refused("a.npy"):
        open_token_file(str(tmp_path / "a.npy"), None, 0)


def test_an_index_of_more_sequences_than_there_are(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\0" * 100)
    (tmp_path / "a.idx").write_bytes(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, 2**60, 2**60))
    with refused("a.idx: 34 bytes where its header makes"):
        open_token_file(str(tmp_path / "a.bin"), None, 0)


GARBAGE: dict[str, bytes] = {
    "a.arrow": bytes(range(256)) * 20,
    "b.arrow": b"ARROW1\0\0" + struct.pack("<iI", -1, 2**31 - 1) + b"\0" * 100,
    "c.arrow.gz": b"\x1f\x8b\x08\0\0\0\0\0" + bytes(100),
    "a.parquet": b"PAR1" + bytes(range(256)) * 20 + struct.pack("<I", 2**31 - 1) + b"PAR1",
    "b.parquet": b"PAR1" + bytes(range(256)) * 20 + struct.pack("<I", 5000) + b"PAR1",
}


@pytest.mark.parametrize("name", GARBAGE)
def test_tables_that_are_none(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(GARBAGE[name])
    with refused(name):
        read(tmp_path / name)


@pytest.mark.parametrize("state", ["{", "[" * 100_000, '{"_data_files": [{"filename": "../../../../etc/passwd"}]}'])
def test_saved_data_sets_that_are_none(state: str, tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text(state)
    (tmp_path / "saved" / "dataset_info.json").write_text("{}")
    with refused("saved: cannot be read as a saved data set"):
        read(tmp_path / "saved")


NESTED = "[" * 10**6 + "]" * 10**6
MANY = "[" + "[]," * 2**22 + "0]"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.jsonl", f'{{"text": {NESTED}}}', "line 1: not valid JSON (maximum recursion depth"),
        ("a.json", f'[{{"text": {NESTED}}}]', "line 1: not valid JSON: maximum recursion depth"),
        ("a.jsonl", f'{{"text": {"9" * 10**6}}}', "line 1: not valid JSON (Exceeds the limit"),
        ("a.json", f'[\n{{"text": {"9" * 10**6}}}]', "line 2: not valid JSON: Exceeds the limit"),
        ("a.jsonl", f'{{"text": {MANY}}}', "line 1: not valid JSON (more than 4,194,304 objects and lists"),
        ("a.json", f'[{{"text": {MANY}}}]', "line 1: not valid JSON: more than 4,194,304 objects and lists"),
        ("a.json", '[{"text": "a"}', "line 1: not valid JSON: expected ','"),
        ("a.json", '[{"text": "a"}] [', "line 1: not valid JSON: something follows"),
        ("a.json", '[{"text": "a', "line 1: not valid JSON: Unterminated string"),
    ],
    ids=lambda text: text[:40],
)
def test_absurd_json(name: str, text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with refused(name, words):
        read(tmp_path / name)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_arrays_are_the_same_however_they_are_cut(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Any] = [{"text": 'é]},{ \\" \n' * number, "n": [number, {"a": None}]} for number in range(9)]
    rows += [12345, -1.5e300, "", [], {}, None, True]
    (tmp_path / "a.json").write_text("\ufeff \n" + json.dumps(rows, indent=1, ensure_ascii=False) + "\n \n")
    monkeypatch.setattr("llmtrain.data.json_arrays.READ_BYTES", size)
    with (tmp_path / "a.json").open("rb") as stream:
        assert list(array_items(stream, "a.json", 10_000)) == rows
    with (tmp_path / "a.json").open("rb") as stream, refused("line 3", "an item is longer than 3 characters"):
        list(array_items(stream, "a.json", 3))


def test_rows_of_a_table_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "BLOCK_BYTES", 700)
    monkeypatch.setattr(tables, "UNPACKED_BYTES", 10_000)
    bomb(tmp_path / "a.csv.gz", b"text\n", b"a text\n", 0, b"a text\n" * 20_000)  # 70,000 bytes at a time
    with refused("a.csv.gz: unpacks to 10,000 rows, or a single one, of more than 10,000 bytes"):
        read(tmp_path / "a.csv.gz")
    monkeypatch.setattr(tables, "UNPACKED_BYTES", 71_000)
    assert read(tmp_path / "a.csv.gz") == 20_000


# Bombs ------------------------------------------------------------------------------------------------------------

BOMBS = {
    "line.jsonl.gz": "line 1: longer than 67,108,864 bytes",
    "line.jsonl.zst": "line 1: longer than 67,108,864 bytes",
    "array.json.gz": "line 1: not valid JSON: an item is longer than 67,108,864 characters",
    "line.csv.zst": "unpacks to 10,000 rows, or a single one, of more than 1,073,741,824 bytes",
    "quote.csv.zst": "unpacks to 10,000 rows, or a single one, of more than 1,073,741,824 bytes",
    "table.parquet.zst": "unpacks to more than 1,073,741,824 bytes, and is read whole: unpack it first",
    "values.parquet": "",  # one text of a megabyte in 2,048 rows, held once in the file
}
LINE, TABLE = 3 * GIB // 8, 3 * GIB


@pytest.fixture(scope="module")
def bombs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import pyarrow as pa
    import pyarrow.parquet

    folder: Path = tmp_path_factory.mktemp("bombs")
    bomb(folder / "line.jsonl.gz", b'{"text": "', b"a", LINE)
    bomb(folder / "line.jsonl.zst", b'{"text": "', b"a", LINE)
    bomb(folder / "array.json.gz", b'[{"text": "', b"a", LINE)
    bomb(folder / "line.csv.zst", b"text\n", b"a", TABLE)
    bomb(folder / "quote.csv.zst", b'text\n"', b"a line\n", TABLE)
    bomb(folder / "table.parquet.zst", b"PAR1", b"a", TABLE)
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 2048, pa.int32()), pa.array(["a" * 2**20]))
    pyarrow.parquet.write_table(pa.table({"text": texts.dictionary_encode()}), folder / "values.parquet")
    return folder


@pytest.mark.slow
def test_bombs_are_read_in_bounded_memory(bombs: Path) -> None:
    """In one process that may have 2.5 GiB of data, for all of them one after the other."""
    code = "from tests.security.test_data import explode; import sys; explode(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(bombs)], env=ENVIRONMENT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    for name, words in BOMBS.items():
        assert words in said[name], said[name]
    assert sum(path.stat().st_size for path in bombs.iterdir() if path.suffix in (".gz", ".zst")) < 50e6
    assert said["values.parquet"] == "2048 rows"


def explode(folder: str) -> None:
    """Read each bomb; what came of it on standard output."""
    resource.setrlimit(resource.RLIMIT_DATA, (5 * GIB // 2,) * 2)
    said = {}
    for name in BOMBS:
        try:
            said[name] = f"{read(Path(folder) / name)} rows"
        except records.DataError as error:
            said[name] = str(error)
    print(json.dumps(said))


def test_the_canary_sings(tmp_path: Path) -> None:
    """What is held to be dangerous here is."""
    canary = Canary(tmp_path / "canary")
    pickle.loads(canary.pickled)
    assert canary.path.exists()
