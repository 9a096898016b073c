"""The model and its tokenizer."""

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from llmtrain.config.schema.strict import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ExpertsConfig:
    """Layers whose feed-forward part is several experts, of which a router picks a few for each token.

    Read by `models/experts.py`; the losses and the balance by `objectives/routing.py`.
    """

    num_experts: int = Field(default=8, ge=2)
    """Routed experts of a layer."""
    experts_per_token: int = Field(default=2, ge=1)
    """Experts that each token is sent to (Switch: 1, Mixtral: 2)."""
    shared_experts: int = Field(default=0, ge=0)
    """Experts beside them that every token goes through (DeepSeek)."""
    ffn_hidden_size: int | None = Field(default=None, ge=1)
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


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """The architecture to build, or the folder to take it from. Read by `models/transformer.py`."""

    init_from: str | None = None
    """Start from this folder's weights and architecture: a run, a checkpoint or a Transformers folder."""
    adapter_from: str | None = None
    """Add the LoRA weights of this folder, as peft saves them, to those of `init_from`."""
    num_layers: int = Field(default=4, ge=1)
    """Number of blocks."""
    hidden_size: int = Field(default=128, ge=1)
    """Width of the residual stream."""
    num_heads: int = Field(default=4, ge=1)
    """Query heads; must divide `hidden_size`."""
    num_kv_heads: int | None = Field(default=None, ge=1)
    """Key-value heads (grouped-query attention); must divide `num_heads`. Null: as many as `num_heads`."""
    ffn_hidden_size: int | None = Field(default=None, ge=1)
    """Inner width of the feed-forward part. Null: 4 x hidden (GELU), 8/3 x hidden up to a multiple of 64 (SwiGLU)."""
    max_sequence_length: int = Field(default=512, ge=2)
    """Longest sequence in tokens that the model is built for."""
    positions: Literal["rope", "learned"] = "rope"
    """How positions enter: rotary embedding (Llama) or a learned table (GPT-2)."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalisation before attention, before the feed-forward part and at the end."""
    activation: Literal["swiglu", "gelu", "gelu_tanh"] = "swiglu"
    """Feed-forward kind: gated SiLU (Llama), exact GELU, or its tanh approximation (GPT-2)."""
    bias: bool = False
    """Biases in linear layers and LayerNorm (GPT-2: true, Llama: false)."""
    tied_embeddings: bool = True
    """Use the token embedding as the output head."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    """Base of the rotary frequencies."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Added to the variance in the norms."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on embeddings, attention weights and both residual branches during training."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights; projections into the residual stream get it / sqrt(2 x layers)."""
    experts: ExpertsConfig | None = None
    """Mixture of experts in place of the feed-forward part. Null: all layers are dense."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TokenizerConfig:
    """Which tokenizer, or how to train one. Read by `data/tokenizers.py`."""

    path: str | None = None
    """A `tokenizer.json`, or a folder that holds one. Null: train one on the mixture."""
    vocab_size: int = Field(default=2048, ge=300)
    """Size of a tokenizer that is trained here, special tokens included."""
    train_bytes: int = Field(default=20_000_000, ge=1)
    """Bytes of text, drawn from the sources by weight, that a tokenizer is trained on."""
    chat_template: str | None = None
    """A Jinja file to store as chat template. Null: the one stored with the tokenizer, else our own."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelTokenizerConfig:
    """The tokenizer of a model that exists already. Read by `data/tokenizers.py`."""

    path: str | None = None
    """A folder with `tokenizer.json`, where the model's own folder has none. Null: the model's."""
    chat_template: str | None = None
    """A Jinja file to use as chat template from here on. Null: the one stored with the tokenizer, else our own."""
