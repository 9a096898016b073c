"""Which weights a stage trains: all of them, or those of adapters beside them."""

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from llmtrain.config.schema.strict import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class NoAdapterConfig:
    """All weights are trained."""

    name: Literal["none"] = "none"
    """Which adapters."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoraConfig:
    """Low-rank adapters beside frozen weights. Read by `models/lora.py`.

    Modules are named by regular expressions that match the end of their names, from a dot on: "attention.qkv",
    "feed_forward.*"; a part of one by its name in Transformers: "q_proj".
    """

    name: Literal["lora"] = "lora"
    """Which adapters."""
    rank: int = Field(default=16, ge=1)
    """Rows of A and columns of B in the product B A that is added to a weight."""
    alpha: float = Field(default=32.0, gt=0)
    """The product is scaled by alpha / rank."""
    rslora: bool = False
    """Scale it by alpha / sqrt(rank) instead, so that a larger rank learns no more slowly (rsLoRA)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on what goes into the adapters during training; `align` is without."""
    targets: list[str] = Field(default_factory=lambda: ["(cross_)?attention.*", "feed_forward.*"])
    """Linear layers of the blocks that get adapters; routed experts get none."""
    also_train: list[str] = Field(default_factory=list)
    """Modules that are trained as they are, such as ".*norm" or "head". A reference is then a second model again."""


AdapterConfig = NoAdapterConfig | LoraConfig
