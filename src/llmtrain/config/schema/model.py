"""The model and its tokenizer."""

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from llmtrain.config.schema.strict import STRICT


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
    published_vocab_size: int | None = Field(default=None, ge=1)
    """Tokens of the vocabulary that the model was published with. `llmtrain show model=` counts with it; a run has the
    vocabulary of its own tokenizer."""


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
