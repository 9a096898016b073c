"""How the Transformers library spells our models: names of tensors and keys of config.json, for each family.

GPT-2 (`GPT2LMHeadModel`) and Llama (`LlamaForCausalLM`), and their `...ForSequenceClassification` for score models.
What neither can express has a layout of our own, which only this package reads.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from llmtrain.config.schema import ModelConfig
from llmtrain.models.feed_forward import inner_size

Fields = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Rule:
    """One module of ours ({i}: its layer) and theirs; several of theirs lie in ours one below the other."""

    ours: str
    theirs: tuple[str, ...]
    transposed: bool = False  # theirs is [in, out] (Conv1D), ours [out, in]


@dataclass(frozen=True)
class Layout:
    """One family: its classes, its table of names, and its config.json in both directions."""

    model_type: str
    language_class: str
    scalar_class: str
    rules: tuple[Rule, ...]
    write_fields: Callable[[ModelConfig], Fields]
    read_fields: Callable[[Fields], tuple[Fields, list[str]]]  # → our fields, and what is not supported
    expresses: Callable[[ModelConfig], bool]
    trunk_prefix: str = ""  # missing in files that were saved from the trunk alone
    ignored: str = "$^"  # tensors of theirs that are no weights


def _write_gpt2(config: ModelConfig) -> Fields:
    return {
        "n_layer": config.num_layers,
        "n_embd": config.hidden_size,
        "n_head": config.num_heads,
        "n_inner": inner_size(config),
        "n_positions": config.max_sequence_length,
        "activation_function": {"gelu": "gelu", "gelu_tanh": "gelu_new"}[config.activation],
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "initializer_range": config.init_std,
    }


def _read_gpt2(fields: Fields) -> tuple[Fields, list[str]]:
    activations = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
    activation = fields.get("activation_function", "gelu_new")
    dropouts = {fields.get(key, 0.1) for key in ("embd_pdrop", "attn_pdrop", "resid_pdrop")}
    faults = _unequal(fields, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    if activation not in activations:
        faults.append(f"activation_function={activation!r} (supported: {', '.join(activations)})")
    if len(dropouts) > 1:
        faults.append("embd_pdrop, attn_pdrop and resid_pdrop that differ (there is one dropout: set all to one value)")
    ours = {
        "num_layers": fields.get("n_layer"),
        "hidden_size": fields.get("n_embd"),
        "num_heads": fields.get("n_head"),
        "ffn_hidden_size": fields.get("n_inner"),
        "max_sequence_length": fields.get("n_positions"),
        "positions": "learned",
        "norm": "layernorm",
        "activation": activations.get(activation, "gelu_tanh"),
        "bias": True,
        "tied_embeddings": fields.get("tie_word_embeddings", True),
        "norm_eps": fields.get("layer_norm_epsilon", 1e-5),
        "dropout": dropouts.pop(),
        "init_std": fields.get("initializer_range", 0.02),
    }
    return ours, faults


def _write_llama(config: ModelConfig) -> Fields:
    return {
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads or config.num_heads,
        "head_dim": config.hidden_size // config.num_heads,
        "intermediate_size": inner_size(config),
        "max_position_embeddings": config.max_sequence_length,
        "hidden_act": "silu",
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "tie_word_embeddings": config.tied_embeddings,
        # The first is read by version 5 of the library, the second by version 4 and by vLLM.
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "attention_dropout": config.dropout,
        "initializer_range": config.init_std,
        "llmtrain": {"dropout": config.dropout},
    }


def _read_llama(fields: Fields) -> tuple[Fields, list[str]]:
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    dropout = fields.get("attention_dropout", 0.0)
    bias = fields.get("attention_bias", False)
    faults = _unequal({**fields, **rope}, hidden_act="silu", sliding_window=None, partial_rotary_factor=1.0)
    faults += _unequal(fields, mlp_bias=bias)
    if rope_type != "default":
        faults.append(f"rope_type={rope_type!r} (supported: 'default', that is, unscaled)")
    if dropout and fields.get("llmtrain", {}).get("dropout") != dropout:
        faults.append(f"attention_dropout={dropout} (dropout on the attention weights alone; set it to 0)")
    hidden_size, heads, head_size = (fields.get(key) for key in ("hidden_size", "num_attention_heads", "head_dim"))
    if head_size and hidden_size and heads and head_size * heads != hidden_size:
        faults.append(f"head_dim={head_size} (supported: hidden_size / num_attention_heads = {hidden_size / heads:g})")
    ours = {
        "num_layers": fields.get("num_hidden_layers"),
        "hidden_size": hidden_size,
        "num_heads": heads,
        "num_kv_heads": fields.get("num_key_value_heads"),
        "ffn_hidden_size": fields.get("intermediate_size"),
        "max_sequence_length": fields.get("max_position_embeddings", 2048),
        "positions": "rope",
        "norm": "rmsnorm",
        "activation": "swiglu",
        "bias": bias,
        "tied_embeddings": fields.get("tie_word_embeddings", False),
        "rope_theta": rope.get("rope_theta", fields.get("rope_theta", 10_000.0)),
        "norm_eps": fields.get("rms_norm_eps", 1e-6),
        "dropout": dropout,
        "init_std": fields.get("initializer_range", 0.02),
    }
    return ours, faults


def _unequal(fields: Fields, **supported: Any) -> list[str]:
    """The fields that are there with another value than the supported one."""
    return [
        f"{key}={fields[key]!r} (supported: {value!r})"
        for key, value in supported.items()
        if fields.get(key, value) != value
    ]


def _write_own(config: ModelConfig) -> Fields:
    note = "Transformers has no layout for this combination of parts: only llmtrain reads this folder."
    return {"note": note, "llmtrain": {"model": {**asdict(config), "init_from": None}}}


def _read_own(fields: Fields) -> tuple[Fields, list[str]]:
    ours = fields.get("llmtrain", {}).get("model")
    return (ours, []) if isinstance(ours, dict) else ({}, ["a config.json without llmtrain.model"])


def _is_gpt2(config: ModelConfig) -> bool:
    parts = (config.positions, config.norm, config.bias, config.num_kv_heads or config.num_heads)
    return parts == ("learned", "layernorm", True, config.num_heads) and config.activation != "swiglu"


def _is_llama(config: ModelConfig) -> bool:
    return (config.positions, config.norm, config.activation) == ("rope", "rmsnorm", "swiglu")


GPT2 = Layout(
    model_type="gpt2",
    language_class="GPT2LMHeadModel",
    scalar_class="GPT2ForSequenceClassification",
    trunk_prefix="transformer.",
    ignored=r".*\.attn\.(masked_)?bias",  # causal masks that old versions saved
    write_fields=_write_gpt2,
    read_fields=_read_gpt2,
    expresses=_is_gpt2,
    rules=(
        Rule("trunk.token_embedding", ("transformer.wte",)),
        Rule("trunk.position_embedding", ("transformer.wpe",)),
        Rule("trunk.blocks.{i}.attention_norm", ("transformer.h.{i}.ln_1",)),
        Rule("trunk.blocks.{i}.attention.qkv", ("transformer.h.{i}.attn.c_attn",), transposed=True),
        Rule("trunk.blocks.{i}.attention.output", ("transformer.h.{i}.attn.c_proj",), transposed=True),
        Rule("trunk.blocks.{i}.feed_forward_norm", ("transformer.h.{i}.ln_2",)),
        Rule("trunk.blocks.{i}.feed_forward.up", ("transformer.h.{i}.mlp.c_fc",), transposed=True),
        Rule("trunk.blocks.{i}.feed_forward.down", ("transformer.h.{i}.mlp.c_proj",), transposed=True),
        Rule("trunk.final_norm", ("transformer.ln_f",)),
        Rule("head", ("lm_head",)),
        Rule("score", ("score",)),
    ),
)

_ATTENTION = "model.layers.{i}.self_attn."
_MLP = "model.layers.{i}.mlp."
LLAMA = Layout(
    model_type="llama",
    language_class="LlamaForCausalLM",
    scalar_class="LlamaForSequenceClassification",
    trunk_prefix="model.",
    ignored=r".*\.rotary_emb\.inv_freq",
    write_fields=_write_llama,
    read_fields=_read_llama,
    expresses=_is_llama,
    rules=(
        Rule("trunk.token_embedding", ("model.embed_tokens",)),
        Rule("trunk.blocks.{i}.attention_norm", ("model.layers.{i}.input_layernorm",)),
        Rule("trunk.blocks.{i}.attention.qkv", (_ATTENTION + "q_proj", _ATTENTION + "k_proj", _ATTENTION + "v_proj")),
        Rule("trunk.blocks.{i}.attention.output", (_ATTENTION + "o_proj",)),
        Rule("trunk.blocks.{i}.feed_forward_norm", ("model.layers.{i}.post_attention_layernorm",)),
        Rule("trunk.blocks.{i}.feed_forward.gate_up", (_MLP + "gate_proj", _MLP + "up_proj")),
        Rule("trunk.blocks.{i}.feed_forward.down", (_MLP + "down_proj",)),
        Rule("trunk.final_norm", ("model.norm",)),
        Rule("head", ("lm_head",)),
        Rule("score", ("score",)),
    ),
)

OWN = Layout(
    model_type="llmtrain",
    language_class="LanguageModel",
    scalar_class="ScalarModel",
    rules=(),  # our own names
    write_fields=_write_own,
    read_fields=_read_own,
    expresses=lambda config: True,
)

LAYOUTS = {layout.model_type: layout for layout in (GPT2, LLAMA, OWN)}


def layout_for(config: ModelConfig) -> Layout:
    """The first layout that can express the architecture; experts have none yet but ours."""
    if config.experts is not None:
        return OWN
    return next(layout for layout in LAYOUTS.values() if layout.expresses(config))


def their_shapes(layout: Layout, config: ModelConfig, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the layout of tensors that have these names and shapes here."""
    theirs: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        names, rule = _their_names(layout, name)
        for part, rows in zip(names, _rows(config, names, shape), strict=True):
            split = (rows, *shape[1:])
            theirs[part] = split[::-1] if rule.transposed else split
    return theirs


