"""GPT-NeoX and Pythia: attention and feed-forward part side by side, a quarter of each head rotated."""

from llmtrain.models.layouts.rope import Rope
from llmtrain.models.layouts.table import Dropouts, Key, Layout, Rule

BLOCK = "gpt_neox.layers.{i}."

GPT_NEOX = Layout(
    model_type="gpt_neox",
    language_class="GPTNeoXForCausalLM",
    scalar_class="GPTNeoXForSequenceClassification",
    trunk_prefix="gpt_neox.",
    ignored=r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
    renamed=((r"^lm_head\.", "embed_out."),),
    rules=(
        Rule("trunk.token_embedding", ("gpt_neox.embed_in",)),
        Rule("trunk.blocks.{i}.attention_norm", (BLOCK + "input_layernorm",)),
        Rule("trunk.blocks.{i}.attention.qkv", (BLOCK + "attention.query_key_value",), grouped=True),
        Rule("trunk.blocks.{i}.attention.output", (BLOCK + "attention.dense",)),
        Rule("trunk.blocks.{i}.feed_forward_norm", (BLOCK + "post_attention_layernorm",)),
        Rule("trunk.blocks.{i}.feed_forward.up", (BLOCK + "mlp.dense_h_to_4h",)),
        Rule("trunk.blocks.{i}.feed_forward.down", (BLOCK + "mlp.dense_4h_to_h",)),
        Rule("trunk.final_norm", ("gpt_neox.final_layer_norm",)),
        Rule("head", ("embed_out",)),
        Rule("score", ("score",)),
    ),
    ours={"norm": "layernorm", "norm_bias": True, "mlp_bias": True},
    parts=(
        Key("num_hidden_layers", "num_layers"),
        Key("hidden_size", "hidden_size"),
        Key("num_attention_heads", "num_heads"),
        Key("intermediate_size", "ffn_hidden_size"),
        Key("max_position_embeddings", "max_sequence_length", 2048),
        Key("hidden_act", "activation", "gelu", {
            "gelu": ("gelu",), "gelu_tanh": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "relu": ("relu",),
            "relu_squared": ("relu2",),
        }),
        Key("use_parallel_residual", "block", True, {"parallel": (True,), "sequential": (False,)}),
        Key("attention_bias", "qkv_bias", True),
        Key("attention_bias", "attention_output_bias", True),
        Key("layer_norm_eps", "norm_eps", 1e-5),
        Key("tie_word_embeddings", "tied_embeddings", False),
        Key("initializer_range", "init_std", 0.02),
        Rope(theta="rotary_emb_base", fraction="rotary_pct", default_fraction=0.25),
        Dropouts(("attention_dropout", "hidden_dropout")),
    ),
)  # fmt: skip
