"""Warnings: silent on runs that are well, once and in words on each illness, the same after a resume."""

import json
import math
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args

import pytest

from llmtrain.config.schema import HealthConfig
from llmtrain.config.schema.health import Rule
from llmtrain.engine.health import RULES, WARNINGS_FILE, Health, HealthWarning, read_warnings

RECORDED = json.loads(Path(__file__).with_name("recorded_ppo.json").read_text())
Rows = list[dict[str, float]]


def warnings(rows: Iterable[dict[str, Any]], folder: Path, **options: Any) -> list[HealthWarning]:
    """What a run with these rows is warned of."""
    kept = {name: options.pop(name) for name in ("best_metric", "best_mode") if name in options}
    health = Health(folder, HealthConfig(**options), **kept)
    health.start()
    return [warning for row in rows for warning in health.row(int(row["step"]), row)]


def rollouts(count: int, **metrics: Any) -> Rows:
    """Rows of reinforcement learning that is well, with some metrics as functions of the step or numbers."""
    usual = {
        "align/reward": lambda step: 0.5 + 0.01 * step, "align/kl": 1.0, "align/answer_tokens": 20.0,
        "align/unfinished": 0.1, "align/explained_variance": 0.4, "align/flat_groups": 0.3, "train/entropy": 0.4,
        "train/clip_fraction": 0.05, "align/updates": 1.0, "train/loss": 0.1, "train/grad_norm": 0.5,
    }  # fmt: skip
    given = usual | {name.replace("__", "/"): value for name, value in metrics.items()}
    return [
        {"step": step} | {name: value(step) if callable(value) else value for name, value in given.items()}
        for step in range(1, count + 1)
    ]


def losses(count: int, **metrics: Any) -> Rows:
    """Rows of a loss that falls with noise, some metrics replaced."""
    draw = random.Random(0)
    rows = []
    for step in range(1, count + 1):
        row = {"step": step, "train/loss": 2 + 5 / step + draw.gauss(0, 0.05), "train/grad_norm": 1.0}
        row["data/web/loss"] = row["train/loss"]
        changed = {name.replace("__", "/"): value for name, value in metrics.items()}
        rows.append(row | {name: value(step) if callable(value) else value for name, value in changed.items()})
    return rows


def test_every_key_has_its_rule() -> None:
    assert {*RULES, "overoptimised"} == set(get_args(Rule))
    of_steps = {"max_skipped_in_a_row", "on_spike", "spike_deviations", "spike_window"}  # read by engine/faults.py
    assert set(get_args(Rule)) | {"held_out_metric", "stop_on"} | of_steps == set(HealthConfig.__dataclass_fields__)


def test_runs_that_are_well_are_not_warned(tmp_path: Path) -> None:
    assert warnings(rollouts(200), tmp_path) == []
    assert warnings(losses(200), tmp_path) == []
    assert not (tmp_path / WARNINGS_FILE).exists()


ILL = {
    "kl": ({"align__kl": lambda step: 0.5 * step}, 23, "10.5 nats per answer away from its reference (limit 10)"),
    "entropy": ({"train__entropy": lambda step: 1 / (2 * step)}, 53, "entropy is 0.0098 nats per token"),
    "clip_fraction": ({"train__clip_fraction": 0.31}, 5, "31% of the ratios to the policy that"),
    "updates": ({"align__updates": lambda step: 0.5 if step > 10 else 1.0}, 13, "only 70% of the updates of a rollout"),
    "explained_variance": ({"align__explained_variance": -0.1}, 20, "-0.1 of the returns' variance (median of 20"),
    "truncated": ({"align__unfinished": 0.9}, 5, "90% of the answers are cut off"),
    "flat_groups": ({"align__flat_groups": 1.0}, 5, "in 100% of the groups all answers have one reward"),
    "length_growth": ({"align__answer_tokens": lambda step: 10.0 + step}, 19, "from 13 to 27 tokens while the reward"),
    "grad_norm": ({"train__grad_norm": 11.0}, 50, "the gradient's norm is 11 (median of 50 rows): training is about"),
}


@pytest.mark.parametrize("rule", ILL)
def test_an_illness_of_rollouts_is_told_once_in_words(rule: str, tmp_path: Path) -> None:
    metrics, step, words = ILL[rule]
    found = warnings(rollouts(120, **metrics), tmp_path)
    assert [(each.rule, each.step) for each in found] == [(rule, step)]
    assert words in found[0].text
    assert read_warnings(tmp_path) == found
    assert warnings(rollouts(120, **metrics), tmp_path / "off", **{rule: None}) == []


def test_a_limit_can_be_moved(tmp_path: Path) -> None:
    rows = rollouts(60, align__kl=4.0)
    assert warnings(rows, tmp_path) == []
    assert [each.rule for each in warnings(rows, tmp_path, kl=3.0)] == ["kl"]


