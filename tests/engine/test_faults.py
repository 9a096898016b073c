"""Steps that go wrong, each fault injected: what is left out, what is said, and that a resumed run does the same."""

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.test_trainer import Line, Points, SquaredError, line_model, rows, saved
from torch import Tensor, nn

from llmtrain.config.errors import UserError
from llmtrain.config.schema import CheckpointConfig, EngineConfig, EvalConfig, HealthConfig, TrackerConfig
from llmtrain.engine import checkpoints
from llmtrain.engine.distributed import arrange, be_deterministic, full_state, join, leave, spread
from llmtrain.engine.faults import Guard
from llmtrain.engine.launching import launch
from llmtrain.engine.micro_batches import FoundRows
from llmtrain.engine.speed import Speed
from llmtrain.engine.tracking import Tracker, read_faults
from llmtrain.engine.trainer import Trainer
from llmtrain.objectives.batch import Metrics

Build = Callable[..., Trainer]


class Faulty(Line):
    """Points on a line; at some steps (from 0) their targets or their loss are not what they should be."""

    def __init__(self, faults: dict[int, str], stop_at: int | None = None) -> None:
        super().__init__()
        self.faults, self.stop_at = faults, stop_at

    def __call__(self, step: int) -> Points:
        if step == self.stop_at:
            raise Killed
        batch = super().__call__(step)
        wrong = {"nan": math.nan, "inf": math.inf, "spike": 1e3}.get(self.faults.get(step, ""))
        return batch if wrong is None else Points(batch.x, batch.y + wrong, batch.counts)


class Killed(Exception):
    pass


class Overflowing(SquaredError):
    """The loss stays finite, its gradient does not."""

    def __call__(self, model: nn.Module, batch: Points) -> tuple[Tensor, Metrics]:
        loss, metrics = super().__call__(model, batch)
        infinite = torch.sqrt(model.bias.sum() * 0)  # 0, with the slope 0 * inf
        return loss + infinite, metrics


