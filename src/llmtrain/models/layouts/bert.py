"""BERT, and RoBERTa, whose positions begin behind the number of the padding token."""

from dataclasses import dataclass

from llmtrain.models.layouts.table import (
    Dropouts,
    Fields,
    Inexpressible,
    Key,
    Layout,
    Only,
    Part,
    Rule,
    WholeHeads,
    look_up,
)

OURS: Fields = {
    "architecture": "encoder",
    "positions": "learned",
    "norm": "layernorm",
    "norm_placement": "post",
    "embedding_norm": "added",
    "bias": True,
    "mlm_head": True,
}
ACTIVATIONS = {
    "gelu": ("gelu",), "gelu_tanh": ("gelu_new", "gelu_pytorch_tanh"), "relu": ("relu",), "relu_squared": ("relu2",),
}  # fmt: skip


@dataclass(frozen=True)
class Segments:
    """`type_vocab_size`, of which there is one at least."""

    def write(self, ours: Fields) -> Fields:
        if not ours["num_segments"]:
            raise Inexpressible
        return {"type_vocab_size": ours["num_segments"]}

    def read(self, theirs: Fields, ours: Fields) -> tuple[Fields, list[str]]:
        return {"num_segments": look_up(theirs, "type_vocab_size", 2)}, []


@dataclass(frozen=True)
class PositionsBehindPadding:
    """The table's rows, of which the first one that is read follows that of the padding token's number."""

    def write(self, ours: Fields) -> Fields:
        offset = ours["position_offset"]
        if not offset:
            raise Inexpressible
        return {"max_position_embeddings": ours["max_sequence_length"] + offset, "pad_token_id": offset - 1}

    def read(self, theirs: Fields, ours: Fields) -> tuple[Fields, list[str]]:
        rows, padding = look_up(theirs, "max_position_embeddings", 512), look_up(theirs, "pad_token_id", 1)
        if type(padding) is not int or type(rows) is not int:
            return {}, [f"max_position_embeddings={rows!r} and pad_token_id={padding!r} (whole numbers are needed)"]
        return {"max_sequence_length": rows - padding - 1, "position_offset": padding + 1}, []


def rules(trunk: str, head: str, dense: str, norm: str) -> tuple[Rule, ...]:
    """Beginnings of the names of the trunk and of the head, and those of the head's dense layer and norm."""
    block, embeddings = f"{trunk}.encoder.layer.{{i}}.", f"{trunk}.embeddings."
    projections = tuple(f"{block}attention.self.{each}" for each in ("query", "key", "value"))
    return (
        Rule("trunk.token_embedding", (embeddings + "word_embeddings",)),
        Rule("trunk.position_embedding", (embeddings + "position_embeddings",)),
        Rule("trunk.segment_embedding", (embeddings + "token_type_embeddings",)),
        Rule("trunk.embedding_norm", (embeddings + "LayerNorm",)),
        Rule("trunk.blocks.{i}.attention.qkv", projections),
        Rule("trunk.blocks.{i}.attention.output", (block + "attention.output.dense",)),
        Rule("trunk.blocks.{i}.attention_norm", (block + "attention.output.LayerNorm",)),
        Rule("trunk.blocks.{i}.feed_forward.up", (block + "intermediate.dense",)),
        Rule("trunk.blocks.{i}.feed_forward.down", (block + "output.dense",)),
        Rule("trunk.blocks.{i}.feed_forward_norm", (block + "output.LayerNorm",)),
        Rule("pooler", (f"{trunk}.pooler.dense",)),
        Rule("next_sentence", ("cls.seq_relationship",)),
        Rule("mlm_head.dense", (f"{head}.{dense}",)),
        Rule("mlm_head.norm", (f"{head}.{norm}",)),
        Rule("mlm_head", (head,)),
        Rule("head", (f"{head}.decoder",)),
    )


PARTS: tuple[Part, ...] = (
    Key("num_hidden_layers", "num_layers"),
    Key("hidden_size", "hidden_size"),
    Key("num_attention_heads", "num_heads"),
    Key("intermediate_size", "ffn_hidden_size"),
    Key("layer_norm_eps", "norm_eps", 1e-12),
    Key("initializer_range", "init_std", 0.02),
    WholeHeads(),
    Segments(),
    Dropouts(("hidden_dropout_prob", "attention_probs_dropout_prob"), default=0.1),
    Only("position_embedding_type", "absolute"),
    Only("is_decoder", False),
    Only("add_cross_attention", False),
    Only("tie_word_embeddings", True),
)
# Old files have the gain and the shift of norms.
RENAMED = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))

BERT = Layout(
    model_type="bert",
    language_class="BertForMaskedLM",
    scalar_class="BertForSequenceClassification",
    trunk_prefix="bert.",
    ignored=r"bert\.embeddings\.position_ids|cls\.predictions\.decoder\.(weight|bias)",
    optional=r"bert\.pooler\..*|cls\.seq_relationship\..*",
    renamed=RENAMED,
    rules=rules("bert", "cls.predictions", "transform.dense", "transform.LayerNorm"),
    ours=OURS,
    parts=(
        *PARTS,
        Key("max_position_embeddings", "max_sequence_length", 512),
        Key("hidden_act", "activation", "gelu", ACTIVATIONS),
        Key("architectures", "pooler", ["BertForMaskedLM"], {
            False: (["BertForMaskedLM"],), True: (["BertForPreTraining"],),
        }),
    ),
)  # fmt: skip

ROBERTA = Layout(
    model_type="roberta",
    language_class="RobertaForMaskedLM",
    scalar_class="RobertaForSequenceClassification",
    trunk_prefix="roberta.",
    ignored=r"roberta\.embeddings\.position_ids|lm_head\.decoder\.(weight|bias)",
    optional=r"roberta\.pooler\..*",
    renamed=RENAMED,
    rules=rules("roberta", "lm_head", "dense", "layer_norm"),
    ours=OURS,
    parts=(*PARTS, PositionsBehindPadding(), Key("hidden_act", "activation", "gelu", {"gelu": ("gelu",)})),
)