@pytest.mark.parametrize("bad_steps", [[1], [1, 2, 3], [60]])
def test_single_rollouts_that_a_value_model_misjudges_are_no_illness(bad_steps: list[int], tmp_path: Path) -> None:
    explained = {"align__explained_variance": lambda step: -30.0 if step in bad_steps else 0.8}
    assert warnings(rollouts(120, **explained), tmp_path) == []


def test_longer_answers_without_more_reward_are_no_illness(tmp_path: Path) -> None:
    growing = {"align__answer_tokens": lambda step: 10.0 * step, "align__reward": lambda step: -step}
    assert warnings(rollouts(60, **growing), tmp_path) == []


@pytest.mark.parametrize(("height", "found"), [(2.3, []), (2.7, [("loss_spike", 151)]), (9.0, [("loss_spike", 151)])])
def test_a_jump_of_the_loss(height: float, found: list[tuple[str, int]], tmp_path: Path) -> None:
    rows = losses(200)
    rows[150]["train/loss"] = height
    assert [(each.rule, each.step) for each in warnings(rows, tmp_path)] == found


def test_the_loss_of_pairs_and_rollouts_may_jump(tmp_path: Path) -> None:
    pairs = [{name: value for name, value in row.items() if name != "data/web/loss"} for row in losses(200)]
    for rows in (pairs, rollouts(200)):
        rows[150]["train/loss"] = 50.0
        assert warnings(rows, tmp_path) == []


def test_a_gradient_that_has_gone(tmp_path: Path) -> None:
    [found] = warnings(losses(120, train__grad_norm=lambda step: 1.0 if step < 60 else 1e-5), tmp_path)
    assert (found.rule, found.step) == ("grad_norm", 85)  # the median of 50 rows needs 26 of them
    assert "hardly anything is learned" in found.text


def compared(
    margin: Callable[[int], float], *, seed: int = 0, rows: int = 400, rewards: str = "reward", **metrics: float
) -> Rows:
    """Rows of a method that learns from 32 given pairs a step, whose margins spread by 1 around that of the step."""
    draw, found = random.Random(seed), []
    for step in range(1, rows + 1):
        margins = [draw.gauss(margin(step), 1) for _ in range(32)]
        row = {"step": step, "train/margin": sum(margins) / 32, f"train/chosen_{rewards}": 0.0}
        found.append(row | {"train/accuracy": sum(each > 0 for each in margins) / 32} | metrics)
    return found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("start", [0.0, -0.5])
@pytest.mark.parametrize("loss", [math.log(2), 1.0, 25.0])
def test_pairs_that_are_not_told_apart(loss: float, start: float, seed: int, tmp_path: Path) -> None:
    """Whatever the loss is: IPO's and the hinge's start elsewhere than DPO's, and so it does beside a next-token loss.

    Without a reference the margin may start below 0.
    """
    rows = compared(lambda step: start, seed=seed, **{"train/loss": loss})
    [found] = warnings(rows, tmp_path)
    assert found.rule == "stuck_loss"
    assert found.step >= 100
    assert "optimizer.lr" in found.text
    assert warnings(rows, tmp_path, stuck_loss=None) == []


def test_a_margin_of_rounding_is_none(tmp_path: Path) -> None:
    rows = [{"step": step, "train/margin": 1e-9 * step, "train/accuracy": 0.3} for step in range(1, 121)]
    [found] = warnings(rows, tmp_path)
    assert (found.rule, found.step) == ("stuck_loss", 100)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "margin",
    [
        lambda step: 0.3 * (1 - math.exp(-step / 30)),  # an accuracy of 0.62 at the end
        lambda step: 0.8 * (1 - math.exp(-step / 300)),
        lambda step: -0.5 + 0.8 * (1 - math.exp(-step / 300)),  # below a half at the start
        lambda step: 0.3,  # told apart from the start
    ],
)
def test_pairs_that_are_told_apart_ever_better(margin: Callable[[int], float], seed: int, tmp_path: Path) -> None:
    loss = {"train/loss": math.log(2)}  # nearly that of the best policy, where labels are smoothed by 0.48
    assert warnings(compared(margin, seed=seed, rows=1000, **loss), tmp_path) == []


def test_sampled_pairs_and_single_answers_are_not_judged_as_given_pairs(tmp_path: Path) -> None:
    assert warnings(compared(lambda step: 0.0, **{"align/reward": 1.0}), tmp_path) == []
    single = [{name: row[name] for name in ("step", "train/accuracy")} for row in compared(lambda step: 0.0)]
    assert warnings(single, tmp_path) == []


