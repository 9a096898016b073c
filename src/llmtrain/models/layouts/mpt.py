"""MPT: ALiBi in the place of positions, no biases anywhere."""

from llmtrain.models.layouts.table import AttentionDropout, Key, Layout, Only, Rule

BLOCK = "transformer.blocks.{i}."

MPT = Layout(
    model_type="mpt",
    language_class="MptForCausalLM",
    scalar_class="MptForSequenceClassification",
    trunk_prefix="transformer.",
    rules=(
        Rule("trunk.token_embedding", ("transformer.wte",)),
        Rule("trunk.blocks.{i}.attention_norm", (BLOCK + "norm_1",)),
        Rule("trunk.blocks.{i}.attention.qkv", (BLOCK + "attn.Wqkv",)),
        Rule("trunk.blocks.{i}.attention.output", (BLOCK + "attn.out_proj",)),
        Rule("trunk.blocks.{i}.feed_forward_norm", (BLOCK + "norm_2",)),
        Rule("trunk.blocks.{i}.feed_forward.up", (BLOCK + "ffn.up_proj",)),
        Rule("trunk.blocks.{i}.feed_forward.down", (BLOCK + "ffn.down_proj",)),
        Rule("trunk.final_norm", ("transformer.norm_f",)),
        Rule("head", ("lm_head",)),
        Rule("score", ("score",)),
    ),
    ours={"positions": "alibi", "norm": "layernorm", "bias": False, "activation": "gelu"},
    parts=(
        Key("n_layers", "num_layers"),
        Key("d_model", "hidden_size"),
        Key("n_heads", "num_heads"),
        Key("max_seq_len", "max_sequence_length", 2048),
        Key("attn_config.softmax_scale", "attention_scale"),
        Key("layer_norm_epsilon", "norm_eps", 1e-5),
        Key("tie_word_embeddings", "tied_embeddings", True),
        Key("initializer_range", "init_std", 0.02),
        Only("attn_config.alibi", True, written=True),
        Only("attn_config.alibi_bias_max", 8),
        Only("attn_config.attn_type", "multihead_attention"),
        Only("attn_config.clip_qkv", None),
        Only("attn_config.qk_ln", False),
        Only("attn_config.prefix_lm", False),
        Only("expansion_ratio", 4),
        Only("no_bias", True),
        Only("logit_scale", None),
        Only("attn_config.attn_pdrop", 0),
        Only("resid_pdrop", 0.0),
        Only("emb_pdrop", 0.0),
        AttentionDropout("llmtrain.dropout"),  # theirs must be a whole number
    ),
)
