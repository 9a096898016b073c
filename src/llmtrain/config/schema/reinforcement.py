"""The methods of `llmtrain align` that learn from answers which the policy samples."""

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from llmtrain.config.schema.strict import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PpoConfig:
    """Proximal policy optimisation. Read by `objectives/policy_gradient.py` and `generation/rollouts.py`."""

    name: Literal["ppo"] = "ppo"
    """Which method."""
    epochs: int = Field(default=2, ge=1)
    """Passes over each rollout."""
    minibatches: int = Field(default=2, ge=1)
    """Updates per pass; must divide `train.batch_rows`."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Longest sampled answer in tokens."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature; it also divides the logits wherever log-probabilities are taken."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount per token."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """Lambda of generalised advantage estimation."""
    clip_range: float = Field(default=0.2, gt=0)
    """Clip of the policy ratio."""
    value_clip_range: float = Field(default=0.2, gt=0)
    """Clip of the value update."""
    value_weight: float = Field(default=0.1, ge=0)
    """Weight of the value loss."""
    value_warmup_steps: int = Field(default=0, ge=0)
    """First steps in which only the value model learns."""
    kl_coefficient: float = Field(default=0.05, ge=0)
    """Penalty per nat of log-ratio to the reference, in the reward of each token."""
    kl_target: float | None = Field(default=None, gt=0)
    """Adapt the coefficient to hold this KL per answer. Null: the coefficient is fixed."""
    kl_horizon: int = Field(default=10_000, ge=1)
    """Answers over which the coefficient adapts."""
    whiten_rewards: bool = True
    """Divide rewards by their standard deviation over the batch (the mean is kept)."""
    whiten_advantages: bool = True
    """Shift and scale advantages to mean 0 and standard deviation 1 over the batch."""
    missing_eos_penalty: float = Field(default=1.0, ge=0)
    """Taken from the score of an answer that was cut off before its end token."""


# The methods that sample answers and have them judged.
SamplingMethod = PpoConfig
