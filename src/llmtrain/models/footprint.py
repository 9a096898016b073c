"""What a model consists of, and what its training keeps in memory; from shapes alone, so a model on `meta` will do.

Shapes: N tokens of a micro-batch, T positions of a row, H hidden size, F inner size, V vocabulary, D head size,
Q query heads, K key-value heads.
"""

import math
import re
from typing import NamedTuple

from torch import nn

from llmtrain.config.schema import ExpertsConfig, ModelConfig
from llmtrain.models.attend import SINK_COLUMNS
from llmtrain.models.experts import expert_size
from llmtrain.models.feed_forward import GATES, inner_size
from llmtrain.models.heads import LanguageModel
from llmtrain.objectives.logprobs import PORTION_ELEMENTS


class Weights(NamedTuple):
    """Parameters of one name and shape; those of repeated parts together."""

    name: str
    """With `*` for the number of a repeated part."""
    shape: tuple[int, ...]
    number: int
    """How many there are."""
    numel: int
    """Numbers in all of them."""


def weights_by_name(model: nn.Module) -> list[Weights]:
    """The model's parameters, each once, in their order."""
    found: dict[tuple[str, tuple[int, ...]], int] = {}
    for name, parameter in model.named_parameters():
        key = re.sub(r"\.\d+(?=\.|$)", ".*", name), tuple(parameter.shape)
        found[key] = found.get(key, 0) + 1
    return [Weights(name, shape, number, number * math.prod(shape)) for (name, shape), number in found.items()]


def num_parameters(model: nn.Module) -> int:
    """All parameters; tied ones count once."""
    return sum(each.numel() for each in model.parameters())


def num_without_embeddings(model: LanguageModel) -> int:
    """Parameters but for those of embeddings and of the head (Kaplan et al. 2020, arXiv 2001.08361, section 1.3)."""
    tables = [each.weight for each in model.modules() if isinstance(each, nn.Embedding)]
    left_out = {id(each): each.numel() for each in (*tables, model.head_weight)}
    return num_parameters(model) - sum(left_out.values())


def num_in_products(model: LanguageModel) -> int:
    """Weights in matrix products, whether a token goes through them or not."""
    return sum(each.numel() for each in (*model.trunk.matrices, model.head_weight))


def num_active(model: LanguageModel) -> int:
    """Weights that a token is multiplied with: those in matrix products, without attention's scores; of routed experts
    those that it goes through."""
    return round(model.flops_per_token(0) / 6)


def activation_bytes(config: ModelConfig, tokens: int, length: int, product_bytes: int) -> dict[str, int]:
    """What the blocks keep of `tokens` tokens, in rows of `length`, for the backward pass, in bytes, by part.

    Korthikanti et al. 2022 (arXiv 2205.05198, section 4.1) count 34 s b h + 5 a s² b bytes a layer, in 16 bits and
    with dropout. Of theirs this implementation does not keep attention's scores and probabilities (fused kernels make
    them again; the last term) unless they are capped or learned numbers are added to them, nor, without dropout, its
    masks. The residual stream, which they hold in 16 bits, is float32 here. `product_bytes` is the size of a number in
    matrix products: 4, or 2 with autocast. A decoder beside an encoder has as many tokens of a source as of a text.

    Counted as fused kernels keep it: layer_norm and rms_norm their input (or, on a processor, its quotient), attention
    queries, keys, values, output and a log-sum-exp for each head. Rows of up to 512 positions may keep their
    probabilities on a processor (`kernels/cpu_attention.py`). What layers share is not counted, nor the mask of a
    window or of ALiBi.
    """
    stacks = [config, config.encoder] if config.architecture == "encoder_decoder" else [config]
    found: dict[str, int] = {}
    for stack in stacks:
        for part, kept in _bytes_per_token(stack, length, product_bytes).items():
            found[part] = found.get(part, 0) + tokens * kept
    return {part: kept for part, kept in found.items() if kept}


