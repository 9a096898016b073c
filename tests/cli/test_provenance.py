"""What a run saw: the rows of a step, the steps of a document; also where the mixture changed at a resume."""

import json
import re
import shutil
from pathlib import Path

import pytest
from tests.tiny import MODEL

from llmtrain import cli

TEXTS = {name: [f"{name} {i} " + f"word{i} " * (3 + i % 7) for i in range(40)] for name in ("a", "b", "c")}
PRETRAIN = [
    "pretrain", *MODEL, "tokenizer.vocab_size=300", "train.sequence_length=16", "train.batch_tokens=64",
    "train.steps=12", "schedule.warmup_steps=0", "eval.max_rows=2", "eval.every_steps=null",
    "checkpoint.every_steps=4", "checkpoint.keep_last=9", "data.validation_every=20",
]  # fmt: skip


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, texts in TEXTS.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        Path(f"{name}-talks.jsonl").write_text(
            "".join(json.dumps({"prompt": text, "completion": f"{name}{i}"}) + "\n" for i, text in enumerate(texts))
        )
    (tmp_path / "configs" / "data").mkdir(parents=True)
    return tmp_path


def mixture(weights: dict[str, float], suffix: str = "") -> list[str]:
    sources = {name: {"path": f"{name}{suffix}.jsonl", "weight": weight} for name, weight in weights.items()}
    Path("configs/data/mine.yaml").write_text(json.dumps({"sources": sources}))
    return ["data=mine"]


