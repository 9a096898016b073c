"""Sweeps that train, a user's own configs and classes in the current folder."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tests.tiny import ENVIRONMENT, TINY

from llmtrain import cli

SHORT = [*TINY["pretrain"], "train.steps=1", "schedule.warmup_steps=0"]
OPTIMIZER = """
import torch


class Signs(torch.optim.SGD):
    pass
"""


def finished(folder: Path) -> bool:
    return bool(json.loads((folder / "lineage.json").read_text())["finished"]) and (folder / "model").is_dir()


def test_a_sweep_trains_a_run_for_each_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    command = ["pretrain", *SHORT, "run=grid", "-m", "optimizer.lr=1e-3,3e-3"]
    assert cli.main(command) == 0
    runs = sorted(path for path in (tmp_path / "runs" / "grid").iterdir() if path.is_dir())
    assert [run.name for run in runs] == ["0-optimizer.lr=0.001", "1-optimizer.lr=0.003"]
    assert all(finished(run) for run in runs)
    assert [yaml.safe_load((run / "config.yaml").read_text())["optimizer"]["lr"] for run in runs] == [0.001, 0.003]
    first, second = ((run / "model" / "model.safetensors").read_bytes() for run in runs)
    assert first != second
    capsys.readouterr()
    assert cli.main(command) == 0
    assert capsys.readouterr().err.count("has finished already; nothing to do") == 2


def test_configs_and_classes_beside_the_user(tmp_path: Path) -> None:
    script = shutil.which("llmtrain", path=str(Path(sys.executable).parent))
    if script is None:
        pytest.skip("the console script is not installed")
    (tmp_path / "mine.py").write_text(OPTIMIZER)
    (tmp_path / "json.py").write_text("raise RuntimeError('a file of the user in the place of a library')")
    (tmp_path / "configs" / "optimizer").mkdir(parents=True)
    (tmp_path / "configs" / "optimizer" / "signs.yaml").write_text("_target_: mine.Signs\nbetas: null\neps: null\n")
    (tmp_path / "configs" / "experiment").mkdir()
    (tmp_path / "configs" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /optimizer: signs\ntrain:\n  steps: 1\nrun: own\n"
    )
    arguments = [*TINY["pretrain"], "schedule.warmup_steps=0", "experiment=mine"]
    result = subprocess.run(
        [script, "pretrain", *arguments], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert finished(tmp_path / "runs" / "own")
    saved = yaml.safe_load((tmp_path / "runs" / "own" / "config.yaml").read_text())
    assert saved["optimizer"]["_target_"] == "mine.Signs"