def _bytes_per_token(config: ModelConfig, length: int, product_bytes: int) -> dict[str, int]:
    """What the blocks of a stack keep of a token."""
    hidden, size = config.hidden_size, product_bytes
    queries, keys = config.num_heads * config.head_size, config.kv_heads * config.head_size
    capped, learned, normed = (
        config.attention_softcap is not None,
        config.positions == "relative",
        config.qk_norm != "none",
    )
    fused, crosses = not capped and not learned, config.architecture == "encoder_decoder"
    norms = 4 if config.norm_placement == "sandwich" else 2 if config.block == "sequential" else 1  # of their own input
    per_norm = 8 if config.norm == "zero_centred_rmsnorm" else 4  # its quotient too
    sparse = sum(config.sparse_layers)
    inputs = 1 if config.block == "parallel_shared_norm" and size == 4 else 2  # autocast makes a copy for each
    changed = (config.positions == "rope" or normed) * (queries + keys) + (config.attention_scale is not None) * queries
    # float32 after the hyperbolic tangent and after the softmax, and as they go into the product; or, where numbers are
    # added, after the softmax alone, and with autocast twice as they go into the product
    score = 8 + size % 4 if capped else 12 - 2 * size
    copies = 1 if size == 4 else 2  # of what cross-attention reads; autocast makes one of the source's too
    cross_attention = norms // 2 * per_norm * hidden + size * (copies * hidden + 2 * queries + 2 * keys)
    per_token = {
        "inputs of norms (float32)": norms * per_norm * hidden,
        "inputs of the first projections": inputs * size * hidden,
        "queries, keys, values": size * (queries + 2 * keys + fused * changed),
        "norms of queries and keys": normed * (per_norm - 4 * (size == 4)) * (queries + keys),
        "attended values": size * queries + fused * 4 * config.num_heads,
        "scores": (not fused) * score * config.num_heads * length,
        "cross-attention": crosses * (cross_attention + config.num_heads * (score * length if capped else 4)),
        "dropout": (2 + crosses) * hidden if config.dropout else 0,  # a mask of a byte for each branch
    }
    # torch's kernel for a mask that learns takes float32, and a key for each query head
    if config.attention_sinks and not capped:
        columns = length + SINK_COLUMNS
        per_token["queries, keys, values"] = 4 * queries + 8 * queries * columns // length
        per_token["attended values"], per_token["scores"] = size * queries, 4 * config.num_heads * columns
    kept = {part: config.num_layers * number for part, number in per_token.items()}
    kept["feed-forward"] = (config.num_layers - sparse) * size * _kept_inside(config, inner_size(config))
    if config.experts is not None:
        kept["experts"] = sparse * _kept_by_experts(config, config.experts, size)
    return kept


def _kept_inside(config: ModelConfig, inner: int) -> int:
    """Numbers that a feed-forward part of this inner size keeps of a token, beside its input."""
    return inner * (4 if config.activation in GATES else 1 if config.activation == "relu" else 2)


def _kept_by_experts(config: ModelConfig, settings: ExpertsConfig, size: int) -> int:
    """Bytes that experts keep of a token: its copies and what becomes of them, and the router's numbers."""
    inner, copies = expert_size(config, settings), settings.experts_per_token
    shared = _kept_inside(config, inner * settings.shared_experts)
    # weights and scores in float32; whole numbers of 8 bytes: the choice and, twice, where a copy stands
    router = 4 * settings.num_experts + copies * (4 + 3 * 8) + (4 - size) * config.hidden_size
    router += (settings.jitter > 0) * 4 * config.hidden_size  # what the router's inputs were multiplied by
    return router + size * (shared + copies * (_kept_inside(config, inner) + 2 * config.hidden_size))


def head_bytes(config: ModelConfig, vocab_size: int, tokens: int, device_type: str) -> dict[str, int]:
    """What the end of the model keeps beside the blocks: never the logits of all tokens (`objectives/logprobs.py`)."""
    portion = min(tokens * vocab_size, PORTION_ELEMENTS[device_type])
    return {
        "input of the last norm, gradient at the head": 2 * 4 * config.hidden_size * tokens,
        "the head's own gradient, before it is added": 4 * vocab_size * config.hidden_size,
        "logits of a portion of the tokens": 4 * portion,
    }
