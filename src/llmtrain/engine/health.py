"""Warnings in words when the metrics of a run show a known illness.

Each rule reads some metrics of each row as it is written and speaks at most once in a run. What it says follows from
the rows alone: a resumed run reads its own rows again and ends with the warnings of one that was not interrupted. They
stand in `warnings.jsonl`, `{"step": s, "rule": name, "text": words}`, and in the report.

Limits are keys of `HealthConfig`; the windows below say over how many rows a rule looks. Most limits are those of
Axolotl's page on training stability; they are meant to be silent on runs that are well.
"""

import json
import math
import os
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from llmtrain.config.schema import HealthConfig
from llmtrain.engine.row_files import RowFile
from llmtrain.engine.tracking import read_metrics, read_rows

WARNINGS_FILE = "warnings.jsonl"

# Rows that are looked at together: of what a rollout shows at once, of what is slow, of what is noisy, of pairs that a
# warm-up of the learning rate may hold where they start.
FEW_ROWS, SOME_ROWS, MANY_ROWS, WARMUP_ROWS = 5, 20, 50, 100
# A spike is also this much above the mean: where the loss hardly varies, many standard deviations are little.
SPIKE_SHARE = 0.1
# A margin of pairs that has risen by less is rounding.
LEAST_RISE = 1e-3
# The share of what a held-out score has gained that it must lose again before the reward model is blamed.
LOST_GAIN = 0.25

Row = Mapping[str, float]


class HealthWarning(NamedTuple):
    """What was noticed at a step; `rule` is the key of `health.` that set the limit."""

    step: int
    rule: str
    text: str


class Rule(Protocol):
    """Reads the rows of a run in turn."""

    def __call__(self, step: int, row: Row) -> str | None:
        """What is wrong, in words with what to do, or None."""


class Health:
    """The warnings of one run; on any process but the main one it does nothing."""

    def __init__(
        self, folder: Path, config: HealthConfig, *, best_metric: str | None = None, best_mode: str = "max",
        is_main: bool = True,
    ) -> None:  # fmt: skip
        """`folder` is the run's; `best_metric`: the one that ranks its checkpoints."""
        self.path, self.config, self.is_main = folder / WARNINGS_FILE, config, is_main
        self.file = RowFile(self.path)
        self.rules = _rules(config, best_metric, best_mode) if is_main else {}
        self.found: list[HealthWarning] = []

    def start(self) -> None:
        """Begin, or go on: read the rows that the run has kept, and keep the warnings that follow from them."""
        if not self.is_main:
            return
        for row in read_metrics(self.path.parent):
            self._judge(row["step"], row)
        if self.found:
            aside = self.path.with_name(f".{self.path.name}.partial")
            aside.write_text("".join(map(_line, self.found)), encoding="utf-8")
            os.replace(aside, self.path)
        else:
            self.path.unlink(missing_ok=True)

    def row(self, step: int, row: Row) -> list[HealthWarning]:
        """The warnings that the row of `step` gives rise to; each rule gives one in a run."""
        new = self._judge(step, row)
        if new:
            self.file.add(map(_line, new))
        return new

    def reason_to_stop(self) -> HealthWarning | None:
        """The first warning that `health.stop_on` names."""
        return next((each for each in self.found if each.rule in self.config.stop_on), None)

    def _judge(self, step: int, row: Row) -> list[HealthWarning]:
        finite = {name: value for name, value in row.items() if math.isfinite(value)}
        said = {name: rule(step, finite) for name, rule in self.rules.items()}
        new = [HealthWarning(step, name, text) for name, text in said.items() if text]
        for warning in new:
            del self.rules[warning.rule]
        self.found += new
        return new


def read_warnings(folder: Path) -> list[HealthWarning]:
    """The warnings in a run's folder, in the order of steps; none where there is no file."""
    rows = read_rows(folder / WARNINGS_FILE)
    return [HealthWarning(row["step"], str(row.get("rule")), str(row.get("text"))) for row in rows]


def _line(warning: HealthWarning) -> str:
    return json.dumps(warning._asdict(), ensure_ascii=False) + "\n"


