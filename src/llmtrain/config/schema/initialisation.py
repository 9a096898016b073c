"""How weights begin, and how that, the learning rate and some scales follow the width."""

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from llmtrain.config.schema.strict import STRICT

# Optimizers whose steps muP has a rule for here, by their import paths.
MUP_OPTIMIZERS = ("torch.optim.AdamW",)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Gpt2InitConfig:
    """N(0, `init_std`²), with `init_std` / sqrt(2 x layers) into the residual stream (GPT-2)."""

    name: Literal["gpt2"] = "gpt2"
    """How weights begin."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class NormalInitConfig:
    """N(0, `init_std`²) for every matrix (OLMo 2)."""

    name: Literal["normal"] = "normal"
    """How weights begin."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ScaledInitConfig:
    """N(0, 1 / inputs), with 1 / (2 x inputs x l) into the residual stream of layer l = 1, 2, ... (OLMo)."""

    name: Literal["scaled"] = "scaled"
    """How weights begin."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SmallInitConfig:
    """N(0, 2 / (5 x hidden)), into the residual stream N(0, 4 / (layers² x hidden)) (GPT-NeoX, Pythia)."""

    name: Literal["small"] = "small"
    """How weights begin."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class T5InitConfig:
    """N(0, 1 / inputs), queries over another head_dim, embeddings N(0, 1) (T5).

    For `attention_scale` 1, and a head of its own or `logit_scale` 1 / sqrt(hidden).
    """

    name: Literal["t5"] = "t5"
    """How weights begin."""
    variance_scale: float = Field(default=1.0, gt=0)
    """Factor on the variances in the blocks (Switch: 0.1)."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MupInitConfig:
    """muP: what is good for a narrow model is good for a wide one (Yang et al. 2022). Read by `models/mup.py`.

    `init_std`, `logit_scale`, `attention_scale`, `embedding_scale` and `optimizer.lr` are those of the base model,
    whose widths are all smaller in the same proportion; at its width this is `gpt2`. AdamW only.
    """

    name: Literal["mup"] = "mup"
    """How weights begin."""
    base_hidden_size: int = Field(ge=1)
    """Width of the model that the settings were found with."""
    base_head_dim: int = Field(ge=1)
    """Width of its heads: the same where a wider model has more heads, smaller where it has wider ones."""
    zero_head: bool = False
    """Begin with a head of zeros, where it is not the embedding: all logits are 0."""
    zero_query: bool = False
    """Begin with queries of zero: attention is even over what is seen."""


InitConfig = Gpt2InitConfig | NormalInitConfig | ScaledInitConfig | SmallInitConfig | T5InitConfig | MupInitConfig
