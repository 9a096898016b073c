"""What answers are rewarded for: how a reward model is learned, and functions that stand beside it."""

from typing import Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from llmtrain.config.schema.strict import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RewardFunctionConfig:
    """One reward function of a weighted sum. Read by `rewards/functions.py`."""

    target: str = Field(alias="_target_")
    """Import path of a reward: a class (such as llmtrain.rewards.rules.Length) or `def f(answers, **options)`."""
    weight: float = 1.0
    """What the reward is multiplied by. 0: measured as align/reward/<name> only."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the class or function."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RewardModelConfig:
    """How a reward model learns from ranked answers. Read by `objectives/reward.py`."""

    rankings: Literal["whole", "pairs"] = "whole"
    """Several ranked answers to a prompt: one row with all its pairs, each answer read once, or each pair a row."""
    margin_weight: float = Field(default=0.0, ge=0)
    """How far the better answer must lead, times its margin: column `margin`, or the difference of scores or ranks."""
    centring_weight: float = Field(default=0.0, ge=0)
    """Weight of (sum of both scores)^2, which holds the mean score near 0; 0.01 is usual. 0: scores may drift."""