def _rules(config: HealthConfig, best_metric: str | None, best_mode: str) -> dict[str, Rule]:
    """The rules that are switched on, by their key."""
    rules = {name: make(limit) for name, make in RULES.items() if (limit := getattr(config, name)) is not None}
    if config.overoptimised is not None:
        held_out = config.held_out_metric or best_metric or "eval/exact_match"
        lower_is_better = held_out == best_metric and best_mode == "min"
        rules["overoptimised"] = Overoptimised(config.overoptimised, held_out, -1.0 if lower_is_better else 1.0)
    return rules


class Limit:
    """A metric whose mean over the last `num_rows` rows that have it is beyond a limit."""

    def __init__(
        self, metric: str, limit: float, num_rows: int, words: str, *, below: bool = False,
        average: Callable[[Sequence[float]], float] = statistics.fmean,
    ) -> None:  # fmt: skip
        """`words` may name {mean}, {limit} and {rows}; `below`: from the limit downwards is ill, not above it.

        `average` takes the place of the mean: the median where a single row may be far off.
        """
        self.metric, self.limit, self.words, self.below, self.average = metric, limit, words, below, average
        self.last: deque[float] = deque(maxlen=num_rows)

    def __call__(self, step: int, row: Row) -> str | None:
        if self.metric not in row:
            return None
        self.last.append(row[self.metric])
        mean = self.average(self.last)
        ill = mean <= self.limit if self.below else mean > self.limit
        if not ill or not _is_full(self.last):
            return None
        return self.words.format(mean=mean, limit=self.limit, rows=len(self.last))


class LossSpike:
    """A loss on text far above those before it; rows that have it have the loss of each source too.

    Pairs and rollouts are left out: single batches of pairs may well be hard, and PPO's loss goes either way.
    """

    def __init__(self, deviations: float) -> None:
        self.deviations = deviations
        self.last: deque[float] = deque(maxlen=MANY_ROWS)

    def __call__(self, step: int, row: Row) -> str | None:
        of_text = any(name.startswith("data/") and name.endswith("/loss") for name in row)
        if "train/loss" not in row or not of_text:
            return None
        loss, before = row["train/loss"], list(self.last)
        self.last.append(loss)
        if len(before) < MANY_ROWS:
            return None
        mean, deviation = statistics.fmean(before), statistics.pstdev(before)
        if loss - mean <= max(self.deviations * deviation, SPIKE_SHARE * abs(mean)):
            return None
        return (
            f"the loss jumped to {loss:.4g}, from {mean:.4g} ± {deviation:.2g} over the {MANY_ROWS} rows before. If it "
            "does not come back, go on from an earlier checkpoint with a lower optimizer.lr or train.max_grad_norm, or "
            "look at the rows: llmtrain show run=NAME step=N."
        )


class GradientNorm:
    """A gradient whose usual size is out of range: the median, since single ones may be large."""

    def __init__(self, limits: Sequence[float]) -> None:
        self.low, self.high = limits
        self.last: deque[float] = deque(maxlen=MANY_ROWS)

    def __call__(self, step: int, row: Row) -> str | None:
        if "train/grad_norm" not in row:
            return None
        self.last.append(row["train/grad_norm"])
        usual = statistics.median(self.last)
        if not _is_full(self.last) or self.low <= usual <= self.high:
            return None
        said = f"the gradient's norm is {usual:.3g} (median of {MANY_ROWS} rows)"
        if usual < self.low:
            return f"{said}: hardly anything is learned. Is the loss on any token at all, or is all of it learned?"
        return f"{said}: training is about to diverge. Lower optimizer.lr or lengthen schedule.warmup_steps."


class StuckLoss:
    """Given pairs whose answers are told apart no better than by a coin, with a margin that has not risen.

    Not the loss: each method's starts and ends elsewhere. The accuracy must be no better by two standard errors, since
    few pairs in a row make it noisy. Without a reference it may start below a half and rise: then the margin does too.
    Pairs of sampled answers are left out: they are new in every step, and some are ties.
    """

    def __init__(self, lead: float) -> None:
        """`lead`: an accuracy of more than this above a half is better than a coin's."""
        self.lead = lead
        self.first_margins: list[float] = []
        self.last: deque[tuple[float, float]] = deque(maxlen=WARMUP_ROWS)

    def __call__(self, step: int, row: Row) -> str | None:
        if "train/margin" not in row or "train/accuracy" not in row or "align/reward" in row:
            return None
        if len(self.first_margins) < MANY_ROWS:
            self.first_margins.append(row["train/margin"])
            return None
        self.last.append((row["train/accuracy"], row["train/margin"]))
        if len(self.last) < MANY_ROWS:
            return None
        (accuracy, margin), margin_then = _means(self.last), statistics.fmean(self.first_margins)
        error = math.sqrt(_squared_error([each for each, _ in self.last]))
        if accuracy + 2 * error > 0.5 + self.lead or margin > margin_then + LEAST_RISE:
            return None
        stage = "reward" if "train/chosen_score" in row else "align"
        return (
            f"the two answers of a pair are not told apart: over {len(self.last)} rows the accuracy is {accuracy:.2f} "
            f"and the margin {margin:.2g} ({margin_then:.2g} at the start). Raise optimizer.lr or shorten "
            f"schedule.warmup_steps; do chosen and rejected differ (llmtrain show stage={stage})?"
        )


