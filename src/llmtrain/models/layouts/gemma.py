"""Gemma 2, and the text models of Gemma 3."""

from dataclasses import dataclass

from llmtrain.models.layouts.llama import BIAS_OF_ATTENTION, BLOCK, IGNORED, QK_NORMS, SPLIT, STEM, sizes
from llmtrain.models.layouts.rope import Rope, RopeByLayer, WindowByLayer
from llmtrain.models.layouts.table import (
    AttentionDropout,
    Fields,
    Key,
    Layout,
    Only,
    Rule,
    WholeHeads,
    look_up,
)


@dataclass(frozen=True)
class ScaleOfQueries:
    """Scores are divided by the root of this whole number."""

    theirs: str = "query_pre_attn_scalar"
    default: int = 256

    def write(self, ours: Fields) -> Fields:
        scale = ours["attention_scale"]
        return {self.theirs: ours["head_dim"] if scale is None else max(round(scale**-2), 1)}

    def read(self, theirs: Fields, ours: Fields) -> tuple[Fields, list[str]]:
        number = look_up(theirs, self.theirs, self.default)
        return ({} if number == ours.get("head_dim") else {"attention_scale": float(number) ** -0.5}), []


NORMS = (
    Rule("trunk.blocks.{i}.attention_norm", (BLOCK + "input_layernorm",)),
    Rule("trunk.blocks.{i}.attention_output_norm", (BLOCK + "post_attention_layernorm",)),
    Rule("trunk.blocks.{i}.feed_forward_norm", (BLOCK + "pre_feedforward_layernorm",)),
    Rule("trunk.blocks.{i}.feed_forward_output_norm", (BLOCK + "post_feedforward_layernorm",)),
)
OURS: Fields = {
    "norm": "zero_centred_rmsnorm",
    "norm_placement": "sandwich",
    "embedding_scale": "sqrt_hidden_size",
    "mlp_bias": False,
}
GELU = Key("hidden_activation", "activation", "gelu_pytorch_tanh", {"geglu_tanh": ("gelu_pytorch_tanh",)})
CAUSAL = Only("use_bidirectional_attention", False)

GEMMA2 = Layout(
    model_type="gemma2",
    language_class="Gemma2ForCausalLM",
    scalar_class="Gemma2ForSequenceClassification",
    trunk_prefix="model.",
    ignored=IGNORED,
    rules=(*STEM, *SPLIT, *NORMS),
    ours=OURS,
    parts=(
        *sizes(max_length=8192, norm_eps=1e-6, tied=True, head_dim=256),
        GELU,
        CAUSAL,
        WholeHeads(),
        *BIAS_OF_ATTENTION,
        ScaleOfQueries(),
        WindowByLayer(period=2),
        Key("attn_logit_softcapping", "attention_softcap", 50.0),
        Key("final_logit_softcapping", "logit_softcap", 30.0),
        Rope(),
        AttentionDropout(),
    ),
)

GEMMA3 = Layout(
    model_type="gemma3_text",
    language_class="Gemma3ForCausalLM",
    scalar_class="Gemma3TextForSequenceClassification",
    trunk_prefix="model.",
    ignored=IGNORED,
    rules=(*STEM, *SPLIT, *QK_NORMS, *NORMS),
    ours={**OURS, "qk_norm": "head"},
    parts=(
        *sizes(max_length=131_072, norm_eps=1e-6, tied=True, head_dim=256),
        GELU,
        CAUSAL,
        WholeHeads(),
        *BIAS_OF_ATTENTION,
        ScaleOfQueries(),
        WindowByLayer(period=6),
        Only("attn_logit_softcapping", None),
        Key("final_logit_softcapping", "logit_softcap"),
        RopeByLayer(default_theta=1_000_000.0, default_local_theta=10_000.0),
        AttentionDropout(),
    ),
)
