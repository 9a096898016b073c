"""Traces of chosen steps: they are there, name what ran, and change nothing."""

import gzip
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tests.tiny import COMMANDS

from llmtrain import cli
from llmtrain.config.schema import ProfileConfig
from llmtrain.engine.distributed import Layout
from llmtrain.engine.profiling import Profiler

ALONE = Layout(rank=0, world=1, device=torch.device("cpu"))


def events(path: Path) -> list[dict]:
    with gzip.open(path) as file:
        return json.load(file)["traceEvents"]


def test_the_steps_that_were_asked_for_are_recorded(tmp_path: Path) -> None:
    said: list[str] = []
    profiler = Profiler(tmp_path, ProfileConfig(first_step=2, steps=2), ALONE, 5, said.append)
    for step in range(1, 6):
        with profiler(step), torch.profiler.record_function(f"step {step}"):
            torch.ones(8, 8) @ torch.ones(8, 8)
    [trace] = (tmp_path / "profile").glob("*.json.gz")
    assert trace.name == "rank-0.steps-2-3.pt.trace.json.gz"
    names = {event["name"] for event in events(trace) if "name" in event}
    assert {"step 2", "step 3", "aten::mm"} <= names
    assert not {"step 1", "step 4"} & names
    assert "aten::mm" in (tmp_path / "profile" / "rank-0.steps-2-3.txt").read_text()
    assert said == [f"engine.profile: steps 2 to 3 are in {tmp_path / 'profile'}"]


def test_a_trace_that_cannot_be_written_is_not_worth_a_run(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("a file")
    said: list[str] = []
    profiler = Profiler(tmp_path, ProfileConfig(first_step=1, steps=1), ALONE, 1, said.append)
    with profiler(1), nullcontext():
        pass
    assert "engine.profile: cannot write" in said[0]


def test_a_run_is_the_same_with_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*COMMANDS["pretrain"], "train.steps=3", "schedule.warmup_steps=0", f"runs_dir={tmp_path}"]
    assert cli.main([*command, "run=plain"]) == 0
    assert cli.main([*command, "run=profiled", "engine.profile.first_step=2", "engine.profile.steps=1"]) == 0
    weights = [(tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("plain", "profiled")]
    assert weights[0] == weights[1]
    [trace] = (tmp_path / "profiled" / "profile").glob("*.json.gz")
    names = {event.get("name") for event in events(trace)}
    assert {"llmtrain/data", "llmtrain/forward_backward", "llmtrain/optimizer"} <= names
    assert "llmtrain/evaluation" not in names
    rows = [json.loads(line) for line in (tmp_path / "plain" / "metrics.jsonl").read_text().splitlines()]
    for row in rows[1:]:
        phases = {name: value for name, value in row.items() if name.startswith("perf/seconds/")}
        total = phases.pop("perf/seconds/total")
        assert set(phases) == {
            f"perf/seconds/{name}" for name in ("data", "forward_backward", "optimizer", "evaluation", "saving")
        }
        assert 0 < phases["perf/seconds/forward_backward"] <= sum(phases.values()) <= total
        assert row["perf/peak_memory_gib"] > 0.05
    assert rows[1]["perf/seconds/evaluation"] > 0  # that of step 0
    assert "Time</h3>" in (tmp_path / "plain" / "report.html").read_text()


def test_steps_beyond_the_run_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*COMMANDS["pretrain"], "train.steps=3", "engine.profile.first_step=3"]) == 2
    assert "engine.profile.first_step: step 3 to 5 of a run of train.steps=3" in capsys.readouterr().err
