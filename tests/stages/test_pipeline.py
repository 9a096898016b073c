"""The pipeline: stages fed by the ones before, skipped when finished, one summary."""

import json
from pathlib import Path

import pytest
from tests.tiny import TINY

from llmtrain.cli import main


@pytest.mark.slow
def test_the_whole_road_and_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "configs"
    root.mkdir()
    stages = {
        "pretrain": {"command": "pretrain", "overrides": [*TINY["pretrain"], "train.steps=2"]},
        "sft": {"command": "sft", "model": "pretrain", "overrides": [*TINY["sft"], "train.steps=2"]},
        "reward": {"command": "reward", "model": "sft", "overrides": [*TINY["reward"], "train.steps=2"]},
        "dpo": {"command": "align", "model": "sft", "overrides": ["method=dpo", *TINY["dpo"], "train.steps=2"]},
    }
    (root / "pipeline.yaml").write_text(
        json.dumps({"defaults": ["_self_", "/hydra/quiet"], "run": "x", "stages": stages})
    )
    command = ["pipeline", "--config-dir", str(root), "run=road", f"runs_dir={tmp_path / 'runs'}", "seed=3"]
    assert main(command) == 0
    folder = tmp_path / "runs" / "road"
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary) == list(stages)
    assert "pair_accuracy" in summary["reward"]
    assert "before" in summary["sft"]
    assert (folder / "report.html").stat().st_size > 1000
    parents = json.loads((folder / "dpo" / "lineage.json").read_text())["parents"]
    assert parents["model"]["folder"].endswith("road/sft")
    out = capfd.readouterr().out
    assert "before and after each stage" in out

    before = (folder / "dpo" / "model" / "model.safetensors").stat().st_mtime_ns
    assert main(command) == 0
    assert "finished earlier" in capfd.readouterr().err
    assert (folder / "dpo" / "model" / "model.safetensors").stat().st_mtime_ns == before
