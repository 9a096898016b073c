"""The model and its tokenizer."""

import dataclasses
from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from llmtrain.config.schema.experts import MAX_INNER_WIDTH, ExpertsConfig
from llmtrain.config.schema.initialisation import Gpt2InitConfig, InitConfig, MupInitConfig
from llmtrain.config.schema.rope import RopeScaling
from llmtrain.config.schema.strict import STRICT

BiasedPart = Literal["qkv", "attention_output", "mlp", "norm"]

# Far beyond any model; up to here the numbers of elements of all tensors can be counted.
MAX_LAYERS, MAX_WIDTH, MAX_HEADS, MAX_LENGTH = 2**14, 2**20, 2**16, 2**31


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """The architecture to build, or the folder to take it from. Read by `models/transformer.py`."""

    init_from: str | None = None
    """Start from this folder's weights and architecture: a run, a checkpoint or a Transformers folder."""
    adapter_from: str | None = None
    """Add the LoRA weights of this folder, as peft saves them, to those of `init_from`."""
    architecture: Literal["decoder", "encoder", "encoder_decoder"] = "decoder"
    """What a position sees: what is before it (GPT), all of its document (BERT), or what is before it and all of a
    source that an encoder has read (T5)."""
    num_layers: int = Field(default=4, ge=1, le=MAX_LAYERS)
    """Number of blocks; those of the decoder where there is an encoder beside it."""
    encoder_layers: int | None = Field(default=None, ge=1, le=MAX_LAYERS)
    """Number of blocks of the encoder beside a decoder. Null: as many as `num_layers`."""
    hidden_size: int = Field(default=128, ge=1, le=MAX_WIDTH)
    """Width of the residual stream."""
    num_heads: int = Field(default=4, ge=1, le=MAX_HEADS)
    """Query heads; must divide `hidden_size`, unless `head_dim` is given."""
    num_kv_heads: int | None = Field(default=None, ge=1, le=MAX_HEADS)
    """Key-value heads (grouped-query attention); must divide `num_heads`. Null: as many as `num_heads`."""
    head_dim: int | None = Field(default=None, ge=1, le=MAX_WIDTH)
    """Width of a head. Null: `hidden_size` / `num_heads`."""
    ffn_hidden_size: int | None = Field(default=None, ge=1, le=MAX_INNER_WIDTH)
    """Inner width of the feed-forward part. Null: 4 x hidden, with a gate 8/3 x hidden up to a multiple of 64."""
    max_sequence_length: int = Field(default=512, ge=2, le=MAX_LENGTH)
    """Longest sequence in tokens that the model is built for."""
    positions: Literal["rope", "learned", "sinusoidal", "alibi", "relative", "none"] = "rope"
    """How positions enter: rotary embedding (Llama), a table learned (GPT-2) or of sines added to the embeddings,
    distances taken off the scores (ALiBi: MPT), a number learned for each bucket of distances (T5), or not at all."""
    position_offset: int = Field(default=0, ge=0, le=MAX_LENGTH)
    """Rows of the table of learned positions that stand before the first one's and are never read (RoBERTa: 2)."""
    relative_buckets: int = Field(default=32, ge=4, le=MAX_WIDTH)
    """Buckets of distances with relative positions; where both directions are seen, half of them for each."""
    relative_max_distance: int = Field(default=128, ge=2)
    """Distances from here on share the last bucket."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    """Base of the rotary frequencies."""
    rope_local_theta: float | None = Field(default=None, gt=0)
    """Base in layers with a sliding window, unscaled there (Gemma 3: 10,000). Null: the same rotation in all layers."""
    rope_scaling: RopeScaling | None = Field(default=None, discriminator="name")
    """Longer sequences than were trained on: linear, dynamic (NTK), yarn or llama3, each with its factor."""
    partial_rotary_factor: float = Field(default=1.0, gt=0, le=1)
    """Share of each head that is rotated, from its beginning (GPT-NeoX: 0.25)."""
    sliding_window: int | None = Field(default=None, ge=1)
    """Positions that one sees, its own and those just before; in an encoder as many behind it too. Null: all."""
    attention_pattern: list[Literal["sliding", "full"]] | None = Field(default=None, min_length=1)
    """Which layers have the window, repeated over the layers (Gemma 2: [sliding, full]). Null: all."""
    qk_norm: Literal["none", "head", "full"] = "none"
    """Normalise queries and keys: each head (Qwen3, Gemma 3), or the whole projection (OLMo 2)."""
    attention_scale: float | None = Field(default=None, gt=0)
    """What scores are multiplied by. Null: 1 / sqrt(head_dim)."""
    attention_softcap: float | None = Field(default=None, gt=0)
    """Scores s become c tanh(s / c) (Gemma 2: 50). Null: they stay."""
    attention_sinks: bool = False
    """A learned number of each head joins its scores, so that it can attend to nothing (gpt-oss)."""
    norm: Literal["rmsnorm", "layernorm", "zero_centred_rmsnorm"] = "rmsnorm"
    """Normalisation; the weight of zero_centred_rmsnorm is what is added to 1 (Gemma)."""
    norm_placement: Literal["pre", "post", "reordered", "sandwich"] = "pre"
    """Where norms stand: before each branch, after its addition (the first Transformer; then none at the end), on its
    output (OLMo 2), or before it and on its output (Gemma 2)."""
    embedding_norm: Literal["none", "added", "first"] = "none"
    """A norm behind the embeddings (BERT, BLOOM: added), in the place of the first block's own (ModernBERT: first)."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Added to the variance in the norms."""
    block: Literal["sequential", "parallel", "parallel_shared_norm"] = "sequential"
    """The feed-forward part reads what attention has added to, or the same as attention: behind a norm of its own
    (GPT-NeoX), or behind attention's (Falcon)."""
    activation: Literal["swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh", "relu", "relu_squared"] = "swiglu"
    """Feed-forward kind: gated SiLU (Llama), gated exact GELU or its tanh approximation (Gemma), or without a gate."""
    bias: bool = False
    """Biases in linear layers and LayerNorm (GPT-2: true, Llama: false)."""
    qkv_bias: bool | None = None
    """Biases of queries, keys and values (Qwen2: true). Null: as `bias`."""
    attention_output_bias: bool | None = None
    """Bias of attention's output projection. Null: as `bias`."""
    mlp_bias: bool | None = None
    """Biases of the feed-forward part. Null: as `bias`."""
    norm_bias: bool | None = None
    """Biases of LayerNorm (Falcon: true). Null: as `bias`."""
    num_segments: int = Field(default=0, ge=0, le=MAX_WIDTH)
    """Kinds of segments, each with an embedding that is added to its tokens' (BERT: 2)."""
    pooler: bool = False
    """A dense layer and tanh over the first position, which says whether the second segment follows (BERT)."""
    mlm_head: bool = False
    """A dense layer, activation and norm before the output matrix, and a bias behind it (BERT)."""
    tied_embeddings: bool = True
    """Use the token embedding as the output head."""
    embedding_scale: float | Literal["sqrt_hidden_size"] = 1.0
    """What token embeddings are multiplied by, before positions are added (Gemma: sqrt_hidden_size)."""
    logit_scale: float = Field(default=1.0, gt=0)
    """What the logits are multiplied by."""
    logit_softcap: float | None = Field(default=None, gt=0)
    """Logits z become c tanh(z / c) (Gemma 2: 30). Null: they stay."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on embeddings, attention weights and both residual branches during training."""
    stochastic_depth: float = Field(default=0.0, ge=0, lt=1)
    """Probability that a row goes past a branch of the last layer during training; it rises linearly over the layers
    (Huang et al. 2016)."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights; projections into the residual stream get it / sqrt(2 x layers)."""
    init: InitConfig = Field(default_factory=Gpt2InitConfig, discriminator="name")
    experts: ExpertsConfig | None = None
    """Mixture of experts in place of the feed-forward part. Null: all layers are dense."""
    published_vocab_size: int | None = Field(default=None, ge=1)
    """Tokens of the vocabulary that the model was published with. `llmtrain show model=` counts with it; a run has the
    vocabulary of its own tokenizer."""

    @property
    def kv_heads(self) -> int:
        """`num_kv_heads`, or what null means."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        """`head_dim`, or what null means."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def width_ratio(self) -> float:
        """The width, over that of the base model of muP; 1 without muP."""
        return self.hidden_size / self.init.base_hidden_size if isinstance(self.init, MupInitConfig) else 1.0

    @property
    def is_causal(self) -> bool:
        """Whether a position sees nothing that stands behind it."""
        return self.architecture != "encoder"

    @property
    def encoder(self) -> "ModelConfig":
        """The encoder beside the decoder, as an architecture of its own."""
        layers = self.encoder_layers or self.num_layers
        return dataclasses.replace(self, architecture="encoder", num_layers=layers, encoder_layers=None)

    @property
    def windows(self) -> list[int | None]:
        """The sliding window of each layer; None where a position sees all before it."""
        pattern = self.attention_pattern or ["sliding"]
        kinds = (pattern[layer % len(pattern)] for layer in range(self.num_layers))
        return [self.sliding_window if kind == "sliding" else None for kind in kinds]

    @property
    def sparse_layers(self) -> list[bool]:
        """Whether each layer has experts in the place of a dense feed-forward part."""
        first, step = (self.experts.first_layer, self.experts.layer_step) if self.experts else (self.num_layers, 1)
        return [layer >= first and (layer - first) % step == 0 for layer in range(self.num_layers)]

    def has_bias(self, part: BiasedPart) -> bool:
        """Whether the layers of this part have biases; norms only where they are LayerNorm."""
        if part == "norm" and self.norm != "layernorm":
            return False
        own: bool | None = getattr(self, f"{part}_bias")
        return self.bias if own is None else own


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TokenizerConfig:
    """Which tokenizer, or how to train one. Read by `data/tokenizers.py`."""

    path: str | None = None
    """A `tokenizer.json`, or a folder that holds one. Null: train one on the mixture."""
    vocab_size: int = Field(default=2048, ge=300)
    """Size of a tokenizer that is trained here, special tokens included."""
    train_bytes: int = Field(default=20_000_000, ge=1)
    """Bytes of text, drawn from the sources by weight, that a tokenizer is trained on."""
    special_tokens_for: list[Literal["masked", "span_corruption", "fill_in_the_middle"]] = Field(default_factory=list)
    """Objectives whose special tokens a tokenizer that is trained here gets, besides those of the run's own."""
    chat_template: str | None = None
    """A Jinja file to store as chat template. Null: the one stored with the tokenizer, else our own."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelTokenizerConfig:
    """The tokenizer of a model that exists already. Read by `data/tokenizers.py`."""

    path: str | None = None
    """A folder with `tokenizer.json`, where the model's own folder has none. Null: the model's."""
    chat_template: str | None = None
    """A Jinja file to use as chat template from here on. Null: the one stored with the tokenizer, else our own."""