@pytest.mark.parametrize(("rewards", "stage"), [("score", "reward"), ("reward", "align")])
def test_what_is_advised_for_pairs_belongs_to_the_stage(rewards: str, stage: str, tmp_path: Path) -> None:
    [found] = warnings(compared(lambda step: 0.0, rewards=rewards), tmp_path)
    assert f"llmtrain show stage={stage}" in found.text
    assert "method." not in found.text


def test_what_is_not_finite_is_passed_over(tmp_path: Path) -> None:
    rows = rollouts(40, align__kl=lambda step: math.nan if step % 2 else 1.0)
    assert warnings(rows, tmp_path) == []


# --- the over-optimised reward model ---


def test_recorded_runs_of_ppo(tmp_path: Path) -> None:
    """Seed 0's exact match fell from 0.898 to 0.808 (from 0.578 at the start) while its score rose; others rose."""
    [found] = warnings(RECORDED["seed 0"], tmp_path)
    assert (found.rule, found.step) == ("overoptimised", 24)
    assert "eval/exact_match went from 0.898 at step 8 to 0.808 while the reward rose from" in found.text
    assert "checkpoint.final=best" in found.text
    assert warnings(RECORDED["seed 1"], tmp_path) == []
    assert warnings(RECORDED["seed 2"], tmp_path) == []


def test_a_fast_fall_is_noticed_before_the_score_is_back_where_it_started(tmp_path: Path) -> None:
    """A trap as `benchmarks/alignment.py` sets it, recorded: from 59.4 to 86.2 %, four steps later below the start."""
    scores = (0.594, 0.594, 0.862, 0.838, 0.780, 0.636, 0.562)
    rewards = (0.416, 0.336, 0.317, 0.509, 0.784, 0.822, 0.975)
    rows: Rows = [{"step": 0, "eval/exact_match": 0.594}]
    for step, (score, reward) in enumerate(zip(scores, rewards, strict=True), start=1):
        rows.append({"step": step, "eval/exact_match": score, "align/reward": reward})
    [found] = warnings(rows, tmp_path)
    assert (found.rule, found.step) == ("overoptimised", 5)
    assert "from 0.862 at step 3 to 0.78 while the reward rose from 0.356 to 0.647" in found.text


def exploited(
    *, alpha: float, beta: float, start: float, noise: float, every: int, seed: int, steps: int = 400
) -> Rows:
    """A policy that leaves its reference at a steady pace, d = √KL, without a KL penalty.

    Gao et al. 2022 (arXiv 2210.10760), section 3.1: the gold score gains d (α − β ln d), the proxy goes on rising.
    Evaluated every `every` steps. KL stays within its limit, so that nothing but the scores can tell.
    """
    draw = random.Random(seed)
    rows: Rows = [{"step": 0, "eval/exact_match": start}]
    for step in range(1, steps + 1):
        d = 3 * step / steps
        row = {"step": step, "align/reward": d + draw.gauss(0, 0.05), "align/kl": d * d}
        if step % every == 0:
            row["eval/exact_match"] = start + gold_gain(d, alpha, beta) + draw.gauss(0, noise)
        rows.append(row)
    return rows


def gold_gain(d: float, alpha: float, beta: float) -> float:
    return d * (alpha - beta * math.log(d))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("every", [5, 20, 40])
@pytest.mark.parametrize(("alpha", "beta"), [(0.3, 0.4), (0.1, 0.2), (0.4, 1.5)])
def test_exploitation_is_noticed_before_the_gold_score_is_back_where_it_started(
    alpha: float, beta: float, every: int, seed: int, tmp_path: Path
) -> None:
    rows = exploited(alpha=alpha, beta=beta, start=0.5, noise=0.005, every=every, seed=seed)
    back = math.exp(alpha / beta) / 3 * 400  # the step at which the gain is 0 again
    peak = math.exp(alpha / beta - 1) / 3 * 400
    [found] = warnings(rows, tmp_path)
    assert found.rule == "overoptimised"
    assert peak < found.step < back


