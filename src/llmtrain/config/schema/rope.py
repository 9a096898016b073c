"""Rotary positions on longer sequences than a model was trained on."""

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from llmtrain.config.schema.strict import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LinearScalingConfig:
    """Rotary positions divided by a factor (Chen et al. 2023). Read by `models/positions.py`."""

    name: Literal["linear"] = "linear"
    """Position interpolation."""
    factor: float = Field(gt=1)
    """How many times longer sequences become."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DynamicScalingConfig:
    """A rotary base that grows with the sequence, beyond the trained length only. Read by `models/positions.py`."""

    name: Literal["dynamic"] = "dynamic"
    """Dynamic NTK; for generation: training beyond the first length is refused."""
    factor: float = Field(gt=1)
    """How fast the base grows."""
    original_max_sequence_length: int = Field(ge=2)
    """Longest sequence that the model was trained on."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class YarnScalingConfig:
    """Low rotary frequencies divided, high ones kept, scores sharpened (Peng et al. 2023). Read as the others."""

    name: Literal["yarn"] = "yarn"
    """YaRN."""
    factor: float = Field(gt=1)
    """How many times longer sequences become."""
    original_max_sequence_length: int = Field(ge=2)
    """Longest sequence that the model was trained on before."""
    beta_fast: float = Field(default=32.0, gt=0)
    """Frequencies that turn more often than this in the original length are kept."""
    beta_slow: float = Field(default=1.0, gt=0)
    """Frequencies that turn less often than this in the original length are divided by `factor`."""
    attention_factor: float | None = Field(default=None, gt=0)
    """Rotated queries and keys are multiplied by this. Null: 1 + ln(factor) / 10."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Llama3ScalingConfig:
    """Low rotary frequencies divided, high ones kept, as in Llama 3.1. Read by `models/positions.py`."""

    name: Literal["llama3"] = "llama3"
    """Llama 3.1's."""
    factor: float = Field(gt=1)
    """Wave lengths beyond original / low_freq_factor become so many times longer."""
    original_max_sequence_length: int = Field(ge=2)
    """Longest sequence that the model was trained on before."""
    low_freq_factor: float = Field(default=1.0, gt=0)
    """Longer waves than original / this are divided by `factor`."""
    high_freq_factor: float = Field(default=4.0, gt=0)
    """Shorter waves than original / this are kept; in between it changes smoothly."""


RopeScaling = LinearScalingConfig | DynamicScalingConfig | YarnScalingConfig | Llama3ScalingConfig
