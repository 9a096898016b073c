"""Falcon 7B: one key-value head, attention and feed-forward part side by side behind one norm."""

from llmtrain.models.layouts.rope import Rope
from llmtrain.models.layouts.table import AttentionDropout, Key, Layout, Only, Rule

BLOCK = "transformer.h.{i}."
GELUS = {"gelu": ("gelu",), "gelu_tanh": ("gelu_new", "gelu_pytorch_tanh")}

FALCON = Layout(
    model_type="falcon",
    language_class="FalconForCausalLM",
    scalar_class="FalconForSequenceClassification",
    trunk_prefix="transformer.",
    rules=(
        Rule("trunk.token_embedding", ("transformer.word_embeddings",)),
        Rule("trunk.blocks.{i}.attention_norm", (BLOCK + "input_layernorm",)),
        Rule("trunk.blocks.{i}.attention.qkv", (BLOCK + "self_attention.query_key_value",)),
        Rule("trunk.blocks.{i}.attention.output", (BLOCK + "self_attention.dense",)),
        Rule("trunk.blocks.{i}.feed_forward.up", (BLOCK + "mlp.dense_h_to_4h",)),
        Rule("trunk.blocks.{i}.feed_forward.down", (BLOCK + "mlp.dense_4h_to_h",)),
        Rule("trunk.final_norm", ("transformer.ln_f",)),
        Rule("head", ("lm_head",)),
        Rule("score", ("score",)),
    ),
    ours={"norm": "layernorm", "norm_bias": True, "block": "parallel_shared_norm", "num_kv_heads": 1},
    parts=(
        Key("num_hidden_layers", "num_layers"),
        Key("hidden_size", "hidden_size"),
        Key("num_attention_heads", "num_heads"),
        Key("ffn_hidden_size", "ffn_hidden_size"),
        Key("max_position_embeddings", "max_sequence_length", 2048),
        Key("activation", "activation", "gelu", GELUS),
        Key("bias", "qkv_bias", False),
        Key("bias", "attention_output_bias", False),
        Key("bias", "mlp_bias", False),
        Key("layer_norm_epsilon", "norm_eps", 1e-5),
        Key("tie_word_embeddings", "tied_embeddings", True),
        Key("initializer_range", "init_std", 0.02),
        Only("multi_query", True, written=True),
        Only("parallel_attn", True, written=True),
        Only("new_decoder_architecture", False, written=True),
        Only("alibi", False, written=True),
        Rope(),
        AttentionDropout(),
        AttentionDropout("hidden_dropout"),
    ),
)
