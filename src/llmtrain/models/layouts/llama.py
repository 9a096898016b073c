"""Llama 2 and 3, and the families that differ from it in a key or a norm: Mistral, Qwen2, Qwen3, OLMo 2, Phi-3."""

from llmtrain.models.layouts.rope import OneWindow, Rope, WindowByLayer
from llmtrain.models.layouts.table import AttentionDropout, Dropouts, Key, Layout, Only, Part, Rule, WholeHeads

BLOCK, ATTENTION, MLP = "model.layers.{i}.", "model.layers.{i}.self_attn.", "model.layers.{i}.mlp."
STEM = (
    Rule("trunk.token_embedding", ("model.embed_tokens",)),
    Rule("trunk.blocks.{i}.attention.output", (ATTENTION + "o_proj",)),
    Rule("trunk.blocks.{i}.feed_forward.down", (MLP + "down_proj",)),
    Rule("trunk.final_norm", ("model.norm",)),
    Rule("head", ("lm_head",)),
    Rule("score", ("score",)),
)
SPLIT = (
    Rule("trunk.blocks.{i}.attention.qkv", (ATTENTION + "q_proj", ATTENTION + "k_proj", ATTENTION + "v_proj")),
    Rule("trunk.blocks.{i}.feed_forward.gate_up", (MLP + "gate_proj", MLP + "up_proj")),
)
QK_NORMS = (
    Rule("trunk.blocks.{i}.attention.query_norm", (ATTENTION + "q_norm",)),
    Rule("trunk.blocks.{i}.attention.key_norm", (ATTENTION + "k_norm",)),
)
PRE_NORMS = (
    Rule("trunk.blocks.{i}.attention_norm", (BLOCK + "input_layernorm",)),
    Rule("trunk.blocks.{i}.feed_forward_norm", (BLOCK + "post_attention_layernorm",)),
)
OUTPUT_NORMS = (
    Rule("trunk.blocks.{i}.attention_output_norm", (BLOCK + "post_attention_layernorm",)),
    Rule("trunk.blocks.{i}.feed_forward_output_norm", (BLOCK + "post_feedforward_layernorm",)),
)
IGNORED = r".*\.rotary_emb\.inv_freq"


def sizes(*, max_length: int, norm_eps: float, tied: bool = False, head_dim: int | None = None) -> tuple[Part, ...]:
    """The keys that all of them have, with the values that stand for missing ones."""
    return (
        Key("num_hidden_layers", "num_layers"),
        Key("hidden_size", "hidden_size"),
        Key("num_attention_heads", "num_heads"),
        Key("num_key_value_heads", "num_kv_heads"),
        Key("head_dim", "head_dim", head_dim),
        Key("intermediate_size", "ffn_hidden_size"),
        Key("max_position_embeddings", "max_sequence_length", max_length),
        Key("rms_norm_eps", "norm_eps", norm_eps),
        Key("tie_word_embeddings", "tied_embeddings", tied),
        Key("initializer_range", "init_std", 0.02),
    )


SILU = Key("hidden_act", "activation", "silu", {"swiglu": ("silu", "swish")})
BIAS_OF_ATTENTION = (
    Key("attention_bias", "qkv_bias", False),
    Key("attention_bias", "attention_output_bias", False),
)

LLAMA = Layout(
    model_type="llama",
    language_class="LlamaForCausalLM",
    scalar_class="LlamaForSequenceClassification",
    trunk_prefix="model.",
    ignored=IGNORED,
    rules=(*STEM, *SPLIT, *PRE_NORMS),
    parts=(
        *sizes(max_length=2048, norm_eps=1e-6),
        SILU,
        WholeHeads(),
        *BIAS_OF_ATTENTION,
        Key("mlp_bias", "mlp_bias", False),
        Rope(),
        Only("sliding_window", None),
        AttentionDropout(),
    ),
)

MISTRAL = Layout(
    model_type="mistral",
    language_class="MistralForCausalLM",
    scalar_class="MistralForSequenceClassification",
    trunk_prefix="model.",
    ignored=IGNORED,
    rules=(*STEM, *SPLIT, *PRE_NORMS),
    parts=(*sizes(max_length=131_072, norm_eps=1e-6), SILU, OneWindow(default=4096), Rope(), AttentionDropout()),
)

QWEN2 = Layout(
    model_type="qwen2",
    language_class="Qwen2ForCausalLM",
    scalar_class="Qwen2ForSequenceClassification",
    trunk_prefix="model.",
    ignored=IGNORED,
    rules=(*STEM, *SPLIT, *PRE_NORMS),
    ours={"bias": False, "qkv_bias": True},
    parts=(
        *sizes(max_length=32_768, norm_eps=1e-6),
        SILU,
        WindowByLayer(switch="use_sliding_window"),
        Rope(),
        AttentionDropout(),
    ),
)

QWEN3 = Layout(
    model_type="qwen3",
    language_class="Qwen3ForCausalLM",
    scalar_class="Qwen3ForSequenceClassification",
    trunk_prefix="model.",
    ignored=IGNORED,
    rules=(*STEM, *SPLIT, *QK_NORMS, *PRE_NORMS),
    ours={"qk_norm": "head", "mlp_bias": False},
    parts=(
        *sizes(max_length=32_768, norm_eps=1e-6, head_dim=128),
        SILU,
        *BIAS_OF_ATTENTION,
        WindowByLayer(switch="use_sliding_window"),
        Rope(),
        AttentionDropout(),
    ),
)

OLMO2 = Layout(
    model_type="olmo2",
    language_class="Olmo2ForCausalLM",
    scalar_class="Olmo2ForSequenceClassification",
    trunk_prefix="model.",
    ignored=IGNORED,
    rules=(*STEM, *SPLIT, *QK_NORMS, *OUTPUT_NORMS),
    ours={"qk_norm": "full", "norm_placement": "reordered", "mlp_bias": False},
    parts=(*sizes(max_length=2048, norm_eps=1e-5), SILU, *BIAS_OF_ATTENTION, Rope(), AttentionDropout()),
)

PHI3 = Layout(
    model_type="phi3",
    language_class="Phi3ForCausalLM",
    scalar_class="Phi3ForSequenceClassification",
    trunk_prefix="model.",
    ignored=IGNORED,
    rules=(
        *STEM,
        Rule("trunk.blocks.{i}.attention.qkv", (ATTENTION + "qkv_proj",)),
        Rule("trunk.blocks.{i}.feed_forward.gate_up", (MLP + "gate_up_proj",)),
        *PRE_NORMS,
    ),
    parts=(
        *sizes(max_length=4096, norm_eps=1e-5),
        SILU,
        OneWindow(),
        Rope(default_fraction=1.0, scalings=()),
        Dropouts(("resid_pdrop", "embd_pdrop", "attention_dropout")),
    ),
)
