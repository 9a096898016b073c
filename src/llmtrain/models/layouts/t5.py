"""T5: the first one, and version 1.1 with gates and an output matrix of its own."""

from collections.abc import Callable
from dataclasses import dataclass

from llmtrain.models.layouts.table import Fields, Inexpressible, Key, Layout, Only, Part, Rule, look_up

IGNORED = r"(en|de)coder\.embed_tokens\.weight|decoder\.block\.0\.layer\.1\..*relative_attention_bias\.weight"
ALWAYS = {"architecture": "encoder_decoder", "positions": "relative", "attention_scale": 1.0}
BIAS = "block.0.layer.0.SelfAttention.relative_attention_bias"
ACTIVATIONS = {
    "geglu_tanh": ("gated-gelu", "gated-gelu_new"), "swiglu": ("gated-silu",), "relu": ("relu",), "gelu": ("gelu",),
    "gelu_tanh": ("gelu_new",),
}  # fmt: skip


@dataclass(frozen=True)
class Stacks:
    """`num_layers` are the encoder's, and the decoder's too where it has none of its own."""

    default: int

    def write(self, ours: Fields) -> Fields:
        return {"num_layers": ours["encoder_layers"], "num_decoder_layers": ours["num_layers"]}

    def read(self, theirs: Fields, ours: Fields) -> tuple[Fields, list[str]]:
        encoder = look_up(theirs, "num_layers", self.default)
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
        return {"tied_embeddings": scaled, "logit_scale": scale_of_tied(ours) if scaled else 1.0}, []


def scale_of_tied(ours: Fields) -> float:
    """1 / √H; of a width that is none, which others say, anything."""
    size = ours["hidden_size"]
    return float(size**-0.5) if isinstance(size, int) and size > 0 else 1.0


def dense(ours: str, theirs: str) -> tuple[Rule, ...]:
    """The feed-forward part, with a gate or without one."""
    theirs += "DenseReluDense."
    return (
        Rule(f"{ours}.gate_up", (theirs + "wi_0", theirs + "wi_1")),
        Rule(f"{ours}.up", (theirs + "wi",)),
        Rule(f"{ours}.down", (theirs + "wo",)),
    )


def stack(ours: str, theirs: str, last: int, feed_forward: Callable[[str, str], tuple[Rule, ...]]) -> tuple[Rule, ...]:
    """The encoder or the decoder: self-attention, and in layer `last` of each block the feed-forward part's names."""
    block, their_block = f"{ours}.blocks.{{i}}", f"{theirs}.block.{{i}}.layer."
    return (
        Rule(f"{ours}.relative_bias", (f"{theirs}.{BIAS}",)),
        Rule(f"{block}.attention.qkv", tuple(f"{their_block}0.SelfAttention.{each}" for each in "qkv")),
        Rule(f"{block}.attention.output", (their_block + "0.SelfAttention.o",)),
        Rule(f"{block}.attention_norm", (their_block + "0.layer_norm",)),
        *feed_forward(f"{block}.feed_forward", f"{their_block}{last}."),
        Rule(f"{block}.feed_forward_norm", (f"{their_block}{last}.layer_norm",)),
        Rule(f"{ours}.final_norm", (f"{theirs}.final_layer_norm",)),
    )


def both_stacks(feed_forward: Callable[[str, str], tuple[Rule, ...]]) -> tuple[Rule, ...]:
    """All names, with those that `feed_forward` gives of a feed-forward part."""
    block, theirs = "trunk.blocks.{i}.cross_attention", "decoder.block.{i}.layer.1."
    return (
        Rule("trunk.token_embedding", ("shared",)),
        *stack("encoder", "encoder", 1, feed_forward),
        *stack("trunk", "decoder", 2, feed_forward),
        Rule(f"{block}.query", (theirs + "EncDecAttention.q",)),
        Rule(f"{block}.key_value", (theirs + "EncDecAttention.k", theirs + "EncDecAttention.v")),
        Rule(f"{block}.output", (theirs + "EncDecAttention.o",)),
        Rule(f"{block}_norm", (theirs + "layer_norm",)),
        Rule("head", ("lm_head",)),
    )


def sizes(layers: int, hidden_size: int, heads: int) -> tuple[Part, ...]:
    """The keys that all of the family have, with the values that stand for missing ones."""
    return (
        Stacks(layers),
        Key("d_model", "hidden_size", hidden_size),
        Key("num_heads", "num_heads", heads),
        Key("d_kv", "head_dim", 64),
        Key("d_ff", "ffn_hidden_size", 2048),
        Key("n_positions", "max_sequence_length", 512),
        Key("relative_attention_num_buckets", "relative_buckets", 32),
        Key("relative_attention_max_distance", "relative_max_distance", 128),
        Key("layer_norm_epsilon", "norm_eps", 1e-6),
        Key("dropout_rate", "dropout", 0.1),
        Only("is_encoder_decoder", True, written=True),
    )


T5 = Layout(
    model_type="t5",
    language_class="T5ForConditionalGeneration",
    scalar_class="T5ForSequenceClassification",
    ignored=IGNORED,
    head_from="shared.weight",
    rules=both_stacks(dense),
    ours=ALWAYS,
    parts=(
        *sizes(layers=6, hidden_size=512, heads=8),
        Key("feed_forward_proj", "activation", "relu", ACTIVATIONS),
        Head(),
    ),
)
