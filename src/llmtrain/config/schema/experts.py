"""Mixtures of experts."""

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from llmtrain.config.schema.strict import STRICT

# Far beyond any model; up to here the numbers of elements of all tensors can be counted.
MAX_EXPERTS, MAX_INNER_WIDTH = 2**14, 2**24


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ExpertsConfig:
    """Layers whose feed-forward part is several experts, of which a router picks a few for each token.

    Read by `models/experts.py`; the losses and the balance by `objectives/routing.py`.
    """

    num_experts: int = Field(default=8, ge=2, le=MAX_EXPERTS)
    """Routed experts of a layer."""
    experts_per_token: int = Field(default=2, ge=1)
    """Experts that each token is sent to (Switch: 1, Mixtral: 2)."""
    shared_experts: int = Field(default=0, ge=0, le=MAX_EXPERTS)
    """Experts beside them that every token goes through (DeepSeek)."""
    ffn_hidden_size: int | None = Field(default=None, ge=1, le=MAX_INNER_WIDTH)
    """Inner width of one expert. Null: that of a dense layer, `model.ffn_hidden_size` or its default."""
    first_layer: int = Field(default=0, ge=0)
    """The first layer with experts, counted from 0; those before it are dense."""
    layer_step: int = Field(default=1, ge=1)
    """From there on, every so many layers have experts (Switch: 2); the others are dense."""
    scores: Literal["softmax", "sigmoid"] = "softmax"
    """How the router's logits become scores: over all experts together, or of each by itself (DeepSeek-V3)."""
    normalise_weights: bool = True
    """Divide the scores of a token's experts by their sum: with softmax as if it were taken after the choice."""
    weight_scale: float = Field(default=1.0, gt=0)
    """Factor on the weights of the routed experts (DeepSeek-V3: 2.5)."""
    capacity_factor: float | None = Field(default=None, gt=0)
    """In training, an expert takes this times its even share of a group of tokens and drops the rest. Null: all."""
    capacity_group_tokens: int = Field(default=128, ge=1)
    """Tokens of a row, one after the other, that share a capacity."""
    balance_loss: float = Field(default=0.01, ge=0)
    """Weight of the loss that evens out the experts' load, of each layer; the loss is 1 where the load is even."""
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of the squared log-sum-exp of the router's logits, of each layer (ST-MoE: 0.001)."""
    balance_bias_rate: float = Field(default=0.0, ge=0)
    """Move a bias on each expert's score against its load by so much after each update (DeepSeek-V3: 0.001)."""
    jitter: float = Field(default=0.0, ge=0, lt=1)
    """In training, the router's inputs are multiplied by uniform draws of 1 - jitter to 1 + jitter (Switch: 0.01)."""
