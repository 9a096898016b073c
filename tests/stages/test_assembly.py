"""The frame around every stage: how long a run is, who starts it, what it hands on."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from llmtrain.config.compose import load_config
from llmtrain.config.errors import ConfigError, UserError
from llmtrain.config.schema import TrainConfig
from llmtrain.engine.distributed import Layout
from llmtrain.stages import assembly, handover
from llmtrain.stages.planning import num_steps


def pretrain_config(folder: Path, *overrides: str) -> Any:
    return load_config("pretrain", [f"runs_dir={folder}", "run=a", *overrides])


def finished_run(folder: Path, name: str, stage: str, when: float) -> Path:
    """What a later stage sees of a finished run."""
    run = folder / name
    (run / "model").mkdir(parents=True)
    (run / "model" / "config.json").write_text("{}")
    (run / "model" / "model.safetensors").write_bytes(name.encode())
    (run / "lineage.json").write_text(json.dumps({"stage": stage, "finished": when}))
    return run


@pytest.mark.parametrize(
    ("train", "steps"),
    [
        ({"steps": 7}, 7),
        ({"epochs": 2.0}, 20),  # 2 x 40 rows in batches of 4
        ({"epochs": 0.01}, 1),
        ({"tokens": 6400}, 25),  # 6400 tokens in batches of 4 x 64
        ({"tokens_per_parameter": 20.0}, 78),  # 20 x 1000 / 256
    ],
)
def test_length_of_a_run(train: dict[str, Any], steps: int) -> None:
    config = TrainConfig(batch_rows=4, sequence_length=64, **train)
    assert num_steps(config, rows=40, parameters=1000, tokens_per_row=64) == steps


@pytest.mark.parametrize(
    ("score", "overrides", "found"),
    [
        ("eval/reward", [], ("best", "eval/reward", "max")),
        ("eval/reward", ["checkpoint.best_metric=eval/loss", "checkpoint.keep_best=1"], ("best", "eval/loss", "min")),
        ("eval/reward", ["eval.every_steps=30"], ("last", None, "min")),  # not every checkpoint is measured
        ("eval/reward", ["checkpoint.every_steps=null"], ("last", None, "min")),
        ("eval/reward", ["checkpoint.final=last"], ("last", None, "min")),
        (None, [], ("last", None, "min")),
    ],
)
def test_the_best_is_handed_on_where_a_score_tells(
    score: str | None, overrides: list[str], found: tuple[str, str | None, str]
) -> None:
    keep = handover.checkpoint_config(load_config("align", overrides), score)
    assert (keep.final, keep.best_metric, keep.best_mode) == found


def test_a_finished_run_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, began = pretrain_config(tmp_path), []
    assembly.start(lambda config: began.append(1), config)
    handover.write_lineage(tmp_path / "a", handover.read_lineage(tmp_path / "a") | {"finished": 1.0})
    (tmp_path / "a" / "model").mkdir()
    assembly.start(lambda config: began.append(1), config)
    assert began == [1]
    assert "has finished already" in capsys.readouterr().err


def test_of_several_processes_only_the_first_opens_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    config, began = pretrain_config(tmp_path), []
    assembly.start(lambda config: began.append(1), config)
    assert began == [1]
    assert not (tmp_path / "a").exists()
    monkeypatch.setenv("RANK", "0")
    assembly.start(lambda config: began.append(1), config)
    assert handover.read_lineage(tmp_path / "a")["stage"] == "pretrain"


def test_another_config_is_refused_once_the_run_has_begun(tmp_path: Path) -> None:
    config = pretrain_config(tmp_path)
    handover.open_run(config)
    (tmp_path / "a" / "metrics.jsonl").write_text('{"step": 0}\n')
    handover.open_run(pretrain_config(tmp_path, "checkpoint.every_steps=3", "train.micro_batch_rows=2"))
    with pytest.raises(ConfigError, match=r"(?s)another config.*seed.*Choose another run= name"):
        handover.open_run(pretrain_config(tmp_path, "seed=5"))


def test_a_run_from_before_there_was_a_key_goes_on(tmp_path: Path) -> None:
    handover.open_run(pretrain_config(tmp_path))
    (tmp_path / "a" / "metrics.jsonl").write_text('{"step": 0}\n')
    saved = tmp_path / "a" / "config.yaml"
    lines = [line for line in saved.read_text().splitlines(keepends=True) if "max_grad_norm" not in line]
    saved.write_text("".join(lines))
    handover.open_run(pretrain_config(tmp_path))
    saved.write_text("".join(lines))
    with pytest.raises(ConfigError, match=r"train.max_grad_norm: 1.0 -> 2.0"):
        handover.open_run(pretrain_config(tmp_path, "train.max_grad_norm=2"))


def test_a_stage_takes_the_newest_finished_run_of_the_stage_before_and_keeps_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished_run(tmp_path, "old", "pretrain", 1.0)
    newest = finished_run(tmp_path, "deep/new", "pretrain", 3.0)
    finished_run(tmp_path, "other", "reward", 4.0)
    config = load_config("sft", [f"runs_dir={tmp_path}", "run=s"])
    resolved = handover.resolve_parents(config)
    assert resolved.model.init_from == str(newest)
    assert str(newest) in capsys.readouterr().err

    lineage = handover.open_run(resolved)
    assert lineage["parents"]["model"]["sha256"] == handover.weights_digest(newest)
    (tmp_path / "s" / "metrics.jsonl").write_text('{"step": 0}\n')
    finished_run(tmp_path, "newer", "pretrain", 9.0)
    assert handover.resolve_parents(config) == resolved

    (newest / "model" / "model.safetensors").write_bytes(b"trained again")
    with pytest.raises(ConfigError, match="have changed since the run began"):
        handover.open_run(resolved)


def test_no_run_to_start_from_is_said_with_the_cure(tmp_path: Path) -> None:
    config = load_config("align", [f"runs_dir={tmp_path}", "run=s"])
    with pytest.raises(ConfigError, match=r"no finished sft or pretrain run.*llmtrain sft"):
        handover.resolve_parents(config)


def test_an_unfinished_run_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="has not finished"):
        handover.model_folder(tmp_path)


def test_parents_are_named_by_role(tmp_path: Path) -> None:
    sft, reward = finished_run(tmp_path, "sft", "sft", 1.0), finished_run(tmp_path, "r", "reward", 2.0)
    config = handover.resolve_parents(load_config("align", ["method=ppo", f"runs_dir={tmp_path}", "run=s"]))
    assert {role: each["folder"] for role, each in handover.parents(config).items()} == {
        "model": str(sft), "reward_model": str(reward),
    }  # fmt: skip
    changed = dataclasses.replace(config, reward_model=str(sft))
    assert handover.parents(changed)["reward_model"]["sha256"] != handover.parents(config)["reward_model"]["sha256"]


def test_no_reward_model_is_looked_for_where_rewards_are_named(tmp_path: Path) -> None:
    finished_run(tmp_path, "sft", "sft", 1.0), finished_run(tmp_path, "r", "reward", 2.0)
    texts = ["method=ppo", f"runs_dir={tmp_path}", "run=s", "rewards=exact_answer"]
    assert handover.resolve_parents(load_config("align", texts)).reward_model is None


def test_a_model_that_does_not_fit_on_the_disk_is_told_and_the_run_stays_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(assembly, "save_model", full)
    monkeypatch.setattr(assembly, "token_ids", lambda tokenizer: {})
    config = pretrain_config(tmp_path)
    handover.open_run(config)
    run = assembly.Run(config, tmp_path / "a", Layout(0, 1, torch.device("cpu")), 0.0)
    with pytest.raises(UserError, match=r"cannot write .*model: No space left.*run the command again"):
        run.finish(nn.Linear(1, 1), None, data={}, plan=None)  # type: ignore[arg-type]
    assert not handover.read_lineage(tmp_path / "a")["finished"]


def test_samples_from_before_the_run_are_kept_when_it_goes_on(tmp_path: Path) -> None:
    run = assembly.Run(pretrain_config(tmp_path), tmp_path, Layout(0, 1, torch.device("cpu")), 0.0)
    for number, moment in enumerate(("before", "before", "after", "after")):
        run.write_samples(moment, lambda number=number: [{"answer": str(number)}])
    samples = json.loads((tmp_path / "samples.json").read_text())
    assert samples == {"before": [{"answer": "0"}], "after": [{"answer": "3"}]}
