import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from llmtrain.config.errors import DataError
from llmtrain.config.schema import CleaningConfig, CorpusConfig, SourceConfig
from llmtrain.data import documents, pieces
from llmtrain.data.mixture import Phase, PhasedMixture
from llmtrain.data.streaming import HeldOutTokens, Position, Stream, StreamedBatches, read_positions
from llmtrain.data.tokenizers import Tokenizer, train_tokenizer

TEXTS = [f"<{i}> " + "abc " * (i * 7 % 23) for i in range(300)]
LENGTH = 16


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 300)


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "BATCH_CHARACTERS", 500)
    monkeypatch.setattr(documents, "PORTION_BYTES", 3000)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 2000)


def stream(tmp_path: Path, tokenizer: Tokenizer, texts: list[str] = TEXTS, key: int = 1, **options: object) -> Stream:
    path = tmp_path / f"{abs(hash(tuple(texts)))}.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return stream_of(str(path), tmp_path, tokenizer, key=key, **options)


def stream_of(
    path: str, tmp_path: Path, tokenizer: Tokenizer, validation_path: str | None = None, key: int = 1,
    **options: object,
) -> Stream:  # fmt: skip
    source = SourceConfig(path=path, validation_path=validation_path)
    data = CorpusConfig(sources={"a": source}, streaming=True, validation_every=10, **options)
    return Stream(source, data, tokenizer, tmp_path, length=LENGTH, key=key)


def found_in(rows: list[list[int]], tokenizer: Tokenizer) -> list[str]:
    text = tokenizer.decode([token for row in rows for token in row], skip_special=False)
    return text.split("<|end|>")


def test_an_epoch_gives_every_training_document_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = stream(tmp_path, tokenizer)
    assert len(source.portions) > 3
    rows = []
    while source.position.epoch == 0:
        rows.append(source.row().tokens.tolist())
    seen = found_in(rows, tokenizer)[:-1]
    held_out = [text for texts in source.texts("validation", source.portions) for text in texts]
    epoch = seen[: len(TEXTS) - len(held_out)]
    assert 20 < len(held_out) < 40
    assert sorted(epoch + held_out) == sorted(TEXTS)
    assert epoch != sorted(epoch, key=TEXTS.index)
    while source.position.epoch == 1:
        rows.append(source.row().tokens.tolist())
    second = found_in(rows, tokenizer)[len(epoch) : 2 * len(epoch)]
    assert sorted(second) == sorted(epoch)
    assert second != epoch


@pytest.mark.parametrize("stop", [0, 1, 7, 50, 119, 120, 121, 400])
def test_a_position_goes_on_with_the_very_next_row(tmp_path: Path, tokenizer: Tokenizer, stop: int) -> None:
    one, two = stream(tmp_path, tokenizer), stream(tmp_path, tokenizer)
    for _ in range(stop):
        one.row()
    two.begin(Position(**json.loads(json.dumps(one.where().__dict__))))
    for _ in range(200):
        assert (one.row().tokens == two.row().tokens).all()
    assert one.epochs() == two.epochs()


def test_documents_may_be_kept_apart(tmp_path: Path, tokenizer: Tokenizer) -> None:
    plain, apart = stream(tmp_path, tokenizer), stream(tmp_path, tokenizer, attend_across_documents=False)
    for _ in range(50):
        row, masked = plain.row(), apart.row()
        assert (row.tokens == masked.tokens).all()
        assert row.documents is None
        ends = np.flatnonzero(row.tokens[:-1] == tokenizer.eos_id) + 1
        assert np.flatnonzero(~masked.mask).tolist() == [0, *ends.tolist()]
        assert masked.documents.max() == len(ends)


def test_batches_keep_the_weights_and_go_on(tmp_path: Path, tokenizer: Tokenizer) -> None:
    others = [text.replace("<", "{") for text in TEXTS]
    mixture = PhasedMixture([Phase(0, {"a": 0.75, "b": 0.25})])

    def batches(first_step: int = 0, **place: int) -> StreamedBatches:
        streams = {"a": stream(tmp_path, tokenizer), "b": stream(tmp_path, tokenizer, others, key=2)}
        return StreamedBatches(streams, mixture, batch_rows=8, first_step=first_step, **place)

    whole, parts = batches(), [batches(rank=rank, world=2) for rank in range(2)]
    counted: Counter[int] = Counter()
    for step in range(10):
        batch = whole(step)
        counted.update(batch.source.tolist())
        both = [part(step).tokens.tolist() for part in parts]
        assert batch.tokens.tolist() == both[0] + both[1]
    assert counted == {0: 60, 1: 20}
    assert whole.counts(10)["data/a/tokens"] == 60 * LENGTH
    whole.positions()(tmp_path)
    again = batches(first_step=10)
    for name, position in read_positions(tmp_path).items():
        again.streams[name].begin(position)
    for step in range(10, 30):
        assert again(step).tokens.tolist() == whole(step).tokens.tolist()
    with pytest.raises(AssertionError, match="cannot be asked for any step"):
        again(7)


def test_held_out_text_is_as_prepared(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = stream(tmp_path, tokenizer)
    held_out = HeldOutTokens(source, 100, tokenizer.vocab_size)
    assert 100 <= len(held_out) < 1000
    texts = found_in([held_out.tokens(0, len(held_out)).tolist()], tokenizer)[:-1]
    assert set(texts) <= {text for texts in source.texts("validation", source.portions) for text in texts}
    assert held_out.training_counts.sum() > 100


def test_nothing_in_a_stream_is_told(tmp_path: Path, tokenizer: Tokenizer) -> None:
    cleaning = CleaningConfig(min_characters=10_000)
    with pytest.raises(DataError, match=r"no documents in there\n  300 x shorter than 10000 characters"):
        stream(tmp_path, tokenizer, cleaning=cleaning).row()


def test_rows_left_out_are_told_at_checkpoints(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    file = Path(stream(tmp_path, tokenizer).source.path)
    file.write_text("{\n" + file.read_text())
    streams = {"a": stream_of(str(file), tmp_path, tokenizer, on_error="skip")}
    batches = StreamedBatches(streams, PhasedMixture([Phase(0, {"a": 1})]), batch_rows=20)
    for step in range(20):
        batches(step)
    with caplog.at_level("WARNING"):
        batches.positions()(tmp_path)
        batches.positions()(tmp_path)  # nothing new
    [said] = [record.message for record in caplog.records]
    assert "data.sources.a: of the rows read so far\n  1 x not valid JSON; the first: " in said


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_broken_held_out_rows_are_told(tmp_path: Path, tokenizer: Tokenizer, on_error: str) -> None:
    (tmp_path / "held.jsonl").write_text('{"text": "held out"}\n{\n')
    train = stream(tmp_path, tokenizer).source.path
    source = stream_of(train, tmp_path, tokenizer, str(tmp_path / "held.jsonl"), on_error=on_error)
    if on_error == "stop":
        with pytest.raises(DataError, match=r"held.jsonl, line 2: not valid JSON"):
            HeldOutTokens(source, 100, tokenizer.vocab_size)
    else:
        assert len(HeldOutTokens(source, 100, tokenizer.vocab_size)) > 1
        assert source.left_out().startswith("1 x not valid JSON")
