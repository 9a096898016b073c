"""The methods of `llmtrain align` that learn from answers which the policy samples."""

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from llmtrain.config.schema.strict import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SampledAnswersConfig:
    """Keys of every method that samples answers. Read by `generation/rollouts.py`."""

    max_new_tokens: int = Field(default=64, ge=1)
    """Longest sampled answer in tokens."""
    temperature: float = Field(default=1.0, ge=0.001)
    """Sampling temperature; it also divides the logits wherever log-probabilities of samples are taken."""
    missing_eos_penalty: float = Field(default=1.0, ge=0)
    """Taken from the score of an answer that was cut off before its end token."""
    reward_clip: float | None = Field(default=None, gt=0)
    """Scores are brought into ± this first."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PpoConfig(SampledAnswersConfig):
    """Proximal policy optimisation. Read by `objectives/ppo.py` and `generation/estimators.py`."""

    name: Literal["ppo"] = "ppo"
    """Which method."""
    epochs: int = Field(default=2, ge=1)
    """Passes over each rollout."""
    minibatches: int = Field(default=2, ge=1)
    """Updates per pass; must divide `train.batch_rows`."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount per token."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """Lambda of generalised advantage estimation."""
    clip_range: float = Field(default=0.2, gt=0)
    """Clip of the policy ratio."""
    value_model: Literal["reward_model", "policy", "shared"] | None = None
    """The value model: a copy of the reward model; a copy of the policy with a value head of zeros; or such a head on
    the policy itself (shared). Null: reward_model where there is one, else policy. With adapter=lora,
    policy, which null stands for then, is a second set of adapters on the policy's trunk, with such a head."""
    value_clip_range: float = Field(default=0.2, gt=0)
    """Clip of the value update."""
    value_weight: float = Field(default=0.1, ge=0)
    """Weight of the value loss."""
    value_warmup_steps: int | None = Field(default=None, ge=0)
    """First steps in which only the value model learns. Null: 2, and none in runs of less than 20 steps or with
    value_model=shared."""
    kl_coefficient: float = Field(default=0.05, ge=0)
    """Penalty per nat of log-ratio to the reference, in the reward of each token."""
    kl_estimator: Literal["k1", "k3"] = "k1"
    """Estimate of the KL in the reward: the log-ratio itself, or k3, which is never negative."""
    kl_target: float | None = Field(default=None, gt=0)
    """Adapt the coefficient to hold this KL per answer. Null: the coefficient is fixed."""
    kl_horizon: int = Field(default=10_000, ge=1)
    """Answers over which the coefficient adapts."""
    kl_limit: float | None = Field(default=0.1, gt=0)
    """Leave out the rest of a rollout's updates after one that began with a KL per token above this, in nats, between
    the policy and the one that sampled. Null: never."""
    whiten_rewards: bool = True
    """Divide rewards by their standard deviation over the batch (the mean is kept)."""
    whiten_advantages: bool = True
    """Shift and scale advantages to mean 0 and standard deviation 1 over the batch."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GrpoConfig(SampledAnswersConfig):
    """Group relative policy optimisation, with DAPO's and Dr. GRPO's options. Read by `objectives/policy_gradient.py`.

    DAPO: clip_range_high=0.28 kl_coefficient=0 loss_average=token dynamic_sampling=N, and rewards=length.
    Dr. GRPO: scale_rewards=none loss_average=constant kl_coefficient=0.
    """

    name: Literal["grpo"] = "grpo"
    """Which method."""
    samples_per_prompt: int = Field(default=8, ge=2)
    """Answers to each prompt: a group. `train.batch_rows` counts answers."""
    epochs: int = Field(default=1, ge=1)
    """Passes over each rollout."""
    minibatches: int = Field(default=1, ge=1)
    """Updates per pass; must divide the groups of a batch."""
    clip_range: float = Field(default=0.2, gt=0)
    """Clip of the ratio of each token."""
    clip_range_high: float | None = Field(default=None, gt=0)
    """Clip above 1 (DAPO: 0.28). Null: `clip_range`."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Standard deviation that rewards less the mean of their group are divided by: the group's, the batch's, none."""
    loss_average: Literal["sequence", "token", "constant"] = "sequence"
    """Average losses of tokens over each answer, then over answers; over all tokens; or over `max_new_tokens`."""
    kl_coefficient: float = Field(default=0.04, ge=0)
    """Weight of the KL to the reference (k3) in the loss of each token. 0: no reference model is loaded."""
    unbiased_kl: bool = True
    """Multiply that KL by the ratio, so that its gradient is right on average (DeepSeek-V3.2). GRPO's paper: false."""
    kl_limit: float | None = Field(default=0.1, gt=0)
    """Leave out the rest of a rollout's updates after one that began with a KL per token above this, in nats, between
    the policy and the one that sampled. Null: never."""
    dynamic_sampling: int = Field(default=0, ge=0)
    """How many times, at most, prompts are replaced by others where all answers got the same reward (DAPO)."""
    mask_unfinished: bool = False
    """Learn nothing from answers that were cut off (DAPO's overlong filtering)."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RlooConfig(SampledAnswersConfig):
    """REINFORCE with a leave-one-out baseline (RLOO). Read by `objectives/policy_gradient.py`."""

    name: Literal["rloo"] = "rloo"
    """Which method."""
    samples_per_prompt: int = Field(default=4, ge=2)
    """Answers to each prompt; the others are each one's baseline. `train.batch_rows` counts answers."""
    epochs: int = Field(default=1, ge=1)
    """Passes over each rollout."""
    minibatches: int = Field(default=1, ge=1)
    """Updates per pass; must divide the prompts of a batch."""
    clip_range: float = Field(default=0.2, gt=0)
    """Clip of the ratio of each answer."""
    kl_coefficient: float = Field(default=0.05, ge=0)
    """Penalty per nat of an answer's log-ratio to the reference, in its reward. 0: no reference model is loaded."""
    kl_limit: float | None = Field(default=0.1, gt=0)
    """Leave out the rest of a rollout's updates after one that began with a KL per token above this, in nats, between
    the policy and the one that sampled. Null: never."""
    whiten_advantages: bool = False
    """Shift and scale advantages to mean 0 and standard deviation 1 over the batch."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ReinforceConfig(SampledAnswersConfig):
    """REINFORCE: one answer to each prompt, one update. Read by `objectives/policy_gradient.py`."""

    name: Literal["reinforce"] = "reinforce"
    """Which method."""
    baseline: Literal["batch", "none"] = "batch"
    """What is taken from the rewards: their mean over the batch, or nothing."""
    kl_coefficient: float = Field(default=0.05, ge=0)
    """Penalty per nat of an answer's log-ratio to the reference, in its reward. 0: no reference model is loaded."""
    whiten_advantages: bool = False
    """Shift and scale advantages to mean 0 and standard deviation 1 over the batch."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OnlineDpoConfig(SampledAnswersConfig):
    """Online DPO: the best and the worst of some answers are a pair. Read by `generation/selection.py`."""

    name: Literal["online_dpo"] = "online_dpo"
    """Which method."""
    samples_per_prompt: int = Field(default=2, ge=2)
    """Answers to each prompt. `train.batch_rows` counts answers, `train.micro_batch_rows` pairs."""
    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull towards the reference."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of wrong judgements (conservative DPO)."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RejectionSamplingConfig(SampledAnswersConfig):
    """Rejection sampling: fine-tuning on the best of some answers. Read by `generation/selection.py`."""

    name: Literal["rejection_sampling"] = "rejection_sampling"
    """Which method."""
    samples_per_prompt: int = Field(default=8, ge=2)
    """Answers to each prompt, of which one is kept. `train.batch_rows` counts answers, `train.micro_batch_rows` those
    that are kept."""
    minimum_reward: float | None = None
    """Learn the best answer only if its reward, less penalties, is at least this."""


# The methods of `align` that sample answers and have them judged.
SamplingMethod = PpoConfig | GrpoConfig | RlooConfig | ReinforceConfig | OnlineDpoConfig | RejectionSamplingConfig