@pytest.mark.parametrize("seed", range(10))
def test_a_score_that_rises_or_stays_with_the_reward_is_well(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    rows = exploited(alpha=0.1, beta=0.0, start=0.5, noise=0.005, every=20, seed=seed)
    assert warnings(rows, tmp_path) == []
    for row in rows:  # all is learned early; the reward creeps up
        if "eval/exact_match" in row:
            row["eval/exact_match"] = 0.97 - 0.4 * math.exp(-row["step"] / 20) + draw.gauss(0, 0.005)
    assert warnings(rows, tmp_path) == []


def test_a_score_that_falls_with_the_reward_is_another_matter(tmp_path: Path) -> None:
    rows = exploited(alpha=0.3, beta=0.4, start=0.5, noise=0.0, every=20, seed=0)
    assert warnings([row | {"align/reward": -row["step"]} for row in rows], tmp_path) == []


def test_a_score_that_only_falls_is_noticed_at_the_first_loss_that_counts(tmp_path: Path) -> None:
    rows: Rows = [{"step": 0, "eval/gold": 2.0}]
    for step in range(1, 41):
        rows.append({"step": step, "align/reward": 0.1 * step})
        if step % 10 == 0:
            rows[-1]["eval/gold"] = 2.0 - 0.003 * step
    [found] = warnings(rows, tmp_path, held_out_metric="eval/gold")
    assert found.step == 20  # 1.94: more than 2 % below
    assert warnings(rows, tmp_path, held_out_metric="eval/gold", overoptimised=0.1) == []


def test_the_metric_that_ranks_checkpoints_is_the_held_out_score(tmp_path: Path) -> None:
    rows = exploited(alpha=0.3, beta=0.4, start=0.5, noise=0.0, every=20, seed=0)
    for row in rows:
        if "eval/exact_match" in row:
            row["eval/error"] = 1 - row.pop("eval/exact_match")
    assert warnings(rows, tmp_path) == []
    [found] = warnings(rows, tmp_path, best_metric="eval/error", best_mode="min")
    assert found.rule == "overoptimised"
    assert "eval/error went from 0.18" in found.text


def pairs(steps: int, *, score: Callable[[int], float], every: int = 20, noise: float = 0.1) -> Rows:
    """A method that learns from given answers: their margin rises; the score of its own answers is another matter."""
    draw = random.Random(0)
    rows: Rows = [{"step": 0, "eval/exact_match": score(0)}]
    for step in range(1, steps + 1):
        margin = 0.1 * step + draw.gauss(0, noise)
        rows.append({"step": step, "train/chosen_reward": -step, "train/rejected_reward": -step - margin})
        if step % every == 0:
            rows[-1]["eval/exact_match"] = score(step)
    return rows


def test_pairs_told_apart_at_the_cost_of_what_the_policy_answers(tmp_path: Path) -> None:
    [found] = warnings(pairs(80, score=lambda step: 0.528 - 0.005 * step), tmp_path)
    assert (found.rule, found.step) == ("overoptimised", 20)
    assert "eval/exact_match went from 0.528 at step 0 to 0.428 while the margin between the given answers rose" in (
        found.text
    )
    assert "method.sft_weight" in found.text
    assert warnings(pairs(80, score=lambda step: 0.528 + 0.005 * step), tmp_path) == []
    assert warnings(pairs(80, score=lambda step: 0.528 - 0.005 * step, noise=20.0), tmp_path) == [], "no rise"


def test_the_scores_of_a_reward_model_are_no_reward_of_a_policy(tmp_path: Path) -> None:
    rows = pairs(80, score=lambda step: 0.528 - 0.005 * step)
    renamed = [{name.replace("_reward", "_score"): value for name, value in row.items()} for row in rows]
    assert warnings(renamed, tmp_path) == []


# --- files ---


@pytest.mark.parametrize("killed_after", [3, 30, 119])
def test_a_resumed_run_has_the_warnings_of_one_that_was_not_interrupted(killed_after: int, tmp_path: Path) -> None:
    rows = rollouts(120, align__kl=lambda step: 0.5 * step, align__unfinished=0.9)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    warnings(rows, whole)
    assert len(read_warnings(whole)) == 2
    warnings(rows, killed)  # all of it, and then the rows beyond the checkpoint go
    lines = [json.dumps(row) + "\n" for row in rows[:killed_after]]
    (killed / "metrics.jsonl").write_text("".join(lines))
    again = warnings(rows[killed_after:], killed)
    assert (killed / WARNINGS_FILE).read_bytes() == (whole / WARNINGS_FILE).read_bytes()
    assert all(each.step > killed_after for each in again), "told again"


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    health = Health(tmp_path, HealthConfig(), is_main=False)
    health.start()
    assert [health.row(int(row["step"]), row) for row in rollouts(60, align__kl=99.0)] == [[]] * 60
    assert list(tmp_path.iterdir()) == []


def test_a_torn_line_is_passed_over(tmp_path: Path) -> None:
    warnings(rollouts(60, align__kl=99.0), tmp_path)
    path = tmp_path / WARNINGS_FILE
    path.write_text(path.read_text() + '{"step": 7, "ru')
    assert [each.rule for each in read_warnings(tmp_path)] == ["kl"]


def test_the_first_warning_that_is_named_is_the_reason_to_stop(tmp_path: Path) -> None:
    health = Health(tmp_path, HealthConfig(stop_on=["truncated"]))
    for row in rollouts(60, align__kl=99.0, align__unfinished=0.9):
        health.row(int(row["step"]), row)
    found = health.reason_to_stop()
    assert found is not None
    assert found.rule == "truncated"
