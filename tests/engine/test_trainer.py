"""The loop: what is divided by what, when it measures and saves, what it refuses."""

import dataclasses
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmtrain.config.errors import UserError
from llmtrain.config.schema import CheckpointConfig, EvalConfig, HealthConfig, TrackerConfig
from llmtrain.engine import checkpoints, saving
from llmtrain.engine.distributed import Layout
from llmtrain.engine.health import read_warnings
from llmtrain.engine.speed import Speed
from llmtrain.engine.steps import Totals, as_numbers
from llmtrain.engine.tracking import Tracker, read_samples
from llmtrain.engine.trainer import Trainer
from llmtrain.objectives.batch import Batch, Metrics

ALONE = Layout(rank=0, world=1, device=torch.device("cpu"))


@dataclasses.dataclass(frozen=True)
class Points(Batch):
    """Inputs and targets; rows of weight 0 do not count."""

    x: Tensor
    y: Tensor
    counts: Tensor
    repeats: int = 1

    def updates(self) -> Any:
        return (self for _ in range(self.repeats))


class Line:
    """A batch source of noisy points on a line; pure in the step."""

    def __init__(self, repeats: int = 1) -> None:
        self.repeats, self.asked = repeats, []

    def __call__(self, step: int) -> Points:
        self.asked.append(step)
        draw = torch.Generator().manual_seed(step)
        x = torch.randn(8, 3, generator=draw)
        return Points(x, x.sum(1), torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0]), self.repeats)

    def counts(self, step: int) -> dict[str, float]:
        return {"data/line/rows": 8.0 * step}


class SquaredError:
    def weight(self, batch: Points) -> Tensor:
        return batch.counts.sum()

    def __call__(self, model: nn.Module, batch: Points) -> tuple[Tensor, Metrics]:
        losses = (model(batch.x)[:, 0] - batch.y).square() * batch.counts
        return losses.sum(), {"loss": (losses.detach().sum(), self.weight(batch))}


def line_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 1)


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Trainer]:
    """A trainer of a straight line, with some of its parts replaced."""

    def make(
        *, steps: int = 6, checkpoint: dict[str, Any] | None = None, eval_every: int | None = None, **parts: Any
    ) -> Trainer:
        model = parts.pop("model", None) or line_model()
        tracker = Tracker(tmp_path, TrackerConfig(), steps=steps, is_main=True, run="r", run_config={})
        return Trainer(
            **{
                "folder": tmp_path, "layout": ALONE, "model": model, "batches": Line(), "objective": SquaredError(),
                "optimizer": torch.optim.AdamW(model.parameters(), lr=1.0),
                "learning_rate": lambda step: 0.1 / (step + 1),
                "steps": steps, "seed": 0, "tracker": tracker, "checkpoint": CheckpointConfig(**(checkpoint or {})),
                "eval": EvalConfig(every_steps=eval_every), "tracking": TrackerConfig(),
                "extra": lambda step: lambda folder: None,
                "resume_from": checkpoints.newest_good(tmp_path / "checkpoints", ALONE, tracker.say),
                "autocast": lambda: torch.autocast("cpu", enabled=False),
                "speed": Speed(ALONE.device, 1.0, 1.0), **parts,
            }
        )  # fmt: skip

    return make


def rows(folder: Path) -> dict[int, dict[str, float]]:
    return {row["step"]: row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}