class LengthGrowth:
    """Answers that grow many times longer while the reward rises: the reward model likes length."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.first: list[tuple[float, float]] = []
        self.last: deque[tuple[float, float]] = deque(maxlen=FEW_ROWS)

    def __call__(self, step: int, row: Row) -> str | None:
        if "align/answer_tokens" not in row or "align/reward" not in row:
            return None
        self.last.append((row["align/answer_tokens"], row["align/reward"]))
        if len(self.first) < FEW_ROWS:
            self.first.append(self.last[-1])
        (length_then, reward_then), (length, reward) = _means(self.first), _means(self.last)
        if not _is_full(self.last) or length <= self.factor * length_then or reward <= reward_then:
            return None
        return (
            f"answers have grown from {length_then:.3g} to {length:.3g} tokens while the reward rose from "
            f"{reward_then:.3g} to {reward:.3g}: is it length that is rewarded? Read some samples; train the reward "
            "model on pairs of equal length, take something off for length, or lower method.max_new_tokens."
        )


class Overoptimised:
    """A held-out score that falls again while the reward goes on rising (Gao et al. 2022, arXiv 2210.10760).

    Where nothing is sampled, the reward is the margin between given answers: it can rise while both become less likely,
    and others likelier than either (Rafailov et al. 2024, arXiv 2404.12358; Razin et al. 2024, arXiv 2410.08847).
    It has fallen when it has lost `share` of its best value, so that small ups and downs are passed over, and a quarter
    of what it has gained, so that a run is warned about long before it is back where it started. The reward has risen
    when the rows since the best score are above those up to it by two standard errors.
    """

    def __init__(self, share: float, metric: str, sign: float) -> None:
        """`sign` is −1 for a metric of which less is better."""
        self.share, self.metric, self.sign = share, metric, sign
        self.rewards: deque[float] = deque(maxlen=FEW_ROWS)
        self.rewards_since: deque[float] = deque(maxlen=FEW_ROWS)
        self.rewards_at_best: list[float] = []
        self.start: float | None = None
        self.best, self.best_step = -math.inf, 0

    def __call__(self, step: int, row: Row) -> str | None:
        reward = row.get("align/reward", margin_of(row))
        if reward is not None:
            self.rewards.append(reward)
            self.rewards_since.append(reward)
            # the start is measured before there is a reward
            if self.best == self.start and len(self.rewards_at_best) < FEW_ROWS:
                self.rewards_at_best.append(reward)
        if self.metric not in row:
            return None
        score = self.sign * row[self.metric]
        if self.start is None:
            self.start = score
        if score > self.best:
            self.best, self.best_step, self.rewards_at_best = score, step, list(self.rewards)
            self.rewards_since.clear()
            return None
        lost, gained = self.best - score, self.best - self.start
        if lost <= max(self.share * abs(self.best), LOST_GAIN * gained) or not self._reward_rose():
            return None
        then, now = statistics.fmean(self.rewards_at_best), statistics.fmean(self.rewards_since)
        of_samples = "align/reward" in row
        name, why = ("reward", EXPLOITED) if of_samples else ("margin between the given answers", DISPLACED)
        return (
            f"{self.metric} went from {self.sign * self.best:.4g} at step {self.best_step} to {row[self.metric]:.4g} "
            f"while the {name} rose from {then:.3g} to {now:.3g}: {why}, or finish with the best checkpoint "
            "(checkpoint.final=best)."
        )

    def _reward_rose(self) -> bool:
        if len(self.rewards_since) < 2 or not self.rewards_at_best:  # one row has no error that could be told
            return False
        error = math.sqrt(_squared_error(self.rewards_since) + _squared_error(self.rewards_at_best))
        return statistics.fmean(self.rewards_since) - statistics.fmean(self.rewards_at_best) > 2 * error


EXPLOITED = (
    "the policy exploits what the reward gets wrong. Raise method.kl_coefficient, train the reward model on answers of "
    "this policy"
)
DISPLACED = (
    "the answers are told apart, and what the policy itself answers gets worse. Raise method.beta, so that a smaller "
    "margin is enough, set method.sft_weight, lower optimizer.lr"
)


def margin_of(row: Row) -> float | None:
    """How much better, by the policy's own rewards, the better of given answers are than the worse."""
    better, worse = row.get("train/chosen_reward"), row.get("train/rejected_reward")
    return None if better is None or worse is None else better - worse