def plain(steps: int, left_out: set[int]) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A plain loop in which some steps do nothing."""
    model, batches, objective = line_model(), Line(), SquaredError()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        if step not in left_out:
            optimizer.zero_grad()
            (objective(model, batches(step))[0] / 3).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return model, optimizer


def state(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer._state().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name].nan_to_num(7.0), value.nan_to_num(7.0)), name


@pytest.mark.parametrize("fault", ["nan", "inf"])
def test_a_step_that_is_not_finite_is_as_if_it_had_not_been(
    build: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    trainer = build(batches=Faulty({3: fault}), rows_of=lambda step: {"line": [8 * step, 8 * step + 1]})
    trainer.fit()
    model, optimizer = plain(6, {3})
    assert torch.equal(trainer.model.weight, model.weight)
    for parameter, other in zip(trainer.model.parameters(), model.parameters(), strict=True):
        for key, value in optimizer.state[other].items():
            assert torch.equal(trainer.optimizer.state[parameter][key], value), key
    written = rows(tmp_path)
    assert [written[step].get("train/skipped_steps") for step in range(1, 7)] == [None, None, None, 1.0, 1.0, 1.0]
    assert "train/loss" not in written[4]
    assert all(math.isfinite(value) for row in written.values() for value in row.values())
    [row] = read_faults(tmp_path)
    assert (row["step"], row["kind"], row["remedy"], row["rows"]) == (4, "not_finite", "skip", {"line": [24, 25]})
    said = capsys.readouterr().err
    assert "step 4: train/loss and train/grad_norm became nan; the update was not made." in said
    assert "faults.jsonl: llmtrain show run=r step=4" in said


def test_a_finite_loss_whose_gradient_is_not_is_left_out_too(
    build: Build, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    trainer = build(objective=Overflowing(), steps=2, health=HealthConfig(max_skipped_in_a_row=5))
    with pytest.raises(UserError, match=r"step 2: train/grad_norm became nan, the 2\. in a row; stopped before"):
        trainer.fit()
    assert torch.equal(trainer.model.weight, line_model().weight)


@pytest.mark.parametrize(("limit", "steps", "stopped"), [(0, 6, 3), (2, 9, 5), (10, 3, None)])
def test_too_many_in_a_row_end_the_run(
    build: Build, tmp_path: Path, limit: int, steps: int, stopped: int | None
) -> None:  # fmt: skip
    every = dict.fromkeys(range(2, 9), "nan")
    trainer = build(
        batches=Faulty(every),
        steps=steps,
        checkpoint={"every_steps": 1},
        health=HealthConfig(max_skipped_in_a_row=limit),
    )
    if stopped is None:
        trainer.fit()  # a single one, at the end
        return
    with pytest.raises(UserError, match=rf"step {stopped}: train/loss and .* became nan.*optimizer\.lr"):
        trainer.fit()
    assert saved(tmp_path)[-1] == stopped - 1
    assert [row["remedy"] for row in read_faults(tmp_path)] == ["skip"] * limit + ["give_up"]


def test_a_run_in_which_no_update_can_be_made_does_not_end_well(build: Build) -> None:
    with pytest.raises(UserError, match=r"step 3: .* the 3\. in a row"):
        build(batches=Faulty(dict.fromkeys(range(3), "nan")), steps=3).fit()


def test_what_adapts_is_told_whether_the_update_was_made(build: Build) -> None:
    told: list[bool] = []
    build(batches=Faulty({1: "nan"}), steps=3, after_update=lambda is_made: told.append(is_made) or {}).fit()
    assert told == [True, False, True]


SPIKES = {20: "spike", 27: "spike", 28: "nan"}


def spiky(remedy: str | None, **more: Any) -> dict[str, Any]:
    """A run whose rows are bad at some steps, once there are enough steps to know what is usual."""
    health = HealthConfig(on_spike=remedy, spike_window=12, spike_deviations=8.0, **more)
    return {"batches": Faulty(SPIKES), "steps": 32, "checkpoint": {"every_steps": 8}, "health": health}


@pytest.mark.parametrize("remedy", ["warn", "skip"])
def test_a_spike_is_named_and_left_out_where_that_is_asked_for(
    build: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str], remedy: str
) -> None:
    trainer = build(**spiky(remedy))
    trainer.fit()
    left_out = {20, 27, 28} if remedy == "skip" else {28}
    found = [(row["step"], row["kind"], row["remedy"]) for row in read_faults(tmp_path)]
    assert (21, "spike", remedy) in found
    assert (29, "not_finite", "skip") in found
    said = capsys.readouterr().err
    assert "step 21: train/loss jumped to " in said
    assert "over 12 updates; train/grad_norm jumped" in said
    assert rows(tmp_path)[32]["train/skipped_steps"] == len(left_out)
    if remedy == "skip":
        assert len(found) == 3
        assert torch.equal(trainer.model.weight, plain(32, left_out)[0].weight)


def test_by_default_nothing_is_a_spike(build: Build, tmp_path: Path) -> None:
    build(batches=Faulty({20: "spike"}), steps=24).fit()
    assert read_faults(tmp_path) == []


def test_a_spike_ends_the_run_where_that_is_asked_for_and_skipping_goes_on(build: Build, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step 21: train/loss jumped.*The same command with health.on_spike=skip"):
        build(**spiky("stop")).fit()
    assert saved(tmp_path) == [8, 16]
    again = build(**spiky("skip"))
    again.fit()
    assert again.batches.asked[0] == 16
    assert torch.equal(again.model.weight, plain(32, {20, 27, 28})[0].weight)
    assert [row["remedy"] for row in read_faults(tmp_path)] == ["skip"] * 3


def test_going_back_takes_the_state_of_the_checkpoint_and_leaves_out_the_rows_since(
    build: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = build(**spiky("rollback"))
    trainer.fit()
    # 16 is the checkpoint before the first spike, 24 that before the second
    model, optimizer = plain(32, {*range(16, 21), *range(24, 28), 28})
    assert torch.equal(trainer.model.weight, model.weight)
    assert torch.equal(
        trainer.optimizer.state[trainer.model.weight]["exp_avg_sq"], optimizer.state[model.weight]["exp_avg_sq"]
    )
    assert rows(tmp_path)[32]["train/skipped_steps"] == 5 + 4 + 1
    assert [row.get("back_to") for row in read_faults(tmp_path)] == [16, 24, None]
    assert "went back to the checkpoint of step 16; the rows since then are left out." in capsys.readouterr().err


def test_before_the_first_checkpoint_a_spike_is_only_left_out(
    build: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = build(**spiky("rollback") | {"checkpoint": {"every_steps": 30}, "batches": Faulty({20: "spike"})})
    trainer.fit()
    assert torch.equal(trainer.model.weight, plain(32, {20})[0].weight)
    assert "there is no checkpoint to go back to yet" in capsys.readouterr().err


def test_a_checkpoint_that_always_leads_to_a_spike_ends_the_run(build: Build) -> None:
    batches = Faulty(dict.fromkeys(range(18, 40, 2), "spike"))
    with pytest.raises(UserError, match=r"step 23: .*step-00000016 was gone back to more often than"):
        build(**spiky("rollback", max_skipped_in_a_row=2) | {"batches": batches}).fit()


def without_speed(folder: Path) -> dict[int, dict[str, float]]:
    """The rows of metrics, but for what the clock says."""
    return {
        step: {name: value for name, value in row.items() if not name.startswith("perf/")}
        for step, row in rows(folder).items()
    }


@pytest.mark.parametrize("remedy", ["skip", "rollback"])
@pytest.mark.parametrize("killed_at", [18, 22, 26, 30])
def test_a_killed_run_leaves_out_what_it_would_have_left_out(
    build: Build, tmp_path: Path, remedy: str, killed_at: int
) -> None:
    whole = build(**spiky(remedy))
    whole.fit()
    expected, faults, metrics = state(whole), (tmp_path / "faults.jsonl").read_bytes(), without_speed(tmp_path)
    (tmp_path / "checkpoints").rename(tmp_path / "others")
    with pytest.raises(Killed):
        build(**spiky(remedy) | {"batches": Faulty(SPIKES, stop_at=killed_at)}).fit()
    again = build(**spiky(remedy))
    again.fit()
    assert again.batches.asked[0] == killed_at // 8 * 8
    assert_same(state(again), expected)
    assert (tmp_path / "faults.jsonl").read_bytes() == faults
    assert without_speed(tmp_path) == metrics


def test_checkpoints_of_older_runs_and_of_other_windows_are_gone_on_from(build: Build, tmp_path: Path) -> None:
    options = spiky("skip") | {"batches": Line(), "steps": 8}
    build(**options).fit()
    folder = tmp_path / "checkpoints" / "step-00000008"
    known = checkpoints.sizes(checkpoints.read(folder))
    assert {name for name in known if "guard" in name} == {
        f"state.guard.{name}" for name in ("skipped", "in_a_row", "returns", "losses", "norms")
    }
    wider = HealthConfig(on_spike="skip", spike_window=20)
    again = build(**options | {"steps": 9, "health": wider})
    again.fit()
    assert int(again.guard.losses.isfinite().sum()) == 1, "the others had another window"


def test_the_median_and_its_distances_are_those_of_the_last_updates() -> None:
    guard = Guard(HealthConfig(on_spike="warn", spike_window=8, spike_deviations=5.0), steps=100)
    values = [2.0, 2.1, 1.9, 2.05, 1.95, 2.2, 1.8, 2.0]
    for value in values:
        assert guard.judge(value, 1.0) is None
    # median 2.0, distances 0, .1, .1, .05, .05, .2, .2, 0: their median is 0.075, of which 1.4826 · 5 are 0.556
    assert guard.judge(2.0 + 0.55, 1.0) is None
    guard = Guard(HealthConfig(on_spike="warn", spike_window=8, spike_deviations=5.0), steps=100)
    for value in values:
        guard.judge(value, 1.0)
    fault = guard.judge(2.0 + 0.56, 1.0)
    assert fault is not None
    assert fault.text == "train/loss jumped to 2.56, from 2 ± 0.11 over 8 updates"
    # the norm has no spread: only a doubling of it is a spike
    assert guard.judge(2.0, 1.9) is None
    assert guard.judge(2.0, 2.1).text.startswith("train/grad_norm jumped to 2.1")


@pytest.fixture
def deterministic() -> Iterator[None]:
    """torch as `engine.deterministic` sets it, and afterwards as it was."""
    fill, environment = torch.utils.deterministic.fill_uninitialized_memory, dict(os.environ)
    be_deterministic()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    os.environ.clear()
    os.environ.update(environment)


@pytest.mark.usefixtures("deterministic")
def test_an_operation_that_has_no_deterministic_form_ends_the_run_in_words(build: Build) -> None:
    class Drawn(SquaredError):
        def __call__(self, model: nn.Module, batch: Points) -> tuple[Tensor, Metrics]:
            torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))  # torch has no such form of it
            return super().__call__(model, batch)

    with pytest.raises(UserError, match=r"engine\.deterministic: put_ does not have a deterministic impl.*to false"):
        build(objective=Drawn()).fit()


@pytest.mark.usefixtures("deterministic")
def test_sums_at_repeated_indices_have_the_same_bits_each_time() -> None:
    index, values = torch.randint(0, 8, (4000,)), torch.randn(4000, 64)
    first, *others = (torch.zeros(8, 64).index_put_((index,), values, accumulate=True) for _ in range(5))
    assert all(torch.equal(first, each) for each in others)


def nan_on_one_process(folder: Path) -> None:
    """Two processes with rows of their own, of which one has a row that is no number at step 2 (from 0)."""
    layout = join("cpu")

    class Own(Faulty):
        def __call__(self, step: int) -> Points:
            batch = super().__call__(step)
            return batch[layout.rank * 4 : layout.rank * 4 + 4]

    for sharding in ("ddp", "fsdp"):
        torch.manual_seed(0)
        model = spread(nn.Linear(3, 1), arrange(layout, EngineConfig(sharding=sharding)))
        tracker = Tracker(folder / sharding, TrackerConfig(), steps=4, is_main=layout.is_main, run="r", run_config={})
        trainer = Trainer(
            folder=folder / sharding, layout=layout, model=model, objective=SquaredError(),
            batches=Own({2: "nan"} if layout.rank == 1 else {}),
            optimizer=torch.optim.AdamW(model.parameters(), lr=1.0), learning_rate=lambda step: 0.1 / (step + 1),
            steps=4, seed=0, tracker=tracker, checkpoint=CheckpointConfig(), eval=EvalConfig(),
            tracking=TrackerConfig(), extra=lambda step: lambda folder: None, speed=Speed(layout.device, 1.0, 1.0),
            autocast=lambda: torch.autocast("cpu", enabled=False),
            # on the way: powers of two change nothing, and neither do rows that are found
            scale_loss=True, micro_batch_rows=FoundRows(folder / sharding, layout),
        )  # fmt: skip
        trainer.fit()
        assert trainer.micro_batch_rows.at(0) == 4
        assert float(trainer.loss_scale.scale) == 2.0**16
        state = full_state(model)
        if layout.is_main:
            torch.save(state, folder / f"{sharding}.pt")
        assert int(trainer.guard.skipped) == 1
    leave()


def test_what_one_process_sees_all_leave_out(tmp_path: Path) -> None:
    launch(nan_on_one_process, (tmp_path,), 2)
    expected = plain(4, {2})[0].state_dict()
    for sharding in ("ddp", "fsdp"):
        found = torch.load(tmp_path / f"{sharding}.pt", weights_only=True)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)
        assert [row["step"] for row in read_faults(tmp_path / sharding)] == [3]
