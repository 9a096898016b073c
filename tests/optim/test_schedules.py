"""The learning rate of each step, by hand and against Transformers' schedules where the definitions agree."""

import math

import pytest
import torch

from llmtrain.config.errors import ConfigError
from llmtrain.config.schema import ScheduleConfig
from llmtrain.optim.schedules import SHAPES, learning_rate

PEAK = 3e-4


def rates(config: ScheduleConfig, steps: int) -> list[float]:
    return [learning_rate(step, peak=PEAK, total_steps=steps, config=config) for step in range(steps)]


def theirs(name: str, steps: int, **options) -> list[float]:
    optimization = pytest.importorskip("transformers.optimization")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = getattr(optimization, name)(optimizer, **options)
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


CASES = [
    ({"name": "cosine", "min_lr_ratio": 0.0}, "get_cosine_schedule_with_warmup", {"num_training_steps": 60}),
    ({"name": "cosine"}, "get_cosine_with_min_lr_schedule_with_warmup", {"num_training_steps": 60, "min_lr_rate": 0.1}),
    ({"name": "linear"}, "get_linear_schedule_with_warmup", {"num_training_steps": 60}),
    ({"name": "constant"}, "get_constant_schedule_with_warmup", {}),
    (
        {"name": "wsd", "min_lr_ratio": 0.2, "decay_steps": 15},
        "get_wsd_schedule",
        {"num_training_steps": 60, "num_decay_steps": 15, "decay_type": "linear", "min_lr_ratio": 0.2},
    ),
]
# Without a warm-up ours has no time scale, and theirs assumes one of 10,000 steps.
WITH_WARMUP_ONLY = [({"name": "inverse_sqrt"}, "get_inverse_sqrt_schedule", {})]


@pytest.mark.parametrize(
    ("warmup", "config", "name", "options"),
    [(0, *case) for case in CASES] + [(10, *case) for case in CASES + WITH_WARMUP_ONLY],
)
def test_after_the_warmup_like_transformers(warmup, config, name, options):
    """The rise differs: theirs starts at 0, so that their first step does nothing."""
    found = rates(ScheduleConfig(warmup_steps=warmup, **config), 60)
    wanted = theirs(name, 60, num_warmup_steps=warmup, **options)
    assert found[warmup:] == pytest.approx(wanted[warmup:], rel=1e-9)


@pytest.mark.parametrize("name", SHAPES)
def test_rises_to_the_peak_and_never_beyond(name):
    found = rates(ScheduleConfig(name=name, warmup_steps=4), 40)
    assert found[:5] == pytest.approx([PEAK * share / 5 for share in (1, 2, 3, 4, 5)])
    assert all(0 < rate <= PEAK * (1 + 1e-12) for rate in found)
    assert found[4:] == sorted(found[4:], reverse=True)


@pytest.mark.parametrize(("name", "ratio"), [("cosine", 0.1), ("linear", 0.0), ("wsd", 0.0)])
def test_last_value_by_default(name, ratio):
    at_the_end = learning_rate(50, peak=PEAK, total_steps=50, config=ScheduleConfig(name=name, warmup_steps=5))
    assert at_the_end == pytest.approx(PEAK * ratio, abs=1e-18)


def test_wsd_decays_over_the_last_fifth_by_default():
    found = rates(ScheduleConfig(name="wsd"), 50)
    assert found[:41] == [PEAK] * 41
    assert found[45] == pytest.approx(PEAK / 2)


def test_halfway_down_the_cosine():
    found = learning_rate(30, peak=1.0, total_steps=40, config=ScheduleConfig(name="cosine", warmup_steps=20))
    assert found == pytest.approx(0.55)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_very_short_runs(name, steps):
    """A trial of a few steps works with any schedule, even where it ends within the warm-up."""
    for warmup in (1, 2, 5):
        assert all(
            math.isfinite(rate) and rate > 0 for rate in rates(ScheduleConfig(name=name, warmup_steps=warmup), steps)
        )


def test_decay_that_does_not_fit_is_refused():
    config = ScheduleConfig(name="wsd", warmup_steps=10, decay_steps=95)
    with pytest.raises(ConfigError, match=r"decay_steps=95 and schedule.warmup_steps=10 do not fit into 100 steps"):
        learning_rate(10, peak=PEAK, total_steps=100, config=config)


def test_inverse_sqrt_without_warmup_is_refused():
    with pytest.raises(ConfigError, match=r"schedule\.warmup_steps"):
        learning_rate(0, peak=PEAK, total_steps=100, config=ScheduleConfig(name="inverse_sqrt"))
