"""ModernBERT: an encoder with rotary positions, windows in most layers, gates, and hardly any biases."""

from dataclasses import dataclass
from typing import Any

from llmtrain.models.layouts.llama import BIAS_OF_ATTENTION
from llmtrain.models.layouts.rope import FULL, SLIDING, RopeByLayer, WindowByLayer
from llmtrain.models.layouts.table import Dropouts, Fields, Key, Layout, Only, Rule, Same, WholeHeads

BLOCK = "model.layers.{i}."
GATES = {"geglu": ("gelu",), "geglu_tanh": ("gelu_pytorch_tanh", "gelu_new"), "swiglu": ("silu", "swish")}


@dataclass(frozen=True)
class WindowBothWays(WindowByLayer):
    """`local_attention` counts what is seen on both sides, one's own position left out."""

    period: int = 3

    def write(self, ours: Fields) -> Fields:
        theirs = super().write(ours)
        return {"layer_types": theirs["layer_types"], "local_attention": 2 * (theirs["sliding_window"] - 1)}

    def read(self, theirs: Fields, ours: Fields) -> tuple[Fields, list[str]]:
        return super().read({**theirs, "sliding_window": theirs.get("local_attention", 128) // 2 + 1}, ours)

    def _default_types(self, theirs: Fields, num_layers: Any) -> list[str]:
        layers = num_layers if isinstance(num_layers, int) else 0
        period = theirs.get("global_attn_every_n_layers", self.period)
        return [SLIDING if layer % period else FULL for layer in range(layers)]


MODERNBERT = Layout(
    model_type="modernbert",
    language_class="ModernBertForMaskedLM",
    scalar_class="ModernBertForSequenceClassification",
    trunk_prefix="model.",
    ignored=r"decoder\.weight",
    rules=(
        Rule("trunk.token_embedding", ("model.embeddings.tok_embeddings",)),
        Rule("trunk.embedding_norm", ("model.embeddings.norm",)),
        Rule("trunk.blocks.{i}.attention_norm", (BLOCK + "attn_norm",)),
        Rule("trunk.blocks.{i}.attention.qkv", (BLOCK + "attn.Wqkv",)),
        Rule("trunk.blocks.{i}.attention.output", (BLOCK + "attn.Wo",)),
        Rule("trunk.blocks.{i}.feed_forward_norm", (BLOCK + "mlp_norm",)),
        Rule("trunk.blocks.{i}.feed_forward.gate_up", (BLOCK + "mlp.Wi",)),
        Rule("trunk.blocks.{i}.feed_forward.down", (BLOCK + "mlp.Wo",)),
        Rule("trunk.final_norm", ("model.final_norm",)),
        Rule("mlm_head.dense", ("head.dense",)),
        Rule("mlm_head.norm", ("head.norm",)),
        Rule("mlm_head", ("decoder",)),
    ),
    ours={"architecture": "encoder", "norm": "layernorm", "embedding_norm": "first", "mlm_head": True},
    parts=(
        Key("num_hidden_layers", "num_layers"),
        Key("hidden_size", "hidden_size"),
        Key("num_attention_heads", "num_heads"),
        Key("intermediate_size", "ffn_hidden_size", 1152),
        Key("max_position_embeddings", "max_sequence_length", 8192),
        Key("norm_eps", "norm_eps", 1e-5),
        Key("initializer_range", "init_std", 0.02),
        Key("norm_bias", "norm_bias", False),
        Same((
            Key("hidden_activation", "activation", "gelu", GATES),
            Key("classifier_activation", "activation", "gelu", GATES),
        )),
        Same((Key("mlp_bias", "mlp_bias", False), Key("classifier_bias", "mlp_bias", False))),
        *BIAS_OF_ATTENTION,
        WholeHeads(),
        WindowBothWays(),
        RopeByLayer(160_000.0, 10_000.0, theta="global_rope_theta", local_theta="local_rope_theta"),
        Dropouts(("attention_dropout", "embedding_dropout", "mlp_dropout")),
        Only("decoder_bias", True),
        Only("tie_word_embeddings", True),
    ),
)  # fmt: skip
