"""What sampled answers are rewarded for, besides a learned reward model's score."""

from typing import Any

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
