"""float16: the scale goes as GradScaler's, overflows are left out and counted apart, a resume has the same bits."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.test_faults import Faulty, Killed
from tests.engine.test_trainer import Line, Points, SquaredError, line_model, rows
from torch import Tensor, nn

from llmtrain.engine import loss_scale
from llmtrain.engine.loss_scale import LossScale
from llmtrain.engine.tracking import read_faults
from llmtrain.engine.trainer import Trainer
from llmtrain.objectives.batch import Metrics

Build = Callable[..., Trainer]


class Steep(SquaredError):
    """Squared errors in float16: their gradients overflow where the scale is too large for the targets."""

    def __call__(self, model: nn.Module, batch: Points) -> tuple[Tensor, Metrics]:
        # the product is float16's, so its gradient is too
        errors = (model(batch.x)[:, 0].float() - batch.y).square() * batch.counts
        return errors.sum(), {"loss": (errors.detach().sum(), self.weight(batch))}


def in_float16(**more: Any) -> dict[str, Any]:
    autocast = lambda: torch.autocast("cpu", dtype=torch.float16)  # noqa: E731
    return {"autocast": autocast, "scale_loss": True, "objective": Steep(), "max_grad_norm": 0.5, **more}


class Growing(Line):
    """Targets that are larger for some steps, so that the scale falls again."""

    def __call__(self, step: int) -> Points:
        batch = super().__call__(step)
        return Points(batch.x, batch.y * (30.0 if 8 <= step < 14 else 1.0), batch.counts)


def test_scale_and_weights_are_those_of_gradscaler(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(loss_scale, "GROWTH_UPDATES", 4)
    steps = 20
    trainer = build(steps=steps, batches=Growing(), **in_float16())
    trainer.fit()

    model, batches, objective = line_model(), Growing(), Steep()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=4)
    overflowed = 0
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        with torch.autocast("cpu", dtype=torch.float16):
            loss = objective(model, batches(step))[0] / 3
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        overflowed += scaler.get_scale() < before
        optimizer.zero_grad()
        assert rows(tmp_path)[step + 1]["train/loss_scale"] == scaler.get_scale(), step
        assert rows(tmp_path)[step + 1]["train/overflowed_steps"] == overflowed
    assert 1 < overflowed < steps - 5
    scales = [row["train/loss_scale"] for row in rows(tmp_path).values()]
    assert any(after < before for before, after in pairwise(scales))
    assert any(after > before for before, after in pairwise(scales))
    torch.testing.assert_close(trainer.model.weight, model.weight, rtol=1e-6, atol=1e-7)
    assert read_faults(tmp_path) == [], "an overflow is no fault"
    assert "train/skipped_steps" not in rows(tmp_path)[steps]
    assert all(math.isfinite(value) for row in rows(tmp_path).values() for value in row.values())


def test_small_gradients_are_not_lost(build: Build) -> None:
    class Tiny(Steep):
        def __call__(self, model: nn.Module, batch: Points) -> tuple[Tensor, Metrics]:
            loss, metrics = super().__call__(model, batch)
            return loss * 2.0**-26, metrics

    found = {}
    for scale in (False, True):
        trainer = build(**in_float16(objective=Tiny(), scale_loss=scale, max_grad_norm=None, steps=1))
        trainer.fit()
        found[scale] = trainer.optimizer.state[trainer.model.weight]["exp_avg"].abs().max().item()
        for path in trainer.folder.glob("checkpoints/step-*"):
            path.rename(trainer.folder / f"{scale}")
    assert found[False] == 0
    assert found[True] > 1e-9


def test_a_loss_that_is_no_number_is_not_the_scales_fault(build: Build, tmp_path: Path) -> None:
    trainer = build(batches=Faulty({3: "nan"}), **in_float16())
    trainer.fit()
    scales = {step: row["train/loss_scale"] for step, row in rows(tmp_path).items()}
    assert scales[3] == scales[4] < 2.0**16
    assert [row["step"] for row in read_faults(tmp_path)] == [4]


def test_at_the_smallest_scale_an_overflow_is_a_fault() -> None:
    scale = LossScale()
    for _ in range(16):
        assert scale.overflows(True, False)
    assert float(scale.scale) == 1.0
    assert not scale.overflows(True, False), "left to the guard"
    assert scale.values() == {"train/loss_scale": 1.0, "train/overflowed_steps": 16.0}


def test_a_killed_run_goes_on_with_its_scale(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "GROWTH_UPDATES", 3)

    class Fragile(Growing):
        def __call__(self, step: int) -> Points:
            if step == 9:
                raise Killed
            return super().__call__(step)

    options = {"steps": 12, "checkpoint": {"every_steps": 4}}
    whole = build(batches=Growing(), **in_float16(**options))
    whole.fit()
    expected = rows(tmp_path)
    (tmp_path / "checkpoints").rename(tmp_path / "others")
    with pytest.raises(Killed):
        build(batches=Fragile(), **in_float16(**options)).fit()
    again = build(batches=Growing(), **in_float16(**options))
    again.fit()
    assert again.batches.asked[0] == 8
    assert torch.equal(again.model.weight, whole.model.weight)
    for step, row in rows(tmp_path).items():
        assert row["train/loss_scale"] == expected[step]["train/loss_scale"]