def saved(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*"))


def test_training_is_what_a_plain_loop_does(build: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer = build(micro_batch_rows=3, max_grad_norm=0.5)
    trainer.fit()
    model, batches, objective = line_model(), Line(), SquaredError()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    for step in range(6):
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        batch = batches(step)
        loss = objective(model, batch)[0] / 3
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        row = rows(tmp_path)[step + 1]
        assert row["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert row["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
        assert row["train/learning_rate"] == 0.1 / (step + 1)
        assert row["data/line/rows"] == 8 * (step + 1)
    torch.testing.assert_close(trainer.model.weight, model.weight, rtol=1e-5, atol=1e-6)


def test_the_schedule_is_multiplied_by_the_scale_of_a_group(build: Callable[..., Trainer], tmp_path: Path) -> None:
    model, plain = line_model(), line_model()
    optimizers = [
        torch.optim.SGD([{"params": [each.weight], "lr_scale": 0.25}, {"params": [each.bias]}], lr=1.0)
        for each in (model, plain)
    ]
    build(model=model, optimizer=optimizers[0], max_grad_norm=None).fit()
    for step in range(6):
        for group, scale in zip(optimizers[1].param_groups, (0.25, 1.0), strict=True):
            group["lr"] = scale * 0.1 / (step + 1)
        optimizers[1].zero_grad()
        (SquaredError()(plain, Line()(step))[0] / 3).backward()
        optimizers[1].step()
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-6, atol=1e-7)
    assert rows(tmp_path)[1]["train/learning_rate"] == 0.1, "that of the schedule"


def test_extremes_are_told_by_their_names_but_rewards_are_called_what_users_call_them() -> None:
    named = ("ratio_max", "router/share_min", "align/reward/length_max")
    totals = Totals({})
    for value in (3.0, 5.0):
        totals.add({name: (torch.tensor(value), torch.tensor(1.0)) for name in named})
    values = as_numbers(totals.sums, ALONE)
    assert values == {"train/ratio_max": 5.0, "router/share_min": 3.0, "align/reward/length_max": 4.0}


def test_a_group_whose_first_step_is_to_come_does_not_even_decay(build: Callable[..., Trainer]) -> None:
    model = line_model()
    before, later = model.weight.detach().clone(), {"params": [model.weight], "first_step": 5}
    optimizer = torch.optim.AdamW([later, {"params": [model.bias]}], lr=1.0, weight_decay=0.5)
    build(model=model, optimizer=optimizer, steps=5).fit()
    assert torch.equal(model.weight, before)
    assert not torch.equal(model.bias, line_model().bias)
    build(model=model, optimizer=optimizer, steps=6).fit()
    assert not torch.equal(model.weight, before)


def test_loss_is_divided_by_what_counts_in_the_whole_batch(build: Callable[..., Trainer]) -> None:
    # the weights stand in the first micro-batch alone: a mean of means would come out at a quarter
    gradients = []
    for micro in (1, 2, 8, None):
        trainer = build(micro_batch_rows=micro, max_grad_norm=None)
        step = trainer.optimizer.step
        trainer.optimizer.step = lambda trainer=trainer, step=step: (
            gradients.append(trainer.model.weight.grad.clone()),
            step(),
        )
        trainer.updates()(0, trainer.batches(0))
    assert len(gradients) == 4
    for gradient in gradients:
        torch.testing.assert_close(gradient, gradients[-1], rtol=1e-6, atol=1e-7)
    assert gradients[-1].abs().min() > 1e-3


def test_a_batch_is_good_for_as_many_updates_as_it_says(build: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer = build(steps=2, batches=Line(repeats=3))
    count = []
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda: (count.append(1), step())
    trainer.fit()
    assert len(count) == 6
    assert trainer.batches.asked == [0, 1]


@pytest.mark.parametrize(
    ("steps", "every", "shown"),
    [(5, None, [1, 2, 3, 4, 5]), (25, None, [1, 3, 6, 9, 12, 15, 18, 21, 24, 25]), (9, 4, [1, 4, 8, 9])],
)
def test_samples_are_kept_at_some_steps_in_the_order_of_rows(
    build: Callable[..., Trainer], tmp_path: Path, steps: int, every: int | None, shown: list[int]
) -> None:
    class Shown(Line):
        def __call__(self, step: int) -> Points:
            return dataclasses.replace(super().__call__(step), samples=[{"row": 5, "of": step}, {"row": 2, "of": step}])

    build(steps=steps, batches=Shown(), tracking=TrackerConfig(samples_every_steps=every)).fit()
    assert read_samples(tmp_path) == [
        {"step": step, "row": row, "of": step - 1} for step in shown for row in (2, 5)
    ]  # fmt: skip


def test_batches_that_nothing_is_shown_of_leave_no_file(build: Callable[..., Trainer], tmp_path: Path) -> None:
    build(steps=3).fit()
    assert not (tmp_path / "rollouts.jsonl").exists()


@pytest.mark.parametrize(("every", "measured"), [(None, [0, 5]), (2, [0, 2, 4, 5])])
def test_first_and_last_step_are_always_measured(
    build: Callable[..., Trainer], tmp_path: Path, every: int | None, measured: list[int]
) -> None:
    modes = []
    trainer = build(steps=5, eval_every=every)
    trainer.evaluators = [lambda: modes.append(trainer.model.training) or {"eval/loss": 1.0}]
    trainer.fit()
    assert [step for step, row in rows(tmp_path).items() if "eval/loss" in row] == measured
    assert modes == [False] * len(measured)
    assert trainer.model.training


@pytest.mark.parametrize(
    ("checkpoint", "kept"),
    [
        ({}, [7]),
        ({"every_steps": 2}, [6, 7]),
        ({"every_steps": 2, "keep_last": 10}, [2, 4, 6, 7]),
        ({"every_steps": 1, "keep_last": 1, "keep_best": 2, "best_metric": "eval/loss"}, [3, 4, 7]),
        ({"every_steps": 1, "keep_last": 2, "keep_best": 1, "best_metric": "eval/loss", "best_mode": "max"}, [1, 6, 7]),
    ],
)
def test_what_is_saved_and_kept(
    build: Callable[..., Trainer], tmp_path: Path, checkpoint: dict[str, Any], kept: list[int]
) -> None:
    losses = iter([9.0, 5.0, 4.0, 1.0, 2.0, 3.0, 3.5, 3.2])
    trainer = build(steps=7, eval_every=1, checkpoint=checkpoint, evaluators=[lambda: {"eval/loss": next(losses)}])
    trainer.fit()
    assert saved(tmp_path) == kept


def test_minutes_count_from_the_last_save(
    build: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10_000, 20))  # the loop looks at it once a step and once a save: 20 s each
    monkeypatch.setattr(saving, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    build(steps=9, checkpoint={"every_minutes": 1.0, "keep_last": 10}).fit()
    assert saved(tmp_path) == [3, 6, 9]


def test_a_run_goes_on_where_it_stopped(build: Callable[..., Trainer], tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    class Fragile(Line):
        def __call__(self, step: int) -> Points:
            if step == 5:
                raise Stop
            return super().__call__(step)

    whole = build()
    whole.fit()
    expected = whole.model.weight.detach().clone()
    (tmp_path / "metrics.jsonl").unlink()
    for path in (tmp_path / "checkpoints").glob("step-*"):
        path.rename(tmp_path / path.name)

    stopped = build(checkpoint={"every_steps": 2}, batches=Fragile())
    with pytest.raises(Stop):
        stopped.fit()
    again = build(checkpoint={"every_steps": 2})
    again.fit()
    assert again.batches.asked == [4, 5]
    assert torch.equal(again.model.weight, expected)
    assert list(rows(tmp_path)) == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_is_not_trained_further(build: Callable[..., Trainer]) -> None:
    build().fit()
    again = build()
    again.fit()
    assert again.batches.asked == []


# --- the best checkpoint ---


def bests(build: Callable[..., Trainer], losses: list[float], **checkpoint: Any) -> tuple[Trainer, int]:
    """A run whose evaluations are `losses`, and the step that it ends with."""
    told = iter(losses)
    keep = {"every_steps": 1, "keep_last": 1, "final": "best", "best_metric": "eval/loss"} | checkpoint
    trainer = build(steps=5, eval_every=1, checkpoint=keep, evaluators=[lambda: {"eval/loss": next(told)}])
    return trainer, trainer.fit()


@pytest.mark.parametrize(
    ("losses", "mode", "best", "flat"),
    [
        ([9.0, 0.0, 0.0, 0.0, 0.0, 0.0], "max", 5, True),
        ([9.0, 0.0, 0.0, 0.0, 0.0, 0.0], "min", 5, True),
        ([9.0, 0.0, 1.0, 1.0, 1.0, 1.0], "max", 5, False),
        ([9.0, 1.0, 0.0, 0.0, 1.0, 1.0], "min", 3, False),
    ],
)
def test_of_equal_checkpoints_the_latest_is_handed_on_and_a_score_that_is_flat_is_told(
    build: Callable[..., Trainer], losses: list[float], mode: str, best: int, flat: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert bests(build, losses, best_mode=mode)[1] == best
    said = capsys.readouterr().err
    assert ("the same at every measurement: it tells none apart, so the latest is taken" in said) is flat


@pytest.mark.parametrize(("mode", "best"), [("min", 3), ("max", 2)])
def test_a_run_ends_with_the_weights_that_measured_best(
    build: Callable[..., Trainer], tmp_path: Path, mode: str, best: int, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, step = bests(build, [9.0, 5.0, 8.0, 1.0, 2.0, 1.5], best_mode=mode)
    assert step == best
    assert saved(tmp_path) == [best, 5]
    kept = checkpoints.read_model(tmp_path / "checkpoints" / f"step-{best:08d}")
    last = checkpoints.read_model(tmp_path / "checkpoints" / "step-00000005")
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, kept[name])
        assert not torch.equal(value, last[name])
    assert f"best by eval/loss: step {best}" in capsys.readouterr().err


def test_a_run_that_was_killed_after_its_last_step_ends_with_the_best_weights_too(
    build: Callable[..., Trainer], tmp_path: Path
) -> None:
    trainer, _ = bests(build, [9.0, 5.0, 8.0, 1.0, 2.0, 4.0])
    again, step = bests(build, [])
    assert step == 3
    assert all(torch.equal(value, trainer.model.state_dict()[name]) for name, value in again.model.state_dict().items())


def test_a_best_checkpoint_that_is_damaged_is_named_and_the_next_one_taken(
    build: Callable[..., Trainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bests(build, [9.0, 5.0, 8.0, 1.0, 2.0, 4.0], keep_best=2)
    path = next((tmp_path / "checkpoints" / "step-00000003" / "state").iterdir())
    path.write_bytes(path.read_bytes()[:-1])
    assert bests(build, [], keep_best=2)[1] == 4
    assert "step-00000003 is passed over" in capsys.readouterr().err


def test_by_default_a_run_ends_with_its_last_weights(build: Callable[..., Trainer]) -> None:
    assert bests(build, [9.0, 5.0, 8.0, 1.0, 2.0, 4.0], final="last")[1] == 5


@pytest.mark.parametrize(
    "parts",
    [{"checkpoint": {"best_metric": "eval/los", "keep_best": 1}}, {"health": HealthConfig(held_out_metric="eval/los")}],
)
def test_a_metric_that_is_not_measured_is_told_at_the_start(
    build: Callable[..., Trainer], parts: dict[str, Any]
) -> None:
    trainer = build(eval_every=2, evaluators=[lambda: {"eval/loss": 1.0, "eval/exact_match": 0.5}], **parts)
    with pytest.raises(UserError, match=r"=eval/los is not measured in this run; it measures eval/exact_match, eval/l"):
        trainer.fit()
    assert trainer.batches.asked == []


def test_averages_are_measured_saved_and_handed_on_and_change_no_step(
    build: Callable[..., Trainer], tmp_path: Path
) -> None:
    def train(name: str, steps: int = 6, **parts: Any) -> tuple[Trainer, list[Tensor]]:
        seen: list[Tensor] = []
        (tmp_path / name).mkdir(exist_ok=True)
        found = checkpoints.newest_good(tmp_path / name / "checkpoints", ALONE, print)
        trainer = build(steps=steps, eval_every=1, folder=tmp_path / name, resume_from=found, **parts)
        trainer.evaluators = [lambda: (seen.append(trainer.model.weight.detach().clone()), {"eval/loss": 1.0})[1]]
        trainer.fit()
        return trainer, seen

    plain, weights = train("plain")
    averaged, averages = train("averaged", ema_decay=0.75)
    mean = weights[0]
    for weight, average in zip(weights, averages, strict=True):
        mean = 0.75 * mean + 0.25 * weight
        torch.testing.assert_close(average, mean, rtol=1e-6, atol=1e-7)
    assert torch.equal(averaged.model.weight, averages[-1])
    folder = tmp_path / "averaged" / "checkpoints" / "step-00000006"
    assert torch.equal(checkpoints.read_model(folder)["weight"], averages[-1])
    state = {"model.weight": torch.zeros(1, 3)}
    checkpoints.load(checkpoints.read(folder), state, ALONE)
    assert torch.equal(state["model.weight"], plain.model.weight), "training itself is as it was"

    class Killed(Line):
        def __call__(self, step: int) -> Points:
            assert step < 4, "killed"
            return super().__call__(step)

    with pytest.raises(AssertionError, match="killed"):
        train("killed", ema_decay=0.75, batches=Killed(), checkpoint={"every_steps": 3})
    resumed, _ = train("killed", ema_decay=0.75)
    assert torch.equal(resumed.model.weight, averages[-1])


# --- warnings ---


class Truncating(Line):
    """A rollout whose answers are cut off from step `begin` on."""

    def __init__(self, begin: int = 0, end: int = 99) -> None:
        super().__init__()
        self.begin, self.end = begin, end

    def __call__(self, step: int) -> Points:
        assert step < self.end, "killed"
        share = 1.0 if step >= self.begin else 0.0
        points = super().__call__(step)
        return Cut(points.x, points.y, points.counts, points.repeats, share)


@dataclasses.dataclass(frozen=True)
class Cut(Points):
    share: float = 0.0

    def metrics(self) -> Metrics:
        return {"align/unfinished": (torch.tensor(self.share), torch.ones(()))}


def test_a_warning_is_said_once_and_kept(
    build: Callable[..., Trainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(steps=12, batches=Truncating()).fit()
    errors = capsys.readouterr().err
    assert errors.count("warning at step 5 (health.truncated): 100% of the answers are cut off") == 1
    assert errors.count("warning") == 1
    assert [(each.step, each.rule) for each in read_warnings(tmp_path)] == [(5, "truncated")]


def test_a_killed_run_is_not_warned_again(
    build: Callable[..., Trainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for end in (4, 7):  # before and after the warning
        with pytest.raises(AssertionError, match="killed"):
            build(steps=12, batches=Truncating(end=end), checkpoint={"every_steps": 3}).fit()
    assert capsys.readouterr().err.count("warning at step 5") == 1
    build(steps=12, batches=Truncating(), checkpoint={"every_steps": 3}).fit()
    assert "warning" not in capsys.readouterr().err
    assert [(each.step, each.rule) for each in read_warnings(tmp_path)] == [(5, "truncated")]


def test_a_run_stops_for_a_warning_that_stop_on_names(build: Callable[..., Trainer], tmp_path: Path) -> None:
    stopping = {"steps": 12, "health": HealthConfig(stop_on=["kl", "truncated"])}
    message = r"stopped after step 6 of 12.*noticed at step 6: .*cut off.*without truncated in health.stop_on goes on"
    with pytest.raises(UserError, match=message):
        build(batches=Truncating(begin=1), **stopping).fit()
    assert saved(tmp_path) == [6]
    with pytest.raises(UserError, match="stopped after step 6 of 12"):
        build(batches=Truncating(begin=1), **stopping).fit()
    going_on = build(batches=Truncating(begin=1), steps=12)
    going_on.fit()
    assert going_on.batches.asked == list(range(6, 12))
