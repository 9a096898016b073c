import contextlib
import gzip
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from llmtrain.config.errors import DataError
from llmtrain.config.schema import CleaningConfig, CorpusConfig, SourceConfig
from llmtrain.data import documents, pieces, preparation, workers
from llmtrain.data.jobs import Job
from llmtrain.data.preparation import prepare_sources
from llmtrain.data.shards import PreparedSource
from llmtrain.data.tokenizers import Tokenizer, train_tokenizer

TEXTS = [f"document number {i} says something, {i * i} times.\n" * (1 + i % 5) for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 300)


def write(path: Path, texts: list[str] = TEXTS) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return write(tmp_path / "a.jsonl")


def prepare(path: str, tokenizer: Tokenizer, cache: Path, processes: int = 1, **options: object) -> PreparedSource:
    corpus = {name: options.pop(name) for name in ("on_error", "validation_every") if name in options}
    source = SourceConfig(path=path, **options)
    data = CorpusConfig(sources={"a": source}, **{"validation_every": 10, **corpus})
    return prepare_sources(data, tokenizer=tokenizer, cache_dir=cache, processes=processes)["a"]


def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units of a size that tests can have many of."""
    monkeypatch.setattr(preparation, "SHARD_TOKENS", 200)
    monkeypatch.setattr(documents, "BATCH_CHARACTERS", 100)
    monkeypatch.setattr(documents, "PORTION_BYTES", 1500)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 700)


def files(prepared: PreparedSource) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(prepared.train.folder.iterdir())}


def test_blocks_are_the_documents_and_their_ends(path: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokens = prepare(path, tokenizer, tmp_path / "cache").train
    train = [text for i, text in enumerate(TEXTS) if (i + 1) % 10]
    expected = [token for text in train for token in [*tokenizer.encode(text), tokenizer.eos_id]]
    found = np.concatenate([tokens.block(i, 32) for i in range(tokens.num_blocks(32))])
    assert found.tolist() == expected[: len(expected) // 32 * 32]
    said = tokens.summary
    assert (said.documents, said.tokens) == (54, len(expected))
    assert said.bytes == sum(len(text.encode()) for text in train)
    assert tokens.token_counts(tokenizer.vocab_size)[tokenizer.eos_id] == 54


def test_documents_have_ends_and_places(
    path: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_units(monkeypatch)
    for split in prepare(path, tokenizer, tmp_path / "cache"):
        ends = split.ends().tolist()
        assert len(split.summary.shards) > 1
        for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            [(document, place)] = split.documents(start, end)
            assert document == number
            file, line = str(place).split(", line ")
            assert file == path
            assert tokenizer.decode(split.tokens(start, end)[:-1].tolist()) == TEXTS[int(line) - 1]
        assert [number for number, _ in split.documents(0, ends[-1])] == list(range(len(ends)))
        middle = ends[1] - 1
        assert [number for number, _ in split.documents(middle, middle + 2)] == [1, 2]


def test_every_document_is_in_one_split(
    path: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_units(monkeypatch)
    prepared = prepare(path, tokenizer, tmp_path / "cache")
    assert len(prepared.train.manifest.portions) > 3
    found = []
    for split in prepared:
        ends = split.ends().tolist()
        found += [tokenizer.decode(split.tokens(a, b).tolist()) for a, b in zip([0, *ends], ends, strict=False)]
    assert sorted(found) == sorted(TEXTS)
    assert 1 <= prepared.validation.summary.documents <= 12


def test_files_do_not_depend_on_the_number_of_processes(
    path: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "SMALL_BYTES", 0)
    for name in "bcd":
        write(tmp_path / "more" / f"{name}.jsonl", [f"{name} {text}" for text in TEXTS])
    monkeypatch.setattr(documents, "PORTION_BYTES", 1)  # the division is done here, the processes only read
    one = prepare(str(tmp_path / "more"), tokenizer, tmp_path / "one", processes=1)
    three = prepare(str(tmp_path / "more"), tokenizer, tmp_path / "three", processes=3)
    assert len(one.train.manifest.portions) == 3
    assert files(one) == files(three)


def test_an_interruption_changes_nothing(
    path: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_units(monkeypatch)
    whole = prepare(path, tokenizer, tmp_path / "whole")
    encode, calls = preparation._encode, []

    def interrupted(*args: object) -> None:
        calls.append(args)
        if len(calls) % 7 == 0:
            raise KeyboardInterrupt
        encode(*args)

    monkeypatch.setattr(preparation, "_encode", interrupted)
    attempts = 0
    while not list((tmp_path / "again").glob("tokens-*/manifest.json")):
        attempts += 1
        with contextlib.suppress(KeyboardInterrupt):
            again = prepare(path, tokenizer, tmp_path / "again")
    assert attempts > 3
    assert files(again) == files(whole)
    assert not list((tmp_path / "again").glob("*.partial"))


def test_what_is_cleaned_is_not_cleaned_again(
    path: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_units(monkeypatch)
    cleaning = CleaningConfig(exact_duplicates=True)
    whole = prepare(path, tokenizer, tmp_path / "whole", cleaning=cleaning)
    clean, cleaned = preparation.clean_portion, []

    def interrupted(job: Job, number: int) -> None:
        if len(cleaned) == 2:
            cleaned.append(-1)
            raise KeyboardInterrupt
        clean(job, number)
        cleaned.append(number)

    monkeypatch.setattr(preparation, "clean_portion", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(path, tokenizer, tmp_path / "again", cleaning=cleaning)
    again = prepare(path, tokenizer, tmp_path / "again", cleaning=cleaning)
    assert sorted(cleaned) == [-1, *range(len(again.train.manifest.portions))]
    assert files(again) == files(whole)


def prepare_much(tmp_path: Path, tokenizer: Tokenizer) -> list[str]:
    """A command that works for some seconds, with processes of its own."""
    texts = [f"{i}: " + " ".join(str(i * j) for j in range(400)) for i in range(16_000)]
    write(tmp_path / "a.jsonl", texts)
    tokenizer.save(tmp_path / "tokenizer")
    arguments = [
        f"data.sources.files.path={tmp_path}/a.jsonl", f"tokenizer.path={tmp_path}/tokenizer", "processes=2",
    ]  # fmt: skip
    return [sys.executable, "-m", "llmtrain", "prepare", "data=files", *arguments]


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.2, 1.5])  # seconds; at first the processes are being started
def test_an_interrupt_is_one_word(tmp_path: Path, tokenizer: Tokenizer, delay: float) -> None:
    command = [*prepare_much(tmp_path, tokenizer), f"runs_dir={tmp_path}"]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("cache/tokens-*.partial")):
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGINT)  # to all, as a terminal does
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert [line for line in errors.splitlines() if "encoding" not in line] == ["interrupted"]


@pytest.mark.slow
def test_killed_three_times(tmp_path: Path, tokenizer: Tokenizer) -> None:
    command = prepare_much(tmp_path, tokenizer)
    subprocess.run([*command, f"runs_dir={tmp_path}/whole"], check=True, capture_output=True)
    for delay in (4.0, 6.0, 8.0):
        process = subprocess.Popen([*command, f"runs_dir={tmp_path}/again"], start_new_session=True)
        time.sleep(delay)
        assert process.poll() is None, "it was done before it could be killed"
        process.send_signal(signal.SIGKILL)  # this process alone: its workers must end by themselves
        process.wait()
    subprocess.run([*command, f"runs_dir={tmp_path}/again"], check=True, capture_output=True)
    [one], [two] = (list((tmp_path / name / "cache").glob("tokens-*/")) for name in ("whole", "again"))
    assert [file.name for file in sorted(one.iterdir())] == [file.name for file in sorted(two.iterdir())]
    assert all(file.read_bytes() == (two / file.name).read_bytes() for file in one.iterdir())


def test_prepared_tokens_are_used_again(
    path: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(path, tokenizer, tmp_path / "cache").train
    monkeypatch.setattr(preparation, "read_portion", lambda *_: pytest.fail("read again"))
    os.utime(path)  # touched, not changed
    assert prepare(path, tokenizer, tmp_path / "cache").train.folder == first.folder


def test_the_same_files_elsewhere_are_named_where_they_are(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / "before" / f"{name}.jsonl", [f"{name} {text}" for text in TEXTS])
    once = prepare(str(tmp_path / "before"), tokenizer, tmp_path / "cache").train
    (tmp_path / "before").rename(tmp_path / "after")
    tokens = prepare(str(tmp_path / "after"), tokenizer, tmp_path / "cache").train
    assert tokens.folder == once.folder
    assert tokens.path == str(tmp_path / "after")
    places = [str(place) for _, place in tokens.documents(0, len(tokens))]
    assert (places[0], places[-1]) == (f"{tmp_path}/after/a.jsonl, line 1", f"{tmp_path}/after/b.jsonl, line 59")
    assert tokens.find("after/b.jsonl", 59) == [len(places) - 1]
    assert tokens.find("before/b.jsonl", 59) == []


def test_a_changed_file_is_noticed(path: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    first = prepare(path, tokenizer, tmp_path / "cache").train
    with open(path, "a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    second = prepare(path, tokenizer, tmp_path / "cache").train
    assert second.folder != first.folder
    assert second.summary.documents == first.summary.documents + 1


def test_tokenizers_and_options_are_kept_apart(path: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    made = [
        prepare(path, tokenizer, cache), prepare(path, train_tokenizer(TEXTS, 280), cache),
        prepare(path, tokenizer, cache, max_documents=7), prepare(path, tokenizer, cache, validation_every=20),
    ]  # fmt: skip
    assert len({each.train.folder for each in made}) == 4
    assert made[2].train.manifest.rows == 7


def test_own_validation_files(path: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    other = write(tmp_path / "b.jsonl", ["held out"])
    train, validation = prepare(path, tokenizer, tmp_path / "cache", validation_path=other)
    assert (train.summary.documents, validation.summary.documents) == (60, 1)
    assert str(validation.documents(0, 1)[0][1]) == f"{other}, line 1"


def test_compressed_text_and_urls(tokenizer: Tokenizer, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    memory.pipe("/corpus/train/a.jsonl.gz", gzip.compress(lines))
    memory.pipe("/corpus/validation/b.jsonl", lines)
    whole = prepare("memory://corpus", tokenizer, tmp_path / "cache")
    assert whole.train.manifest.rows == 60
    assert str(whole.train.documents(0, 1)[0][1]).endswith("/corpus/train/a.jsonl.gz, line 1")
    with pytest.raises(DataError, match="no such file"):
        prepare("memory://nothing/here.jsonl", tokenizer, tmp_path / "cache")
    with pytest.raises(DataError, match="no such file"):
        prepare("memory://corpus/*.parquet", tokenizer, tmp_path / "cache")


def test_json_files_are_arrays_or_lines(path: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    lines, array = tmp_path / "lines.json", tmp_path / "array.json"
    lines.write_bytes(b"\xef\xbb\xbf" + Path(path).read_bytes())
    array.write_text(json.dumps([{"text": text} for text in TEXTS]))
    expected = prepare(path, tokenizer, tmp_path / "cache").train
    for file, unit in ((lines, "line"), (array, "row")):
        found = prepare(str(file), tokenizer, tmp_path / "cache").train
        assert found.summary.content == expected.summary.content
        assert [str(place) for _, place in found.documents(0, 1)] == [f"{file}, {unit} 1"]


def test_a_large_text_file_is_several_documents(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmtrain.data import records

    monkeypatch.setattr(records, "TEXT_BYTES", 50)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 200)
    text = "".join(f"wörd {i} {'x' * (i % 90)}\n" for i in range(100))
    (tmp_path / "a.txt").write_text(text)
    tokens = prepare(
        str(tmp_path / "a.txt"), tokenizer, tmp_path / "cache", validation_path=write(tmp_path / "b.jsonl")
    )
    ends = tokens.train.ends().tolist()
    parts = [tokenizer.decode(tokens.train.tokens(a, b)[:-1].tolist()) for a, b in zip([0, *ends], ends, strict=False)]
    assert "".join(parts) == text
    assert len(parts) > 10


def test_faulty_rows_stop_or_are_counted(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    file.write_text('{"text": "good"}\n{"text": 3}\n{"text": ""}\nnothing\n{"text": "as good"}\n')
    with pytest.raises(DataError, match=r"(?s)line 2: column 'text' holds 3.*data.on_error=skip"):
        prepare(str(file), tokenizer, cache)
    assert not list(cache.glob("tokens-*.partial"))
    with caplog.at_level(logging.WARNING):
        manifest = prepare(str(file), tokenizer, cache, on_error="skip").train.manifest
    assert (manifest.rows, manifest.left_out, manifest.counts) == (5, 1, {"empty": 1})
    assert {reason: count for reason, (count, _) in manifest.faults.items()} == {"not text": 1, "not valid JSON": 1}
    assert "a.jsonl, line 4: not valid JSON" in caplog.text
    with pytest.raises(DataError, match=r"(?s)rows that cannot be used.*line 2.*data.on_error=skip"):
        prepare(str(file), tokenizer, cache)  # prepared, but not with what is asked for now


def test_waiting_for_another_process_is_said(
    path: str, tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = prepare(path, tokenizer, tmp_path / "cache").train.folder
    folder.rename(tmp_path / "done")
    is_held = threading.Event()

    def finish_elsewhere() -> None:
        with FileLock(f"{folder}.lock"):
            is_held.set()
            time.sleep(0.3)
            (tmp_path / "done").rename(folder)

    other = threading.Thread(target=finish_elsewhere)
    other.start()
    is_held.wait()
    caplog.clear()
    with caplog.at_level("INFO"):
        assert prepare(path, tokenizer, tmp_path / "cache").train.folder == folder
    other.join()
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["a: another process is preparing it; waiting until it is done"]


def test_a_damaged_folder_is_refused(path: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokens = prepare(path, tokenizer, tmp_path / "cache").train
    manifest = tokens.folder / "manifest.json"
    said = json.loads(manifest.read_text())
    said["train"]["shards"][0][2] += 1
    manifest.write_text(json.dumps(said))
    with pytest.raises(DataError, match="do not agree"):
        prepare(path, tokenizer, tmp_path / "cache").train.block(0, 8)
    manifest.write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        prepare(path, tokenizer, tmp_path / "cache")


def test_cleaning_and_duplicates_are_counted(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [*TEXTS, *TEXTS[:9], "short", "mail me: a.b@example.org " + "words of a text " * 9, ""]
    path = write(tmp_path / "a.jsonl", texts)
    cleaning = CleaningConfig(min_characters=20, mask_pii=["mail"], exact_duplicates=True)
    whole = prepare(path, tokenizer, tmp_path / "whole", cleaning=cleaning)
    manifest = whole.train.manifest
    assert (manifest.rows, manifest.left_out) == (72, 11)
    assert manifest.counts == {
        "shorter than 20 characters": 1, "pii: mail addresses masked": 1, "empty": 1, "duplicate": 9,
    }  # fmt: skip
    assert whole.train.summary.documents + whole.validation.summary.documents == 61
    assert sorted(file for file in files(whole) if not file.endswith(".safetensors")) == ["manifest.json"]
    small_units(monkeypatch)
    parts = prepare(path, tokenizer, tmp_path / "parts", cleaning=cleaning)
    assert len(parts.train.manifest.portions) > 3
    assert parts.train.manifest.counts == manifest.counts
    texts = [tokenizer.decode(split.tokens(0, len(split)).tolist(), skip_special=False) for split in parts]
    assert all("".join(texts).count(text) >= 1 for text in TEXTS)
    assert "a.b@example.org" not in "".join(texts)
    plain = prepare(path, tokenizer, tmp_path / "whole")
    assert plain.train.folder != whole.train.folder
    assert plain.train.manifest.rows == plain.train.manifest.left_out + 71


def test_sources_share_a_cleaner_and_may_have_their_own(path: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    sources = {
        "a": SourceConfig(path=path),
        "b": SourceConfig(path=write(tmp_path / "b.jsonl"), cleaning=CleaningConfig(min_characters=1000)),
        "c": SourceConfig(path=write(tmp_path / "c.jsonl", ["x" * 30]), cleaning=CleaningConfig()),
    }
    data = CorpusConfig(sources=sources, validation_every=10, cleaning=CleaningConfig(min_characters=100))
    with pytest.raises(DataError, match=r"b.jsonl: no documents in there\n  60 x shorter than 1000 characters"):
        prepare_sources(data, tokenizer=tokenizer, cache_dir=tmp_path / "cache", processes=1)
    without = CorpusConfig(sources={name: sources[name] for name in "ac"}, validation_every=10, cleaning=data.cleaning)
    found = prepare_sources(without, tokenizer=tokenizer, cache_dir=tmp_path / "cache", processes=1)
    assert found["a"].train.manifest.left_out == sum(len(text) < 100 for text in TEXTS)
    assert found["c"].train.manifest.left_out == 0
