"""Token files of each kind through the command line: prepared, shown and trained on as the text that they were."""

import json
from pathlib import Path

import pytest
from tests.data.token_bytes import write_flat, write_indexed, write_npy
from tests.tiny import MODEL

from llmtrain import cli
from llmtrain.data.tokenizers import Tokenizer, train_tokenizer

TEXTS = [f"document number {i} says something, {i * i} times.\n" * (1 + i % 3) for i in range(60)]
SHORT = [
    *MODEL, "train.steps=3", "schedule.warmup_steps=0", "train.sequence_length=32", "train.batch_tokens=256",
    "eval.max_rows=4", "tokenizer.path=tokenizer",
]  # fmt: skip


@pytest.fixture
def tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    made = train_tokenizer(TEXTS, 300)
    made.save(tmp_path / "tokenizer")
    return made


def losses(run: str) -> list[float]:
    rows = [json.loads(line) for line in Path("runs", run, "metrics.jsonl").read_text().splitlines()]
    return [value for row in rows for key, value in sorted(row.items()) if key.endswith(("loss", "bits_per_byte"))]


def write(kind: str, name: str, documents: list[list[int]]) -> str:
    if kind == "indexed":
        return write_indexed(Path(name), [[each] for each in documents])
    if kind == "npy":
        return write_npy(Path(f"{name}.npy"), documents)
    return write_flat(Path(f"{name}.bin"), documents, magic=20240520 if kind == "header" else None)


def test_each_kind_trains_as_its_text_does(tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    for name, texts in (("train", TEXTS), ("held_out", TEXTS[:9])):
        Path(f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    documents = [[*tokenizer.encode(text), tokenizer.eos_id] for text in TEXTS]
    text = ["data=files", "data.sources.files.path=train.jsonl", "data.sources.files.validation_path=held_out.jsonl"]
    assert cli.main(["pretrain", *text, *SHORT, "run=text"]) == 0
    assert len(losses("text")) > 3
    for kind in ("flat", "header", "npy", "indexed"):
        Path(kind).mkdir()
        paths = [write(kind, f"{kind}/tokens", documents), write(kind, f"{kind}/held_out", documents[:9])]
        named = ["data=files", *(f"data.sources.files.{key}={path}" for key, path in zip(
            ("path", "validation_path"), paths, strict=True
        ))]  # fmt: skip
        assert cli.main(["pretrain", *named, *SHORT, f"run={kind}"]) == 0
        assert losses(kind) == losses("text")
        said = json.loads(Path("runs", kind, "lineage.json").read_text())["data"]["files"]
        assert (said["path"], said["bytes"], len(said["content"])) == (paths[0], None, 64)
        assert said["documents"] == (60 if kind == "indexed" else None)
    capsys.readouterr()
    assert cli.main(["prepare", *named, "tokenizer.path=tokenizer"]) == 0
    assert f" {sum(map(len, documents)):,} " in capsys.readouterr().out
    assert len(list(Path("runs/cache").glob("tokens-*[!k]"))) == 1  # that of the text
    assert cli.main(["show", "stage=pretrain", *named, *SHORT, "rows=1"]) == 0
    assert "document number" in capsys.readouterr().out


def test_they_are_mixed_with_text(tokenizer: Tokenizer) -> None:
    Path("a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    write_npy(Path("b.npy"), [[*tokenizer.encode(text), tokenizer.eos_id] for text in TEXTS])
    mixed = ["data=files", "data.sources.files.path=a.jsonl", "data.sources.more.path=b.npy"]
    assert cli.main(["pretrain", *mixed, *SHORT, "data.validation_every=4"]) == 0
    [lineage] = Path("runs").glob("*/lineage.json")
    assert list(json.loads(lineage.read_text())["data"]) == ["files", "more"]


def test_a_token_too_many_is_told_with_its_place(tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    write_flat(Path("a.bin"), [[1, 2] * 4000, [9999], [1, 2] * 500])
    named = ["data=files", "data.sources.files.path=a.bin", "data.validation_every=100"]
    assert cli.main(["pretrain", *named, *SHORT, "run=bad"]) != 0
    assert "a.bin: token 8,000 (the first is 0) is 9999" in capsys.readouterr().err
