"""The methods of `llmtrain align` that learn from pairs of answers."""

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from llmtrain.config.schema.strict import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DpoConfig:
    """Direct preference optimisation. Read by `objectives/preference.py`."""

    name: Literal["dpo"] = "dpo"
    """Which method."""
    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull towards the reference."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of flipped labels (conservative DPO)."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of the added next-token loss on the chosen answer, averaged over its tokens."""
