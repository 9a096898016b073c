"""Runs whose layers are on two processes: the same curve as in one, and each goes on from the other's checkpoints."""

import json
from pathlib import Path

import pytest
from tests.invariance.test_processes import (
    assert_same_run,
    parents,  # noqa: F401 (a fixture)
    pretrain,
    pretrain_command,
    rewind,
)
from tests.tiny import COMMANDS, finish, starting_from

PIPELINE = ["engine.processes=2", "engine.pipeline_parallel=2", "train.micro_batch_rows=2"]
LLAMA = ["model=llama_tiny", "model.num_layers=4", "model.hidden_size=32", "model.num_heads=4", "model.num_kv_heads=2"]


@pytest.mark.slow
def test_fifty_steps_have_the_curve_and_the_rows_of_one_process(tmp_path: Path) -> None:
    longer = [*LLAMA, "model.max_sequence_length=128", "train.steps=50", "optimizer.lr=3e-3"]
    rows = {}
    for name, layout in {"alone": [], "pipeline": PIPELINE}.items():
        finish([*pretrain_command(tmp_path, name), *longer, *layout])
        rows[name] = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
    assert len(rows["alone"]) == 51
    for found, expected in zip(rows["pipeline"], rows["alone"], strict=True):
        counts = [key for key in expected if key.startswith("data/") and not key.endswith("/loss")]
        assert [found[key] for key in counts] == [expected[key] for key in counts]
        losses = [key for key in expected if key.endswith(("loss", "bits_per_byte"))]  # of each source: the same rows
        assert [found[key] for key in losses] == pytest.approx([expected[key] for key in losses], abs=1e-4)
    assert rows["alone"][-1]["train/loss"] < rows["alone"][1]["train/loss"] - 0.5


@pytest.mark.slow
def test_a_run_goes_on_in_one_process_and_in_a_pipeline(tmp_path: Path) -> None:
    deep = ["model.num_layers=4", "model.tied_embeddings=true"]
    interleaved = [*PIPELINE, "engine.pipeline_schedule=interleaved"]
    pretrain(tmp_path, "alone", deep)
    for name, first, then in (("to one", [*PIPELINE, *deep], deep), ("from one", deep, [*interleaved, *deep])):
        run = tmp_path / name.replace(" ", "-")
        pretrain(tmp_path, run.name, first)
        assert_same_run(run, tmp_path / "alone")
        rewind(run, step=4)
        assert "at step 4" in pretrain(tmp_path, run.name, then)
        assert_same_run(run, tmp_path / "alone")


@pytest.mark.slow
def test_pipelines_that_take_different_rows_train_as_one_process(tmp_path: Path) -> None:
    pretrain(tmp_path, "alone", [])
    pretrain(tmp_path, "two", [*PIPELINE, "engine.processes=4"])
    assert_same_run(tmp_path / "two", tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "precomputed", "simpo", "kto", "masked", "two-segments"])
def test_stages_train_in_a_pipeline_as_in_one_process(
    stage: str,
    parents: Path,  # noqa: F811
) -> None:
    short = ["train.steps=3", "schedule.warmup_steps=1", "train.micro_batch_rows=2", f"runs_dir={parents}"]
    command = [*COMMANDS[stage], *short, *starting_from(parents, stage)]
    for name, layout in {"alone": [], "pipeline": PIPELINE}.items():
        finish([*command, f"run={name}-{stage}", *layout])
    assert_same_run(parents / f"pipeline-{stage}", parents / f"alone-{stage}")
