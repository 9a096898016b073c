"""Families with experts: Mixtral, Qwen3-MoE and OLMoE, which are Mistral, Qwen3 and Llama with another part."""

from dataclasses import dataclass
from typing import Any

from llmtrain.models.layouts.llama import (
    BIAS_OF_ATTENTION,
    BLOCK,
    IGNORED,
    MLP,
    PRE_NORMS,
    QK_NORMS,
    SILU,
    SPLIT,
    STEM,
    sizes,
)
from llmtrain.models.layouts.rope import OneWindow, Rope
from llmtrain.models.layouts.table import AttentionDropout, Fields, Key, Layout, Only, Part, Rule, look_up

# Of training, and of no family: kept in a block of our own.
OF_TRAINING = ("capacity_factor", "capacity_group_tokens", "balance_loss", "z_loss", "jitter")


@dataclass(frozen=True)
class ExpertsInTraining:
    """What our experts do in training, in a block of our own."""

    def write(self, ours: Fields) -> Fields:
        return {f"llmtrain.experts.{key}": ours["experts"][key] for key in OF_TRAINING}

    def read(self, theirs: Fields, ours: Fields) -> tuple[Fields, list[str]]:
        kept = {f"experts.{key}": look_up(theirs, f"llmtrain.experts.{key}", None) for key in OF_TRAINING}
        return {key: value for key, value in kept.items() if value is not None}, []


@dataclass(frozen=True)
class SparseLayers:
    """Which layers have experts: every `decoder_sparse_step`-th, without `mlp_only_layers`."""

    def write(self, ours: Fields) -> Fields:
        dense = [layer for layer, is_sparse in enumerate(ours["sparse_layers"]) if not is_sparse]
        return {"decoder_sparse_step": 1, "mlp_only_layers": dense}

    def read(self, theirs: Fields, ours: Fields) -> tuple[Fields, list[str]]:
        step, dense = theirs.get("decoder_sparse_step", 1), theirs.get("mlp_only_layers") or []
        layers: Any = ours.get("num_layers")
        if not (isinstance(layers, int) and isinstance(step, int) and isinstance(dense, list) and step > 0):
            return {}, [f"decoder_sparse_step={step!r} and mlp_only_layers={dense!r} (supported: numbers above 0)"]
        sparse = [layer for layer in range(layers) if (layer + 1) % step == 0 and layer not in dense]
        if not sparse:
            return {}, [f"decoder_sparse_step={step} and mlp_only_layers={dense}, by which no layer has experts"]
        ours_step = sparse[1] - sparse[0] if len(sparse) > 1 else layers
        if sparse != list(range(sparse[0], layers, ours_step)):
            return {}, [f"experts in layers {sparse} (supported: every so many layers, from one of them to the last)"]
        return {"experts.first_layer": sparse[0], "experts.layer_step": ours_step}, []


def experts(where: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """Router and experts of the block `where`, by their names for the three matrices of an expert."""
    each = where + "experts.{e}."
    return (
        Rule("trunk.blocks.{i}.feed_forward.router", (where + "gate",)),
        Rule("trunk.blocks.{i}.feed_forward.expert_up", (each + gate, each + up)),
        Rule("trunk.blocks.{i}.feed_forward.expert_down", (each + down,)),
    )


def numbers(key: str, experts: int, per_token: int) -> tuple[Part, ...]:
    """The keys that all of them have, `key` for the number of experts, with the values that stand for missing ones."""
    return (
        Key(key, "experts.num_experts", experts),
        Key("num_experts_per_tok", "experts.experts_per_token", per_token),
        ExpertsInTraining(),
    )


# A dense layer's part, and the experts' in its place.
ATTENTION_ALONE = tuple(rule for rule in (*STEM, *SPLIT) if "feed_forward" not in rule.ours)

MIXTRAL = Layout(
    model_type="mixtral",
    language_class="MixtralForCausalLM",
    scalar_class="MixtralForSequenceClassification",
    trunk_prefix="model.",
    ignored=IGNORED,
    rules=(*ATTENTION_ALONE, *PRE_NORMS, *experts(BLOCK + "block_sparse_moe.", "w1", "w3", "w2")),
    parts=(
        *sizes(max_length=131_072, norm_eps=1e-5),
        SILU,
        *numbers("num_local_experts", 8, 2),
        Key("router_jitter_noise", "experts.jitter", 0.0),
        OneWindow(),
        Rope(),
        AttentionDropout(),
    ),
)

QWEN3_MOE = Layout(
    model_type="qwen3_moe",
    language_class="Qwen3MoeForCausalLM",
    scalar_class="Qwen3MoeForSequenceClassification",
    trunk_prefix="model.",
    ignored=IGNORED,
    rules=(*STEM, *SPLIT, *QK_NORMS, *PRE_NORMS, *experts(MLP, "gate_proj", "up_proj", "down_proj")),
    ours={"qk_norm": "head", "mlp_bias": False},
    parts=(
        *sizes(max_length=32_768, norm_eps=1e-6),
        SILU,
        *BIAS_OF_ATTENTION,
        *numbers("num_local_experts", 128, 8),
        Key("num_experts", "experts.num_experts"),  # as published; Transformers 5 writes the other
        Key("moe_intermediate_size", "experts.ffn_hidden_size", 768),
        Key("norm_topk_prob", "experts.normalise_weights", False),
        SparseLayers(),
        OneWindow(default=4096, switch="use_sliding_window"),
        Rope(),
        AttentionDropout(),
    ),
)

OLMOE = Layout(
    model_type="olmoe",
    language_class="OlmoeForCausalLM",
    scalar_class="OlmoeForSequenceClassification",  # which Transformers has not: only llmtrain reads such a folder
    trunk_prefix="model.",
    ignored=IGNORED,
    rules=(*ATTENTION_ALONE, *QK_NORMS, *PRE_NORMS, *experts(MLP, "gate_proj", "up_proj", "down_proj")),
    ours={"qk_norm": "full", "mlp_bias": False},
    parts=(
        *sizes(max_length=4096, norm_eps=1e-5),
        SILU,
        *BIAS_OF_ATTENTION,
        *numbers("num_experts", 64, 8),
        Key("norm_topk_prob", "experts.normalise_weights", False),
        Only("clip_qkv", None),
        Rope(),
        AttentionDropout(),
    ),
)
