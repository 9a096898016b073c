"""T5: the first one, and version 1.1 with gates and an output matrix of its own."""

from dataclasses import dataclass

from llmtrain.models.layouts.table import Fields, Inexpressible, Key, Layout, Only, Rule, look_up

ENCODER, DECODER = "encoder.block.{i}.layer.", "decoder.block.{i}.layer."
ACTIVATIONS = {
    "geglu_tanh": ("gated-gelu", "gated-gelu_new"), "swiglu": ("gated-silu",), "relu": ("relu",), "gelu": ("gelu",),
    "gelu_tanh": ("gelu_new",),
}  # fmt: skip


@dataclass(frozen=True)
class Stacks:
    """`num_layers` are the encoder's, and the decoder's too where it has none of its own."""

    def write(self, ours: Fields) -> Fields:
        return {"num_layers": ours["encoder_layers"], "num_decoder_layers": ours["num_layers"]}

    def read(self, theirs: Fields, ours: Fields) -> tuple[Fields, list[str]]:
        encoder = look_up(theirs, "num_layers", 6)
        return {"encoder_layers": encoder, "num_layers": theirs.get("num_decoder_layers") or encoder}, []


@dataclass(frozen=True)
class Head:
    """The token embedding, which hidden states are scaled for, or a matrix of its own, for which they are not.

    New versions of the library say by `scale_decoder_outputs` alone which one it is.
    """

    def write(self, ours: Fields) -> Fields:
        tied = ours["tied_embeddings"]
        if ours["logit_scale"] != (ours["hidden_size"] ** -0.5 if tied else 1.0):
            raise Inexpressible
        return {"tie_word_embeddings": tied, "scale_decoder_outputs": tied}

    def read(self, theirs: Fields, ours: Fields) -> tuple[Fields, list[str]]:
        scaled = look_up(theirs, "scale_decoder_outputs", theirs.get("tie_word_embeddings") is not False)
        return {"tied_embeddings": scaled, "logit_scale": ours["hidden_size"] ** -0.5 if scaled else 1.0}, []


def attention(ours: str, theirs: str) -> tuple[Rule, ...]:
    """Self-attention."""
    return (
        Rule(f"{ours}.attention.qkv", tuple(f"{theirs}0.SelfAttention.{each}" for each in "qkv")),
        Rule(f"{ours}.attention.output", (theirs + "0.SelfAttention.o",)),
        Rule(f"{ours}.attention_norm", (theirs + "0.layer_norm",)),
    )


def feed_forward(ours: str, theirs: str) -> tuple[Rule, ...]:
    """The feed-forward part, with a gate or without one."""
    dense = f"{theirs}.DenseReluDense."
    return (
        Rule(f"{ours}.feed_forward.gate_up", (dense + "wi_0", dense + "wi_1")),
        Rule(f"{ours}.feed_forward.up", (dense + "wi",)),
        Rule(f"{ours}.feed_forward.down", (dense + "wo",)),
        Rule(f"{ours}.feed_forward_norm", (theirs + ".layer_norm",)),
    )


CROSS = DECODER + "1.EncDecAttention."
BIAS = "block.0.layer.0.SelfAttention.relative_attention_bias"

T5 = Layout(
    model_type="t5",
    language_class="T5ForConditionalGeneration",
    scalar_class="T5ForSequenceClassification",
    ignored=r"(en|de)coder\.embed_tokens\.weight|decoder\.block\.0\.layer\.1\..*relative_attention_bias\.weight",
    head_from="shared.weight",
    rules=(
        Rule("trunk.token_embedding", ("shared",)),
        Rule("encoder.relative_bias", ("encoder." + BIAS,)),
        *attention("encoder.blocks.{i}", ENCODER),
        *feed_forward("encoder.blocks.{i}", ENCODER + "1"),
        Rule("encoder.final_norm", ("encoder.final_layer_norm",)),
        Rule("trunk.relative_bias", ("decoder." + BIAS,)),
        *attention("trunk.blocks.{i}", DECODER),
        Rule("trunk.blocks.{i}.cross_attention.query", (CROSS + "q",)),
        Rule("trunk.blocks.{i}.cross_attention.key_value", (CROSS + "k", CROSS + "v")),
        Rule("trunk.blocks.{i}.cross_attention.output", (CROSS + "o",)),
        Rule("trunk.blocks.{i}.cross_attention_norm", (DECODER + "1.layer_norm",)),
        *feed_forward("trunk.blocks.{i}", DECODER + "2"),
        Rule("trunk.final_norm", ("decoder.final_layer_norm",)),
        Rule("head", ("lm_head",)),
    ),
    ours={"architecture": "encoder_decoder", "positions": "relative", "attention_scale": 1.0},
    parts=(
        Stacks(),
        Key("d_model", "hidden_size", 512),
        Key("num_heads", "num_heads", 8),
        Key("d_kv", "head_dim", 64),
        Key("d_ff", "ffn_hidden_size", 2048),
        Key("n_positions", "max_sequence_length", 512),
        Key("relative_attention_num_buckets", "relative_buckets", 32),
        Key("relative_attention_max_distance", "relative_max_distance", 128),
        Key("layer_norm_epsilon", "norm_eps", 1e-6),
        Key("feed_forward_proj", "activation", "relu", ACTIVATIONS),
        Key("dropout_rate", "dropout", 0.1),
        Head(),
        Only("is_encoder_decoder", True, written=True),
    ),
)
