"""Whatever is in a file of rows: each line is used or reported, and nothing but a DataError ends the reading."""

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmtrain.config.errors import DataError
from llmtrain.config.schema import RowsConfig, RowSourceConfig, TemplateConfig
from llmtrain.data.columns import KNOWN
from llmtrain.data.encoding import Loader, load_conversations, load_pairs, load_prompts, load_rankings
from llmtrain.data.records import Faults, read_records
from llmtrain.data.rows import CONVERSATIONS, PAIRS, PROMPTS, Kind, read_rows
from llmtrain.data.tokenizers import Tokenizer, train_tokenizer

NAMES = sorted({name for names in KNOWN.values() for name in names})
TEXT = st.text(max_size=8) | st.sampled_from(["\n\nHuman: q\n\nAssistant: a", "\n\nAssistant:", "a\ufdd0b", "", "\x00"])
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "odd"]), "content": TEXT},
    optional={"train": st.booleans(), "weight": st.sampled_from([0, 1, 0.5, None, "1"])},
)
NUMBER = st.integers(-3, 3) | st.floats() | st.just(10**400)
KEYS = st.sampled_from(["role", "content", "text", "x"])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "text", "x"]), inner)
    ),
    max_leaves=8,
)
VALUE = TEXT | st.lists(MESSAGE, max_size=4) | st.lists(TEXT, max_size=3) | st.lists(NUMBER, max_size=3) | JSON
LIKELY = st.one_of(
    st.fixed_dictionaries({"messages": st.lists(MESSAGE, max_size=4)}),
    st.fixed_dictionaries({"prompt": TEXT, "completion": TEXT}, optional={"label": st.booleans() | st.none()}),
    st.fixed_dictionaries({"prompt": TEXT, "chosen": TEXT, "rejected": TEXT}),
    st.fixed_dictionaries({"prompt": st.just("q"), "completion": TEXT, "label": st.booleans()}),
    st.fixed_dictionaries(
        {"prompt": TEXT, "answers": st.lists(TEXT, max_size=4), "scores": st.lists(NUMBER, max_size=4)}
    ),
)
RECORD = LIKELY | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), VALUE, max_size=5)
LINE = RECORD.map(lambda record: json.dumps(record).encode()) | JSON.map(json.dumps).map(str.encode)
ODD = st.binary(max_size=20) | st.sampled_from([b"[" * 3000, b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}', b"\x00"])
FILE = st.lists(LINE | LINE | LINE | ODD, max_size=6).map(b"\n".join)
NOTHING = r"(no rows in there|none of the \d+ (rows|prompts))"
MANY = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["some text"], 270)


class Lines(logging.Handler):
    """Collects what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@pytest.fixture(scope="module")
def logged() -> Iterator[Lines]:
    lines, log = Lines(), logging.getLogger("llmtrain")
    log.addHandler(lines)
    yield lines
    log.removeHandler(lines)


def source(folder: Path, content: bytes, **options: Any) -> RowSourceConfig:
    file = folder / "any.jsonl"
    file.write_bytes(content)
    return RowSourceConfig(path=str(file), validation_path=str(file), **options)  # held out rows are rows too


def check(error: DataError, pattern: str) -> None:
    assert re.search(pattern, str(error))


def count_lines(folder: Path) -> int:
    return sum(1 for _ in read_records(str(folder / "any.jsonl"), split="train", name=None, cache_dir=folder))


def places(rows: list[Any]) -> set[str]:
    return {place for row in rows for place in str(row.place).split(" and ")}


@pytest.mark.parametrize("kind", [CONVERSATIONS, PAIRS, PROMPTS])
@MANY
@given(content=FILE)
def test_every_line_is_used_or_reported(kind: Kind[Any], folder: Path, content: bytes) -> None:
    faults, found = Faults("skip"), source(folder, content)
    try:
        rows = list(read_rows(kind, found, 2, "train", folder, faults))
    except DataError as error:
        check(error, NOTHING)
        assert count_lines(folder) == faults.counts.total()
    else:
        assert count_lines(folder) == len(places(rows)) + faults.counts.total()


@pytest.mark.parametrize("kind", [CONVERSATIONS, PAIRS, PROMPTS])
@MANY
@given(content=FILE)
def test_the_first_bad_line_is_named(kind: Kind[Any], folder: Path, content: bytes) -> None:
    try:
        list(read_rows(kind, source(folder, content), 2, "train", folder, Faults("stop")))
    except DataError as error:
        check(error, rf"any\.jsonl(, line \d|: {NOTHING})")


@pytest.mark.parametrize("load", [load_conversations, load_pairs, load_rankings, load_prompts])
@pytest.mark.parametrize("too_long", ["drop", "cut", "split"])
@MANY
@given(content=FILE, loss_on=st.sampled_from(["all", "last", "flagged"]))
def test_rows_are_encoded_or_counted(
    load: Loader, folder: Path, tokenizer: Tokenizer, logged: Lines, content: bytes, too_long: str, loss_on: str
) -> None:
    logged.said.clear()
    sources = {"a": source(folder, content)}
    config = RowsConfig(sources=sources, too_long=too_long, on_error="skip", loss_on=loss_on)  # type: ignore[arg-type]
    try:
        rows = load(config, tokenizer, split="train", max_length=12, cache_dir=folder)["a"]
    except DataError as error:
        check(error, rf"{NOTHING}|all \d+ rows are longer")
        return
    assert all(len(side.tokens) <= 12 for row in rows for side in row.sides)
    if load not in (load_pairs, load_rankings):  # a line may give several pairs, and two lines one
        assert count_lines(folder) == len(rows) + left_out(logged.said)


def left_out(said: list[str]) -> int:
    """Lines left out by what was logged; a conversation that is divided counts as its parts less one."""
    text = "\n".join(said)
    faults = sum(int(found) for found in re.findall(r": (\d+) rows left out", text))
    dropped = sum(int(found) for found in re.findall(r" (\d+) left out", text))
    divided = sum(int(rows) - int(parts) for rows, parts in re.findall(r"(\d+) divided into (\d+)", text))
    return faults + dropped + divided


@MANY
@given(content=FILE)
def test_templates_over_any_row(folder: Path, content: bytes) -> None:
    templates = [TemplateConfig(prompt="{{ prompt + 1 }}", completion="{{ messages[0].content }}")] * 2
    faults = Faults("skip")
    try:
        rows = list(read_rows(CONVERSATIONS, source(folder, content, templates=templates), 2, "train", folder, faults))
    except DataError:
        rows = []
    assert count_lines(folder) == len(rows) + faults.counts.total()
