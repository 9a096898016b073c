"""BLOOM: ALiBi, and a norm behind the embeddings."""

from llmtrain.models.layouts.table import Dropouts, Key, Layout, Only, Rule, WholeHeads

BLOCK = "transformer.h.{i}."

BLOOM = Layout(
    model_type="bloom",
    language_class="BloomForCausalLM",
    scalar_class="BloomForSequenceClassification",
    trunk_prefix="transformer.",
    rules=(
        Rule("trunk.token_embedding", ("transformer.word_embeddings",)),
        Rule("trunk.embedding_norm", ("transformer.word_embeddings_layernorm",)),
        Rule("trunk.blocks.{i}.attention_norm", (BLOCK + "input_layernorm",)),
        Rule("trunk.blocks.{i}.attention.qkv", (BLOCK + "self_attention.query_key_value",), grouped=True),
        Rule("trunk.blocks.{i}.attention.output", (BLOCK + "self_attention.dense",)),
        Rule("trunk.blocks.{i}.feed_forward_norm", (BLOCK + "post_attention_layernorm",)),
        Rule("trunk.blocks.{i}.feed_forward.up", (BLOCK + "mlp.dense_h_to_4h",)),
        Rule("trunk.blocks.{i}.feed_forward.down", (BLOCK + "mlp.dense_4h_to_h",)),
        Rule("trunk.final_norm", ("transformer.ln_f",)),
        Rule("head", ("lm_head",)),
        Rule("score", ("score",)),
    ),
    ours={
        "positions": "alibi", "norm": "layernorm", "embedding_norm": "added", "bias": True, "activation": "gelu_tanh",
    },
    parts=(
        Key("n_layer", "num_layers"),
        Key("hidden_size", "hidden_size"),
        Key("n_head", "num_heads"),
        Key("seq_length", "max_sequence_length", 2048),
        Key("layer_norm_epsilon", "norm_eps", 1e-5),
        Key("tie_word_embeddings", "tied_embeddings", True),
        Key("initializer_range", "init_std", 0.02),
        WholeHeads(),
        Dropouts(("hidden_dropout", "attention_dropout")),
        Only("apply_residual_connection_post_layernorm", False),
    ),
)  # fmt: skip
