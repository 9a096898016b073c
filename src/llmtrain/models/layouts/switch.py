"""Switch Transformers: the first T5 with experts in some layers of both stacks."""

from dataclasses import dataclass

from llmtrain.models.layouts.experts import ExpertsInTraining
from llmtrain.models.layouts.t5 import ALWAYS, IGNORED, both_stacks, scale_of_tied, sizes
from llmtrain.models.layouts.table import Fields, Inexpressible, Key, Layout, Only, Rule, look_up

SPARSE = ("num_sparse_encoder_layers", "num_sparse_decoder_layers")


@dataclass(frozen=True)
class SparseStacks:
    """How many layers of each stack have experts: of L layers with n, those from the second on, L // n apart."""

    def write(self, ours: Fields) -> Fields:
        if ours["encoder_sparse_layers"] is None:
            raise Inexpressible
        return dict(zip(SPARSE, (sum(ours["encoder_sparse_layers"]), sum(ours["sparse_layers"])), strict=True))

    def read(self, theirs: Fields, ours: Fields) -> tuple[Fields, list[str]]:
        numbers, layers = [look_up(theirs, key, 3) for key in SPARSE], [ours["encoder_layers"], ours["num_layers"]]
        said = " and ".join(f"{key}={number!r}" for key, number in zip(SPARSE, numbers, strict=True))
        if not all(isinstance(number, int) for number in (*numbers, *layers)):
            return {}, [f"{said} (supported: numbers)"]
        # as the library has it, which makes the second layer sparse where the number is 0
        steps = [there // number if number > 0 else there for there, number in zip(layers, numbers, strict=True)]
        sparse = [
            [layer for layer in range(there) if step == 1 or (step > 0 and layer % step == 1)]
            for there, step in zip(layers, steps, strict=True)
        ]
        for first, step in ((0, 1), *((1, step) for step in steps if step > 0)):
            if sparse == [list(range(first, there, step)) for there in layers]:
                return {"experts.first_layer": first, "experts.layer_step": step}, []
        return {}, [f"{said}, by which the stacks have experts in layers {sparse} (supported: as far apart in both)"]


@dataclass(frozen=True)
class RoomForRows:
    """Their experts take `expert_capacity` tokens of a row in evaluation too, where ours take all: written so many."""

    def write(self, ours: Fields) -> Fields:
        return {"expert_capacity": ours["max_sequence_length"]}

    def read(self, theirs: Fields, ours: Fields) -> tuple[Fields, list[str]]:
        return {}, []


@dataclass(frozen=True)
class TiedHead:
    """The token embedding, which hidden states are scaled for; with another head, their stacks have a table each."""

    def write(self, ours: Fields) -> Fields:
        return {"tie_word_embeddings": True}

    def read(self, theirs: Fields, ours: Fields) -> tuple[Fields, list[str]]:
        tied = theirs.get("tie_word_embeddings") is not False
        faults = [] if tied else ["tie_word_embeddings=False (supported: one table for both stacks and the head)"]
        return {"tied_embeddings": True, "logit_scale": scale_of_tied(ours)}, faults


def dense_or_experts(ours: str, theirs: str) -> tuple[Rule, ...]:
    """The feed-forward part, of one expert or several."""
    theirs += "mlp."
    each = theirs + "experts.expert_{e}."
    return (
        Rule(f"{ours}.up", (theirs + "wi",)),
        Rule(f"{ours}.down", (theirs + "wo",)),
        Rule(f"{ours}.router", (theirs + "router.classifier",)),
        Rule(f"{ours}.expert_up", (each + "wi",)),
        Rule(f"{ours}.expert_down", (each + "wo",)),
    )


SWITCH = Layout(
    model_type="switch_transformers",
    language_class="SwitchTransformersForConditionalGeneration",
    scalar_class="SwitchTransformersForSequenceClassification",  # which Transformers has not, nor we for such a model
    ignored=IGNORED,
    rules=both_stacks(dense_or_experts),
    ours={**ALWAYS, "experts": {"experts_per_token": 1, "normalise_weights": False}},
    parts=(
        *sizes(layers=12, hidden_size=768, heads=12),
        Key("num_experts", "experts.num_experts", 8),
        Key("router_jitter_noise", "experts.jitter", 0.01),
        ExpertsInTraining(),
        SparseStacks(),
        RoomForRows(),
        Key("dense_act_fn", "activation", "relu", {"relu": ("relu",), "gelu": ("gelu",), "gelu_tanh": ("gelu_new",)}),
        Only("router_bias", False),
        Only("router_dtype", "float32"),
        TiedHead(),
    ),
)
