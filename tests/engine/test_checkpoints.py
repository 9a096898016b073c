"""Checkpoints: complete or absent, verified, pruned; nothing pickled."""

import json
import math
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmtrain.config.errors import UserError
from llmtrain.config.schema import CheckpointConfig
from llmtrain.engine import checkpoints, retention
from llmtrain.engine.distributed import Layout
from llmtrain.engine.snapshots import Snapshots

ALONE = Layout(rank=0, world=1, device=torch.device("cpu"))


def make(seed: int = 0, steps: int = 2) -> tuple[nn.Module, torch.optim.Optimizer, dict[str, nn.Module]]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    part = nn.Module()
    part.register_buffer("coefficient", torch.tensor(0.5 + seed))
    return model, optimizer, {"kl": part}


def write(root: Path, step: int, seed: int = 0, **metrics: float) -> checkpoints.Checkpoint:
    return save(root, step, checkpoints.training_state(*make(seed)), metrics)


def save(root: Path, step: int, state: dict[str, Tensor], metrics: dict[str, float]) -> checkpoints.Checkpoint:
    return checkpoints.save(root, step, Snapshots(ALONE, aside=True).take(state), ALONE, metrics=metrics)


def test_state_comes_back_bit_by_bit_into_a_fresh_run(tmp_path: Path) -> None:
    saved = checkpoints.training_state(*make(seed=1))
    checkpoint = save(tmp_path, 2, saved, {})
    model, optimizer, parts = make(seed=2, steps=0)
    fresh = checkpoints.training_state(model, optimizer, parts)
    assert fresh.keys() == saved.keys()
    assert any(name.startswith("optimizer.") and name.endswith("exp_avg_sq") for name in saved)
    checkpoints.load(checkpoint, fresh, ALONE)
    assert all(torch.equal(fresh[name], saved[name]) for name in saved)
    # the tensors filled are the live ones
    assert parts["kl"].coefficient == 1.5
    assert next(iter(optimizer.state.values()))["step"] == 2
    assert torch.equal(model[0].weight, saved["model.0.weight"])


def test_every_file_is_safetensors_or_json(tmp_path: Path) -> None:
    folder = write(tmp_path, 1).folder
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".safetensors", ".json"}
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"optimizer.0.weight.momentum": torch.zeros(5, 3)}, "optimizer.0.weight.momentum"),
        ({"model.0.weight": torch.zeros(5, 4)}, "model.0.weight"),
    ],
)
def test_a_checkpoint_without_what_is_needed_says_what_can_be_done(
    tmp_path: Path, other: dict[str, Tensor], words: str
) -> None:
    checkpoint = write(tmp_path, 1)
    with pytest.raises(UserError, match=rf"step-00000001 does not fit this run: .*{words}.*model.init_from="):
        checkpoints.load(checkpoint, other, ALONE)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda folder: next(folder.glob("state/*")).write_bytes(b"torn"), "does not match its digest"),
        (lambda folder: next(folder.glob("state/*")).unlink(), "is missing"),
        (lambda folder: (folder / "manifest.json").write_text('{"step": 2'), "manifest cannot be read"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest cannot be read"),
    ],
)
def test_a_damaged_newest_checkpoint_is_named_and_passed_over(tmp_path: Path, harm: object, words: str) -> None:
    write(tmp_path, 1)
    harm(write(tmp_path, 2).folder)  # type: ignore[operator]
    said: list[str] = []
    found = checkpoints.newest_good(tmp_path, ALONE, said.append)
    assert found is not None
    assert found.step == 1
    assert len(said) == 1
    assert "step-00000002" in said[0]
    assert words in said[0]


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    folder = write(tmp_path, 1).folder
    path = next(folder.glob("state/*"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert "digest" in str(checkpoints.inspect(folder))


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step, loss in enumerate([3.0, 1.0, 2.0, 2.5, 2.2], start=1):
        write(tmp_path, step, **{"eval/loss": loss})
    (tmp_path / ".step-00000009.partial").mkdir()
    retention.prune(
        tmp_path, newest=5, keep=CheckpointConfig(keep_last=2, keep_best=1, best_metric="eval/loss", best_mode="min")
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000004", "step-00000005"]


def test_some_are_kept_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 360_000, 1800))  # every half hour
    monkeypatch.setattr(checkpoints, "time", types.SimpleNamespace(time=lambda: float(next(clock))))

    def kept(**keep: Any) -> list[int]:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        for step in range(2, 22, 2):
            write(root, step)
            retention.prune(root, newest=step, keep=CheckpointConfig(keep_last=1, **keep))
        return sorted(int(path.name[5:]) for path in root.iterdir())

    assert kept(keep_every_steps=6) == [6, 12, 18, 20]
    assert kept(keep_every_hours=1.5) == [2, 8, 14, 20]
    assert kept(keep_every_hours=1.1, keep_every_steps=10) == [2, 8, 10, 14, 20]


def test_the_best_is_the_latest_of_equal_ones_and_was_measured(tmp_path: Path) -> None:
    def best(mode: str, newest: int = 9) -> int | None:
        found = retention.best_good(tmp_path, ALONE, print, metric="eval/loss", mode=mode, newest=newest)
        return found and found.step

    assert best("min") is None
    write(tmp_path, 1)
    assert best("min") is None
    for step, loss in enumerate([3.0, 1.0, math.nan, 1.0, 3.0], start=2):
        write(tmp_path, step, **{"eval/loss": loss})
    assert (best("min"), best("max"), best("min", newest=4), best("min", newest=2)) == (5, 6, 3, 2)


def test_a_checkpoint_that_was_passed_over_evicts_no_good_one(tmp_path: Path) -> None:
    write(tmp_path, 2)
    next(write(tmp_path, 9).folder.glob("state/*")).write_bytes(b"torn")
    (write(tmp_path, 1).folder / "manifest.json").write_text("torn")
    write(tmp_path, 3)  # the run went on from step 2
    retention.prune(
        tmp_path, newest=3, keep=CheckpointConfig(keep_last=1, keep_best=0, best_metric=None, best_mode="min")
    )
    found = checkpoints.newest_good(tmp_path, ALONE, print)
    assert found is not None
    assert found.step == 3
    assert not (tmp_path / "step-00000009").exists()


def test_the_manifest_lists_every_other_file(tmp_path: Path) -> None:
    folder = write(tmp_path, 7, **{"eval/loss": 1.5}).folder
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {"manifest.json"}
    assert set(manifest["sha256"]) == files
    assert checkpoints.read(folder) == checkpoints.Checkpoint(folder, 7, {"eval/loss": 1.5})