def their_parts(config: ModelConfig, module: str, rows: int) -> dict[str, int]:
    """The modules that a module of ours with so many rows is in the layout, and the rows of each, in their order."""
    names, _ = _their_names(layout_for(config), f"{module}.weight")
    parts = zip(names, _rows(config, names, (rows,)), strict=True)
    return {name.removesuffix(".weight"): part_rows for name, part_rows in parts}


def to_theirs(layout: Layout, config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors by the layout's names, contiguous and on the CPU, each with memory of its own."""
    theirs: dict[str, Tensor] = {}
    for name, tensor in state.items():
        names, rule = _their_names(layout, name)
        tensor = tensor.detach()
        parts = tensor.split(_rows(config, names, tuple(tensor.shape)))
        for part, value in zip(names, parts, strict=True):
            turned = value.T if rule.transposed and value.ndim == 2 else value
            theirs[part] = turned.to("cpu", copy=True).contiguous()
    return theirs


def to_ours(layout: Layout, names: list[str], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of these names of ours, float32, each with memory of its own."""
    state: dict[str, Tensor] = {}
    for name in names:
        parts, rule = _their_names(layout, name)
        values = [theirs[part].T if rule.transposed and theirs[part].ndim == 2 else theirs[part] for part in parts]
        state[name] = torch.cat(values).float() if len(values) > 1 else _own_float(values[0])
    return state


def _own_float(tensor: Tensor) -> Tensor:
    # A copy always: tensors of a safetensors file are windows onto the file.
    return tensor.to(torch.float32, copy=True).contiguous()


def _their_names(layout: Layout, name: str) -> tuple[list[str], Rule]:
    module, _, leaf = name.rpartition(".")
    layer = re.search(r"\.blocks\.(\d+)\.", name)
    pattern = re.sub(r"\.blocks\.\d+\.", ".blocks.{i}.", module)
    rule = next((rule for rule in layout.rules if rule.ours == pattern), Rule(pattern, (pattern,)))
    return [f"{part.replace('{i}', layer[1] if layer else '')}.{leaf}" for part in rule.theirs], rule


def _rows(config: ModelConfig, names: list[str], shape: tuple[int, ...]) -> list[int]:
    """How many rows of our tensor each of their parts has: all, query/key/value, or gate/up."""
    if len(names) == 1:
        return [shape[0]]
    if len(names) == 2:
        return [shape[0] // 2] * 2
    key = (config.num_kv_heads or config.num_heads) * (config.hidden_size // config.num_heads)
    return [shape[0] - 2 * key, key, key]
