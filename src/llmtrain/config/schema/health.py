"""When a run is warned about, and what is done about steps that go wrong."""

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from llmtrain.config.schema.strict import STRICT

# The rules, by the key that sets each one's limit.
Rule = Literal[
    "loss_spike", "grad_norm", "stuck_loss", "kl", "length_growth", "entropy", "clip_fraction", "updates",
    "explained_variance", "truncated", "flat_groups", "overoptimised", "failed_saves",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HealthConfig:
    """Warnings in words when the metrics show a known illness; null switches one off. Read by `engine/health.py`.

    What is done about single steps is read by `engine/faults.py`.
    """

    loss_spike: float | None = Field(default=6.0, gt=0)
    """Warn of a loss on text that lies this many standard deviations above the rows before it (pretrain, sft)."""
    grad_norm: tuple[float, float] | None = Field(default=(1e-3, 10.0), strict=False)
    """Warn when the gradient's norm, before clipping, stays below the first or above the second number."""
    stuck_loss: float | None = Field(default=0.02, gt=0, lt=0.5)
    """Warn when the accuracy on given pairs stays no more than this above a half and their margin does not rise
    (reward, preference methods but kto)."""
    kl: float | None = Field(default=10.0, gt=0)
    """Warn when the policy is further than this from its reference, in nats per answer."""
    length_growth: float | None = Field(default=2.0, gt=1)
    """Warn when the reward rises while answers become this many times as long as at the start."""
    entropy: float | None = Field(default=0.01, gt=0)
    """Warn when the policy's entropy is below this, in nats per token."""
    clip_fraction: float | None = Field(default=0.3, gt=0, lt=1)
    """Warn when more than this share of the ratios is clipped: those of tokens, in rloo those of whole answers."""
    updates: float | None = Field(default=0.75, gt=0, lt=1)
    """Warn when `method.kl_limit` leaves no more than this share of the updates of a rollout. The first two are always
    made: of ppo's four, a half."""
    explained_variance: float | None = Field(default=0.0, lt=1)
    """Warn when the value model explains no more than this share of the returns' variance."""
    truncated: float | None = Field(default=0.8, gt=0, lt=1)
    """Warn when more than this share of the answers is cut off before its end token."""
    flat_groups: float | None = Field(default=0.8, gt=0, lt=1)
    """Warn when more than this share of the groups has one reward for all its answers, which teaches nothing."""
    overoptimised: float | None = Field(default=0.02, gt=0, lt=1)
    """Warn when `held_out_metric` loses this share of its best, and a quarter of its gain, while the reward rises.
    Of methods that learn from given answers, the reward is the margin between the better and the worse."""
    failed_saves: int | None = Field(default=1, ge=1)
    """Warn when this many checkpoints in a row have found no room on the disk."""
    held_out_metric: str | None = None
    """Held-out score, higher is better, beside the reward. Null: `checkpoint.best_metric`, else eval/exact_match."""
    stop_on: list[Rule] = Field(default_factory=list)
    """Warnings that end the run, after a checkpoint, with exit code 1."""
    max_skipped_in_a_row: int = Field(default=10, ge=0)
    """An update whose loss or gradient is not finite is not made, and its rows are named in `faults.jsonl`. More than
    this many in a row end the run."""
    on_spike: Literal["warn", "skip", "rollback", "stop"] | None = None
    """What is done about a loss on text or a gradient norm far above the last ones (pretrain, sft). warn: say so. skip:
    do not make the update. rollback: take the state of the last checkpoint and leave out all rows since. stop: end the
    run before the update. Null: nothing."""
    spike_deviations: float = Field(default=10.0, gt=0)
    """How far above their median is a spike, in robust standard deviations (1.4826 times the median distance)."""
    spike_window: int = Field(default=50, ge=8)
    """Updates that the median is taken of; before there are as many, nothing is a spike."""
