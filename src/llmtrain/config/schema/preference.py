"""The methods of `llmtrain align` that learn from given answers: pairs of a better and a worse one, or judged ones.

A key that a method does not read is no key of it; what is fixed by a method is a `ClassVar`, so that all can be read
alike. Keyword arguments of a loss in `objectives/preference.py` are keys here, under the same names.
"""

from typing import ClassVar, Literal, get_args

from pydantic import Field
from pydantic.dataclasses import dataclass

from llmtrain.config.schema.strict import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ReferenceConfig:
    """Keys of the methods that hold the policy against the model it starts from, the reference."""

    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull towards the reference."""
    reference: Literal["on_the_fly", "precomputed"] = "on_the_fly"
    """Where its log-probabilities come from: a second model in memory (with adapter=lora the policy itself, adapters
    switched off), or one pass before training, kept on disk."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PairsWithReferenceConfig(ReferenceConfig):
    """Keys of the methods that compare the log-ratios, policy to reference, of two answers."""

    length_normalised: bool = False
    """Divide the log-ratio of an answer by its tokens."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of the added next-token loss on the chosen answer, averaged over its tokens."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DpoConfig(PairsWithReferenceConfig):
    """Direct preference optimisation. Read by `objectives/preference.py`."""

    name: Literal["dpo"] = "dpo"
    """Which method."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of flipped labels (conservative DPO)."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class IpoConfig(PairsWithReferenceConfig):
    """Identity preference optimisation. Read by `objectives/preference.py`."""

    name: Literal["ipo"] = "ipo"
    """Which method."""
    length_normalised: bool = True
    """Divide the log-ratio of an answer by its tokens, as in the paper's experiments; its equations have the sum. The
    margin aimed at, 1 / (2 beta) nats, is then one for each token: beta=1 asks for as much as 0.05 of 20 summed."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HingeConfig(PairsWithReferenceConfig):
    """A hinge on the difference of the log-ratios (SLiC-HF). Read by `objectives/preference.py`."""

    name: Literal["hinge"] = "hinge"
    """Which method."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RobustConfig(PairsWithReferenceConfig):
    """DPO that is unbiased where labels are flipped. Read by `objectives/preference.py`."""

    name: Literal["robust"] = "robust"
    """Which method."""
    label_smoothing: float = Field(default=0.1, gt=0, lt=0.5)
    """Share of flipped labels."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OrpoConfig:
    """Odds-ratio preference optimisation, without a reference. Read by `objectives/preference.py`."""

    name: Literal["orpo"] = "orpo"
    """Which method."""
    odds_ratio_weight: float = Field(default=0.1, gt=0)
    """Weight of the odds ratio beside the next-token loss on the chosen answer (lambda)."""
    beta: ClassVar[float] = 1.0
    reference: ClassVar[None] = None
    length_normalised: ClassVar[bool] = True
    sft_weight: ClassVar[float] = 1.0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SimpoConfig:
    """Simple preference optimisation, without a reference. Read by `objectives/preference.py`."""

    name: Literal["simpo"] = "simpo"
    """Which method."""
    beta: float = Field(default=2.0, gt=0)
    """Scale of the mean log-probability of an answer's tokens; far larger than where there is a reference."""
    gamma: float = Field(default=1.0, ge=0)
    """Margin by which the better answer is to lead, after scaling; about half of beta."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of the added next-token loss on the chosen answer, averaged over its tokens."""
    reference: ClassVar[None] = None
    length_normalised: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CpoConfig:
    """Contrastive preference optimisation, without a reference. Read by `objectives/preference.py`."""

    name: Literal["cpo"] = "cpo"
    """Which method."""
    beta: float = Field(default=0.1, gt=0)
    """Scale of the log-probability of an answer."""
    sft_weight: float = Field(default=1.0, ge=0)
    """Weight of the next-token loss on the chosen answer, averaged over its tokens."""
    reference: ClassVar[None] = None
    length_normalised: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True, config=STRICT)
class KtoConfig(ReferenceConfig):
    """Kahneman-Tversky optimisation: answers that are good or not, in no pairs. Read by `objectives/kto.py`."""

    name: Literal["kto"] = "kto"
    """Which method."""
    desirable_weight: float = Field(default=1.0, gt=0)
    """Weight of the good answers; where they are rarer, raise it until both kinds weigh about the same in all."""
    undesirable_weight: float = Field(default=1.0, gt=0)
    """Weight of the others."""


PairMethod = DpoConfig | IpoConfig | HingeConfig | RobustConfig | OrpoConfig | SimpoConfig | CpoConfig
PreferenceMethod = PairMethod | KtoConfig

# Their names.
PAIR_METHODS: tuple[str, ...] = tuple(method.name for method in get_args(PairMethod))
PREFERENCE_METHODS: tuple[str, ...] = tuple(method.name for method in get_args(PreferenceMethod))