def shown(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    capsys.readouterr()
    assert cli.main(["show", *arguments]) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err


@pytest.mark.parametrize("options", [[], ["data.sequences=documents", "data.attend_across_documents=false"]])
def test_steps_and_documents(corpus: Path, capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    assert cli.main([*PRETRAIN, *mixture({"a": 0.5, "b": 0.5}), "run=one", *options]) == 0
    seen: dict[str, set[int]] = {}
    for step in range(1, 13):
        out = shown(capsys, "run=one", f"step={step}")
        assert out.count(f"step {step}, row ") == 4
        for place in re.findall(r"  from (\S+, line \d+)", out):
            seen.setdefault(place, set()).add(step)
        for row in out.split(f"step {step}, row ")[1:]:  # the text is that of the documents that are named
            words = set(re.findall(r"\b[ab] \d+ ", row.split("\n", 1)[1]))
            lines = {f"{file} {int(line) - 1} " for file, line in re.findall(r"([ab])\.jsonl, line (\d+)", row)}
            assert words <= lines
    assert len(seen) > 20
    for place in sorted(seen)[::7]:
        out = shown(capsys, "run=one", f"document={place.replace(', line ', ':')}")
        assert [int(step) for step in out.rsplit("step: ", 1)[1].split(", ")] == sorted(seen[place])
    held_out = shown(capsys, "run=one", "document=a.jsonl:20", code=2)
    assert "no row of the run comes from there" in held_out
    assert "the run has 12 steps" in shown(capsys, "run=one", "step=13", code=2)


def test_weights_and_sources_change_at_a_resume(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = [*PRETRAIN, "tokenizer.train_bytes=2000"]
    assert cli.main([*whole, *mixture({"a": 0.75, "b": 0.25}), "run=one"]) == 0
    before = [shown(capsys, "run=one", f"step={step}") for step in range(1, 13)]
    for path in (corpus / "runs" / "one" / "checkpoints").glob("step-*"):
        if path.name > "step-00000004":
            for file in sorted(path.rglob("*"), reverse=True):
                file.rmdir() if file.is_dir() else file.unlink()
            path.rmdir()
    lineage = corpus / "runs" / "one" / "lineage.json"
    lineage.write_text(json.dumps(json.loads(lineage.read_text()) | {"finished": None}))
    assert cli.main([*whole, *mixture({"a": 0.25, "c": 0.75}), "run=one"]) == 0
    assert "resuming runs/one at step 4 of 12" in capsys.readouterr().err
    after = [shown(capsys, "run=one", f"step={step}") for step in range(1, 13)]
    assert [out.count(" a, row") for out in after[:4]] == [out.count(" a, row") for out in before[:4]]
    assert sum(out.count("no longer in the run's config") for out in after[:4]) == 4
    assert [out.count("c.jsonl") > 0 for out in after] == [False] * 4 + [True] * 8
    rows = [row for out in after for row in re.findall(r"\d: (\w, row \d+)", out)]
    assert len(rows) == len(set(rows)) == 48
    said = json.loads(lineage.read_text())["mixture"]
    assert [phase["first_sample"] for phase in said["phases"]] == [0, 16]
    (corpus / "a.jsonl").write_text(json.dumps({"text": "something else " * 99}) + "\n")
    lineage.write_text(json.dumps(json.loads(lineage.read_text()) | {"finished": None}))
    assert cli.main([*whole, *mixture({"a": 0.5, "c": 0.5}), "run=one"]) == 2
    assert "data.sources.a: its rows have changed since the run drew" in capsys.readouterr().err


@pytest.mark.parametrize("packing", ["false", "true"])
def test_conversations_are_traced(corpus: Path, capsys: pytest.CaptureFixture[str], packing: str) -> None:
    assert cli.main([*PRETRAIN, *mixture({"a": 1}), "run=base", "train.steps=1", "train.sequence_length=64"]) == 0
    rows = mixture({"b": 0.5, "c": 0.5}, "-talks")
    assert cli.main([
        "sft", *rows, "run=talks", "model.init_from=runs/base", "train.epochs=null", "train.steps=6",
        "train.batch_rows=4", "train.sequence_length=128", "eval.max_rows=2", f"data.packing={packing}",
        "eval.problems=null",
    ]) == 0  # fmt: skip
    out = shown(capsys, "run=talks", "step=3")
    places = re.findall(r"  from (\S+)-talks.jsonl, line (\d+)", out)
    assert len(places) >= 4
    for name, line in places:
        assert f"{name}{int(line) - 1}" in out
    name, line = places[0]
    found = shown(capsys, "run=talks", f"document={name}-talks.jsonl:{line}")
    assert "3" in found.rsplit("step: ", 1)[1].strip().split(", ")


def test_what_is_no_run(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no run in nothing or runs/nothing" in shown(capsys, "run=nothing", "step=1", code=2)
    assert "say what is to be shown of it" in shown(capsys, "run=nothing", code=2)
    assert "step: has no effect: name the run" in shown(capsys, "step=1", code=2)


def test_a_streamed_run_goes_on_with_the_same_rows(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*PRETRAIN, *mixture({"a": 1}), "run=base", "train.steps=1"]) == 0
    data = mixture({"a": 0.5, "b": 0.25, "c": 0.25})
    command = [each for each in PRETRAIN if not each.startswith("tokenizer.")]
    streamed = [*command, *data, "data.streaming=true", "tokenizer.path=runs/base/model"]
    assert cli.main([*streamed, "run=whole"]) == 0
    metrics = Path("runs/whole/metrics.jsonl").read_text()
    assert cli.main([*streamed, "run=again"]) == 0
    for name in ("step-00000008", "step-00000012"):
        shutil.rmtree(f"runs/again/checkpoints/{name}")
    lineage = Path("runs/again/lineage.json")
    lineage.write_text(json.dumps(json.loads(lineage.read_text()) | {"finished": None}))
    assert cli.main([*streamed, "run=again"]) == 0
    assert "resuming runs/again at step 4 of 12" in capsys.readouterr().err
    one, two = (Path(f"runs/{run}/model/model.safetensors").read_bytes() for run in ("whole", "again"))
    assert one == two
    assert '"data/a/tokens": 384' in metrics
    assert "bits_per_byte" in metrics
    assert "the run's text was streamed" in shown(capsys, "run=whole", "step=3", code=2)
    assert "needs a tokenizer that is there" in refused([*PRETRAIN, *data, "data.streaming=true"], capsys)
    assert "a stream has no known end" in refused([*streamed, "train.steps=null", "train.epochs=1"], capsys)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(arguments) == 2
    return capsys.readouterr().err
