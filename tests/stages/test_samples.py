"""What a run of a method that samples keeps of its answers, on a model so small that all of it takes seconds."""

from pathlib import Path
from typing import Any

import pytest
from tests.stages.test_preference import run

from llmtrain.engine.tracking import Tracker, read_samples

LENGTH = ["rewards=length", "rewards.length.options.maximum=8", "rewards.length.options.buffer=8"]
GRPO = [*LENGTH, "method=grpo", "method.samples_per_prompt=2", "method.max_new_tokens=8", "train.steps=4"]


def test_all_answers_of_a_step_are_what_its_metrics_say(parent: Path, tmp_path: Path) -> None:
    shown = ["tracker.samples=4", "tracker.samples_every_steps=1"]
    rows = run(parent, tmp_path, "all", *GRPO, *shown, "method.minibatches=2")
    samples = read_samples(tmp_path / "all")
    assert [(each["step"], each["row"]) for each in samples] == [
        (step, row) for step in range(1, 5) for row in range(4)
    ]
    for row in rows[1:]:
        of_step = [each for each in samples if each["step"] == row["step"]]
        for metric, key in (
            ("reward", "reward"),
            ("reward/length", "reward/length"),
            ("answer_tokens", "tokens"),
            ("kl", "kl"),
        ):
            mean = sum(each[key] for each in of_step) / 4
            assert mean == pytest.approx(row[f"align/{metric}"], rel=1e-4, abs=1e-5), metric
    page = (tmp_path / "all" / "report.html").read_text(encoding="utf-8")
    assert "Answers sampled on the way" in page


def test_the_kl_of_answers_is_not_told_before_it_is_known(parent: Path, tmp_path: Path) -> None:
    run(parent, tmp_path, "single", *GRPO, "train.steps=1")  # one update, which reads the policy itself
    assert {each["kl"] for each in read_samples(tmp_path / "single")} == {None}


@pytest.mark.parametrize("every", [[], ["tracker.samples_every_steps=2"]])
def test_a_run_that_was_stopped_ends_with_the_same_file(
    parent: Path, tmp_path: Path, every: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*GRPO, *every, "tracker.samples=2", "checkpoint.every_steps=2"]
    rows = run(parent, tmp_path, "calm", *command)
    original = Tracker.log

    def log(self: Tracker, step: int, values: dict[str, Any]) -> None:
        original(self, step, values)
        if step == 3:  # the answers of this step are written, and will be drawn again
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "log", log)
        with pytest.raises(KeyboardInterrupt):
            run(parent, tmp_path, "stopped", *command)
    assert run(parent, tmp_path, "stopped", *command) == rows
    files = [(tmp_path / name / "rollouts.jsonl").read_bytes() for name in ("calm", "stopped")]
    assert files[0] == files[1] != b""
    shown = [1, 2, 4] if every else [1, 2, 3, 4]
    assert sorted({each["step"] for each in read_samples(tmp_path / "calm")}) == shown


def test_none_are_kept_where_none_are_asked_for(parent: Path, tmp_path: Path) -> None:
    run(parent, tmp_path, "none", *GRPO, "train.steps=1", "tracker.samples=0")
    assert not (tmp_path / "none" / "rollouts.jsonl").exists()
