"""`llmtrain align` with each preference method, on a model so small that all of it takes seconds."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmtrain.config.compose import load_config
from llmtrain.stages import align, starts

ARITHMETIC = [
    "data.sources.arithmetic.max_rows=24", "data.validation_every=8", "train.batch_rows=4", "train.sequence_length=128",
    "train.steps=3", "schedule.warmup_steps=0", "eval.max_rows=4", "eval.max_problems=2", "eval.max_new_tokens=2",
]  # fmt: skip
WITH_REFERENCE = ("dpo", "ipo", "hinge", "robust", "kto")


def run(parent: Path, runs: Path, name: str, *overrides: str) -> list[dict[str, Any]]:
    """The rows of metrics of a run."""
    line = [*ARITHMETIC, f"model.init_from={parent}", f"runs_dir={runs}", f"run={name}", "optimizer.lr=1e-3"]
    align.run(load_config("align", [*line, *overrides]))
    rows = [json.loads(row) for row in (runs / name / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in rows]


@pytest.mark.parametrize("method", [*WITH_REFERENCE, "cdpo", "orpo", "simpo", "cpo"])
def test_every_method_trains_and_is_measured(
    parent: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    original = starts.load_policy
    monkeypatch.setattr(starts, "load_policy", lambda *given, **keys: loaded.append(1) or original(*given, **keys))
    rows = run(parent, tmp_path, method, f"method={method}", "train.batch_rows=24")
    assert len(loaded) == (2 if method in (*WITH_REFERENCE, "cdpo") else 1), "models in memory"
    accuracy = "eval/answer_accuracy" if method == "kto" else "eval/pair_accuracy"
    assert {"eval/loss", accuracy, "eval/exact_match"} < rows[0].keys()
    assert ("eval/log_ratio" in rows[0]) == ("train/log_ratio" in rows[1]) == (len(loaded) == 2)
    assert rows[-1]["step"] == 3
    assert rows[-1]["train/loss"] < rows[1]["train/loss"], "every step has all rows"
    assert (tmp_path / method / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("method", WITH_REFERENCE)
def test_a_precomputed_reference_is_that_on_the_fly(
    parent: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_the_fly = run(parent, tmp_path, "fly", f"method={method}", "train.micro_batch_rows=3")
    loaded = []
    original = starts.load_policy
    monkeypatch.setattr(starts, "load_policy", lambda *given, **keys: loaded.append(1) or original(*given, **keys))
    capsys.readouterr()
    precomputed = run(parent, tmp_path, "kept", f"method={method}", "method.reference=precomputed")
    assert len(loaded) == 1, "no second model"
    assert capsys.readouterr().err.count("the reference reads") == 2  # rows to train on, and those held out
    again = run(parent, tmp_path, "again", f"method={method}", "method.reference=precomputed", "train.epochs=null")
    assert "the reference reads" not in capsys.readouterr().err
    assert again == precomputed
    for row, other in zip(precomputed, on_the_fly, strict=True):
        assert row.keys() == other.keys()
        for name, value in other.items():
            if "accuracy" in name and row["step"] < 2:
                continue  # policy and reference are one, and rounding decides the ties
            assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-4), f"{name} at step {row['step']}"


def test_what_was_kept_is_found_by_model_and_rows_and_a_torn_file_is_made_again(parent: Path, tmp_path: Path) -> None:
    line = ["method=dpo", "method.reference=precomputed"]
    first = run(parent, tmp_path, "first", *line)
    kept = set((tmp_path / "cache").glob("reference-*"))
    assert len(kept) == 2
    run(parent, tmp_path, "fewer", *line, "data.sources.arithmetic.max_rows=16")
    more = set((tmp_path / "cache").glob("reference-*")) - kept
    assert len(more) == 1, "other rows to train on, the same held out"
    for path in kept:
        path.write_bytes(path.read_bytes()[:-5])
    assert run(parent, tmp_path, "again", *line) == first
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.endswith(".partial")]


def test_kto_takes_labels_without_pairs(parent: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {n} + 1?", "completion": str(n + 1 + n % 2), "label": n % 2 == 0} for n in range(20)]
    file = tmp_path / "thumbs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = ["data=files", f"data.sources.files.path={file}", "eval.problems=null"]
    line = [each for each in ARITHMETIC if not each.startswith(("data.sources", "eval.max_problems", "eval.max_new"))]
    line += ["method=kto", f"model.init_from={parent}", f"runs_dir={tmp_path}", "run=kto"]
    align.run(load_config("align", [*line, *source]))
    last = json.loads((tmp_path / "kto" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"train/chosen_reward", "train/rejected_reward", "train/kl_baseline"} < last.keys()
