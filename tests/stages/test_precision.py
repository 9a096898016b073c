"""`engine.precision=float8` from the command to the checkpoint, its rounding emulated on the processor."""

from pathlib import Path

import pytest
from tests.tiny import TINY

from llmtrain.config.compose import load_config
from llmtrain.config.errors import Stopped
from llmtrain.engine.tracking import read_metrics
from llmtrain.stages import assembly, pretrain


def losses(folder: Path, name: str, *overrides: str) -> list[float]:
    """Of the steps of a short run, or of what is left of it."""
    keys = [*TINY["pretrain"], "train.steps=8", "schedule.warmup_steps=2", f"runs_dir={folder}", f"run={name}"]
    pretrain.run(load_config("pretrain", [*keys, "checkpoint.every_steps=4", *overrides]))
    return [row["train/loss"] for row in read_metrics(folder / name) if "train/loss" in row]


def test_a_run_in_float8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plain = losses(tmp_path, "bfloat16", "engine.precision=bfloat16")
    assert losses(tmp_path, "elsewhere", "engine.precision=float8") == plain
    assert "this device has no float8 units; computing in bfloat16 where it can" in capsys.readouterr().err
    monkeypatch.setattr(assembly, "has_float8", lambda device: True)
    rounded = losses(tmp_path, "float8", "engine.precision=float8", "engine.activation_checkpointing=selective")
    assert "engine.precision=float8: 8 layers, scaled tensorwise" in capsys.readouterr().err
    assert rounded != plain
    assert rounded == pytest.approx(plain, rel=0.01)
    with pytest.raises(Stopped):
        losses(tmp_path, "halves", "engine.precision=float8", "train.stop_after=4")
    halves = losses(tmp_path, "halves", "engine.precision=float8")
    assert halves == losses(tmp_path, "whole", "engine.precision=float8"), "it goes on to the bit"
