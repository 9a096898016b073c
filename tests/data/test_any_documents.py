"""Whatever is in the files, and in whatever units it is read: each text comes back as it is, each row is counted."""

import contextlib
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from llmtrain.config.errors import DataError
from llmtrain.config.schema import CorpusConfig, SourceConfig
from llmtrain.data import documents, pieces, preparation, records
from llmtrain.data.preparation import prepare_sources
from llmtrain.data.records import RowError, read_records
from llmtrain.data.shards import PreparedSource, TokenSource
from llmtrain.data.tokenizers import Tokenizer, train_tokenizer

MANY = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
NOTHING = r"no documents in there"

TEXT = st.text(max_size=12) | st.sampled_from(
    ["", " ", "\x00", "\r\n", "a\u2028b", "<|end|>", "ab " * 30, "é" * 40, "😀"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
ROW = st.fixed_dictionaries({"text": TEXT}, optional={"other": JSON})
LINE = ROW.flatmap(lambda row: st.sampled_from([json.dumps(row), json.dumps(row, ensure_ascii=False)])).map(str.encode)
ODD = st.one_of(
    st.binary(max_size=20), JSON.map(json.dumps).map(str.encode),
    st.fixed_dictionaries({"text": JSON}).map(json.dumps).map(str.encode),
    st.sampled_from([
        b"", b"  ", b"\xef\xbb\xbf", b'{"text": "\xff"}', b'{"text": "\\ud800"}', b'{"text": "' + b"x" * 200, b"\r",
        b"\x00", b"[" * 3000, b'{"text": ' + b"9" * 5000 + b"}", b'{"text": "a", "text": "b"}',
        b'\xef\xbb\xbf{"text": "a"}',
    ]),
)  # fmt: skip
FILE = st.lists(LINE | LINE | ODD, max_size=8).map(b"\n".join)
UNITS = st.fixed_dictionaries({
    "PIECE_BYTES": st.integers(1, 80), "PORTION_BYTES": st.integers(1, 200), "BATCH_CHARACTERS": st.integers(4, 90),
    "SHARD_TOKENS": st.integers(4, 90), "LONG_DOCUMENT": st.integers(2, 40),
})  # fmt: skip
OWNERS = {
    "PIECE_BYTES": pieces, "PORTION_BYTES": documents, "BATCH_CHARACTERS": documents, "SHARD_TOKENS": preparation,
    "LONG_DOCUMENT": preparation, "LINE_BYTES": records, "TEXT_BYTES": records,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["some text"], 270)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A new folder for each file: what is prepared is used again for the same content."""
    root = tmp_path_factory.mktemp("any")
    return (root / str(number) for number in itertools.count())


@contextlib.contextmanager
def units(**sizes: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, size in sizes.items():
            patch.setattr(OWNERS[name], name, size)
        yield


def check(error: DataError, pattern: str) -> None:
    assert re.search(pattern, str(error))


def write(folder: Path, name: str, content: bytes) -> str:
    folder.mkdir()
    (folder / name).write_bytes(content)
    return str(folder / name)


def prepare(path: str, tokenizer: Tokenizer, **options: Any) -> PreparedSource:
    """Once as training and once as held-out text, so that no document is cut in two."""
    data = CorpusConfig(sources={"a": SourceConfig(path=path, validation_path=path)}, **options)
    return prepare_sources(data, tokenizer=tokenizer, cache_dir=Path(path).parent / "cache", processes=1)["a"]


def texts(source: TokenSource, tokenizer: Tokenizer) -> list[str]:
    ends = source.ends().tolist()
    for start, end in itertools.pairwise([0, *ends]):
        assert source.tokens(end - 1, end).tolist() == [tokenizer.eos_id]
        assert len(source.documents(start, end)) == 1
        assert source.ends_within(start, end + 1).tolist() == [end]
    return [tokenizer.decode(source.tokens(a, b - 1).tolist()) for a, b in itertools.pairwise([0, *ends])]


def good_texts(content: bytes, line_bytes: int) -> tuple[list[str], int]:
    """What the lines hold, told by the `json` module alone: texts, and how many lines are neither text nor blank."""
    found, rows = [], 0
    for line in content.split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError, TypeError, KeyError, AttributeError):
            rows += bool(line.strip()) or len(line) > line_bytes
            if len(line) < line_bytes:
                record = json.loads(line.decode("utf-8-sig"))
                json.dumps(record, ensure_ascii=False).encode()
                found += [record["text"]] if isinstance(record["text"], str) and record["text"] else []
    return found, rows


@MANY
@given(content=FILE, sizes=UNITS, line_bytes=st.integers(20, 10_000))
def test_rows_are_documents_or_faults_or_left_out(
    content: bytes, sizes: dict[str, int], line_bytes: int, folders: Iterator[Path], tokenizer: Tokenizer
) -> None:
    path = write(next(folders), "a.jsonl", content)
    expected, rows = good_texts(content, line_bytes)
    with units(LINE_BYTES=line_bytes, **sizes):
        try:
            found = prepare(path, tokenizer, on_error="skip")
        except DataError as error:
            check(error, NOTHING)
            assert not expected
            return
    manifest = found.train.manifest
    assert texts(found.train, tokenizer) == texts(found.validation, tokenizer) == expected
    faults = sum(count for count, _ in manifest.faults.values())
    assert manifest.rows == 2 * len(expected) + faults + manifest.left_out == 2 * rows
    places = [str(place) for _, place in found.train.documents(0, len(found.train))]
    for place, text in zip(places, expected, strict=True):
        line = content.split(b"\n")[int(place.removeprefix(f"{path}, line ")) - 1]
        assert json.loads(line.decode("utf-8-sig"))["text"] == text


@MANY
@given(content=FILE, sizes=UNITS)
def test_the_first_fault_stops_and_is_named(
    content: bytes, sizes: dict[str, int], folders: Iterator[Path], tokenizer: Tokenizer
) -> None:
    path = write(next(folders), "a.jsonl", content)
    placed = list(read_records(path, split="train", name=None, cache_dir=Path(path).parent))
    with units(**sizes):
        try:
            prepare(path, tokenizer)
        except DataError as error:
            check(error, rf"a\.jsonl, line \d+: |{NOTHING}")
            is_bad = [isinstance(record, RowError) or not isinstance(record.get("text"), str) for _, record in placed]
            if any(is_bad):
                check(error, re.escape(str(placed[is_bad.index(True)][0])))
        else:
            assert all(isinstance(record["text"], str) for _, record in placed)


@MANY
@given(content=FILE, sizes=UNITS, validation_every=st.integers(2, 9))
def test_splits_hold_all_texts_once(
    content: bytes, sizes: dict[str, int], validation_every: int, folders: Iterator[Path], tokenizer: Tokenizer
) -> None:
    path = write(next(folders), "a.jsonl", content)
    expected, _ = good_texts(content, 10**6)
    source = SourceConfig(path=path)
    data = CorpusConfig(sources={"a": source}, on_error="skip", validation_every=validation_every)
    with units(**sizes):
        try:
            found = prepare_sources(data, tokenizer=tokenizer, cache_dir=Path(path).parent / "cache", processes=1)["a"]
        except DataError as error:
            check(error, NOTHING)
            assert not expected
            return
    train, held_out = (texts(split, tokenizer) for split in found)
    if sorted(train + held_out) != sorted(expected):  # of few documents, the last is cut
        [end] = held_out
        assert len(expected) < validation_every
        assert sorted([*train[:-1], train[-1] + end]) == sorted(expected)


CHARACTERS = st.text(st.sampled_from("ab \n\r\t\x00é€😀\ufeff"), max_size=120) | st.text(max_size=60)


@MANY
@given(text=CHARACTERS, sizes=UNITS, text_bytes=st.integers(3, 50))
@example(text="a😀" * 30, sizes={"PIECE_BYTES": 7}, text_bytes=3)
def test_the_parts_of_a_text_file_are_its_text(
    text: str, sizes: dict[str, int], text_bytes: int, folders: Iterator[Path], tokenizer: Tokenizer
) -> None:
    path = write(next(folders), "a.txt", text.encode())
    text = text.removeprefix("\ufeff")  # a byte order mark is none of the text
    with units(TEXT_BYTES=text_bytes, **sizes):
        if not text:
            with pytest.raises(DataError, match=NOTHING):
                prepare(path, tokenizer)
            return
        found = prepare(path, tokenizer)
    assert "".join(texts(found.train, tokenizer)) == "".join(texts(found.validation, tokenizer)) == text


@MANY
@given(content=st.binary(max_size=60) | CHARACTERS.map(lambda text: text.encode()[:-1]), text_bytes=st.integers(3, 50))
@example(content=b"ab\xc3", text_bytes=3)
@example(content=b"\xef", text_bytes=3)
def test_bytes_that_are_no_text_are_faults(
    content: bytes, text_bytes: int, folders: Iterator[Path], tokenizer: Tokenizer
) -> None:
    path = write(next(folders), "a.txt", content)
    try:
        content.decode()
        is_text = True
    except UnicodeDecodeError:
        is_text = False
    with units(TEXT_BYTES=text_bytes):
        placed = list(read_records(path, split="train", name=None, cache_dir=Path(path).parent))
        assert any(isinstance(record, RowError) for _, record in placed) != is_text
        try:
            prepare(path, tokenizer)
        except DataError as error:
            check(error, NOTHING if is_text else r"a\.txt.*not UTF-8")
            assert not is_text or not content.decode("utf-8-sig")
        else:
            assert is_text


@MANY
@given(rows=st.lists(ROW | JSON, max_size=6), indent=st.sampled_from([None, 1]))
def test_json_files_hold_what_they_say(
    rows: list[Any], indent: int | None, folders: Iterator[Path], tokenizer: Tokenizer
) -> None:
    path = write(next(folders), "a.json", json.dumps(rows, indent=indent).encode())
    try:
        found = prepare(path, tokenizer, on_error="skip")
    except DataError as error:
        check(error, NOTHING)
        expected = []
    else:
        expected = texts(found.train, tokenizer)
        assert found.train.manifest.rows == 2 * len(rows)
    there = [row["text"] for row in rows if isinstance(row, dict) and isinstance(row.get("text"), str) and row["text"]]
    assert expected == there


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b""), ("a.json", b"["), ("a.json", b"[1, 2"), ("a.json", b"\xff"), ("a.json", b"[\xff]"),
        ("a.json", b"[" * 100_000), ("a.json", b"[" + b"9" * 5000 + b"]"), ("a.json", b"null"), ("a.json", b"[null]"),
        ("a.json", b'[{"text": "\\ud800"}]'), ("a.json", b'{"text": 1}'), ("a.json", b'{"data": [{"text": "a"}]}'),
        ("a.parquet", b""), ("a.parquet", b"PAR1"), ("a.parquet", b"PAR1" + b"\0" * 100 + b"PAR1"),
        ("a.jsonl.gz", b""), ("a.jsonl.gz", b"no gzip"), ("a.jsonl.bz2", b"BZh9"), ("a.jsonl.xz", b"\xfd7zXZ\x00"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_broken_files_are_named(
    name: str, content: bytes, on_error: str, folders: Iterator[Path], tokenizer: Tokenizer
) -> None:
    path = write(next(folders), name, content)
    with pytest.raises(DataError, match=re.escape(name)):
        prepare(path, tokenizer, on_error=on_error)


@MANY
@given(rows=st.lists(st.none() | TEXT, max_size=8), per_group=st.integers(1, 4), sizes=UNITS)
def test_parquet_columns_come_back(
    rows: list[str | None], per_group: int, sizes: dict[str, int], folders: Iterator[Path], tokenizer: Tokenizer
) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    path = write(next(folders), "a.parquet", b"")
    table = pa.table({"text": pa.array(rows, pa.string()), "n": list(range(len(rows)))})
    pyarrow.parquet.write_table(table, path, row_group_size=per_group)
    expected = [text for text in rows if text]
    with units(**sizes):
        try:
            found = prepare(path, tokenizer, on_error="skip")
        except DataError as error:
            check(error, NOTHING)
            assert not expected
            return
    assert texts(found.train, tokenizer) == texts(found.validation, tokenizer) == expected
    assert found.train.manifest.rows == 2 * len(rows)