def _is_full(rows: deque[Any]) -> bool:
    return len(rows) == rows.maxlen


def _means(rows: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return statistics.fmean(row[0] for row in rows), statistics.fmean(row[1] for row in rows)


def _squared_error(values: Sequence[float]) -> float:
    """The squared standard error of a mean; 0 where there is only one value."""
    return statistics.variance(values) / len(values) if len(values) > 1 else 0.0


# By the key of `health.` that holds the limit; null leaves one out. `Overoptimised` needs more than a limit.
RULES: dict[str, Callable[[Any], Rule]] = {
    "loss_spike": LossSpike,
    "grad_norm": GradientNorm,
    "stuck_loss": StuckLoss,
    "length_growth": LengthGrowth,
    "kl": lambda limit: Limit(
        "align/kl", limit, FEW_ROWS,
        "the policy is {mean:.3g} nats per answer away from its reference (limit {limit:g}): what it learns now is "
        "more likely a weakness of the reward than an improvement. Raise method.kl_coefficient, set method.kl_target, "
        "or lower optimizer.lr.",
    ),
    "entropy": lambda limit: Limit(
        "train/entropy", limit, FEW_ROWS,
        "the policy's entropy is {mean:.2g} nats per token (limit {limit:g}): it samples the same answers again and "
        "again. Unless they are as good as they can be, lower optimizer.lr, raise method.kl_coefficient or "
        "method.temperature, and go on from an earlier checkpoint.",
        below=True,
    ),
    "clip_fraction": lambda limit: Limit(
        "train/clip_fraction", limit, FEW_ROWS,
        "{mean:.0%} of the ratios to the policy that sampled are clipped (limit {limit:.0%}): a rollout's updates take "
        "the policy too far. Lower optimizer.lr or method.epochs, or sample more answers per step.",
    ),
    "updates": lambda limit: Limit(
        "align/updates", limit, FEW_ROWS,
        "only {mean:.0%} of the updates of a rollout are made (limit {limit:.0%}): method.kl_limit ends the others. "
        "Lower optimizer.lr, make fewer passes (method.epochs), or raise method.kl_limit.",
        below=True,
    ),
    "explained_variance": lambda limit: Limit(
        "align/explained_variance", limit, SOME_ROWS,
        "the value model explains {mean:.2g} of the returns' variance (median of {rows} rows): it has not learned, and "
        "the advantages are noise. Lengthen method.value_warmup_steps, raise method.value_weight or optimizer.lr.",
        below=True, average=statistics.median,
    ),
    "failed_saves": lambda limit: Limit(
        "perf/failed_saves", limit - 0.5, 1,
        "{mean:.0f} checkpoints in a row found no room on the disk: what is trained now is lost if the run ends. Make "
        "room; the next checkpoint that is due is tried again.",
    ),
    "truncated": lambda limit: Limit(
        "align/unfinished", limit, FEW_ROWS,
        "{mean:.0%} of the answers are cut off before their end token (limit {limit:.0%}). Raise method.max_new_tokens "
        "or method.missing_eos_penalty, or start from a model that ends its answers.",
    ),
    "flat_groups": lambda limit: Limit(
        "align/flat_groups", limit, FEW_ROWS,
        "in {mean:.0%} of the groups all answers have one reward (limit {limit:.0%}): they teach nothing. Choose "
        "prompts that are neither solved always nor never, or sample more answers per prompt.",
    ),
}  # fmt: skip
