"""GPT-2, and GPT-BigCode (StarCoder, SantaCoder): GPT-2 with one key-value head and plain linear layers."""

from llmtrain.models.layouts.table import Dropouts, Fields, Key, Layout, Only, Part, Rule

ATTENTION, MLP = "transformer.h.{i}.attn.", "transformer.h.{i}.mlp."
GELUS = {"gelu": ("gelu",), "gelu_tanh": ("gelu_new", "gelu_pytorch_tanh")}
OURS: Fields = {"positions": "learned", "norm": "layernorm", "bias": True}


def rules(*, transposed: bool) -> tuple[Rule, ...]:
    """`transposed`: with the library's Conv1D in the place of linear layers."""
    return (
        Rule("trunk.token_embedding", ("transformer.wte",)),
        Rule("trunk.position_embedding", ("transformer.wpe",)),
        Rule("trunk.blocks.{i}.attention_norm", ("transformer.h.{i}.ln_1",)),
        Rule("trunk.blocks.{i}.attention.qkv", (ATTENTION + "c_attn",), transposed=transposed),
        Rule("trunk.blocks.{i}.attention.output", (ATTENTION + "c_proj",), transposed=transposed),
        Rule("trunk.blocks.{i}.feed_forward_norm", ("transformer.h.{i}.ln_2",)),
        Rule("trunk.blocks.{i}.feed_forward.up", (MLP + "c_fc",), transposed=transposed),
        Rule("trunk.blocks.{i}.feed_forward.down", (MLP + "c_proj",), transposed=transposed),
        Rule("trunk.final_norm", ("transformer.ln_f",)),
        Rule("head", ("lm_head",)),
        Rule("score", ("score",)),
    )


def keys(default_activation: str) -> tuple[Part, ...]:
    """The keys that both have."""
    return (
        Key("n_layer", "num_layers"),
        Key("n_embd", "hidden_size"),
        Key("n_head", "num_heads"),
        Key("n_inner", "ffn_hidden_size"),
        Key("n_positions", "max_sequence_length"),
        Key("activation_function", "activation", default_activation, GELUS),
        Key("layer_norm_epsilon", "norm_eps", 1e-5),
        Key("tie_word_embeddings", "tied_embeddings", True),
        Key("initializer_range", "init_std", 0.02),
        Dropouts(("embd_pdrop", "attn_pdrop", "resid_pdrop"), default=0.1),
        Only("scale_attn_weights", True),
        Only("add_cross_attention", False),
    )


GPT2 = Layout(
    model_type="gpt2",
    language_class="GPT2LMHeadModel",
    scalar_class="GPT2ForSequenceClassification",
    trunk_prefix="transformer.",
    ignored=r".*\.attn\.(masked_)?bias",  # causal masks that old versions saved
    rules=rules(transposed=True),
    ours=OURS,
    parts=(*keys("gelu_new"), Only("scale_attn_by_inverse_layer_idx", False)),
)

GPT_BIGCODE = Layout(
    model_type="gpt_bigcode",
    language_class="GPTBigCodeForCausalLM",
    scalar_class="GPTBigCodeForSequenceClassification",
    trunk_prefix="transformer.",
    ignored=r".*\.attn\.(masked_)?bias",
    rules=rules(transposed=False),
    ours={**OURS, "num_kv_heads": 1},
    parts=(*keys("gelu_pytorch_tanh"), Only("multi_query", True, written=True)),
)
