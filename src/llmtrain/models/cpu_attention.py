"""Causal attention in bfloat16 for processors that have bfloat16 products but no matrix tiles.

There torch's fused kernel spends most of its time in small products: 30 % of a training step. Here a block of queries
meets all keys up to its end in one batched product, what is above the diagonal is not computed, and the probabilities
are made again in the backward pass from the log-sum-exp, as in FlashAttention (arXiv 2205.14135, algorithms 1 and 4).
Two custom operators, so that `torch.compile` takes each as a whole.

Shapes: B rows, T positions, D head size, Q query heads, K key-value heads, G = Q / K; N = B K.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Queries of a block: 32 to 128 are within 5 % of each other on an AMD EPYC of the fourth generation.
BLOCK = 64

_HAS = torch.cpu.get_capabilities()
# A constant: a call would break the compiled graph at every layer.
PRODUCTS_WITHOUT_TILES = bool(_HAS.get("avx512_bf16", False)) and not _HAS.get("amx_bf16", False)


def is_faster(query: Tensor) -> bool:
    """Whether `causal_attention` beats the fused kernel for such queries."""
    return PRODUCTS_WITHOUT_TILES and query.device.type == "cpu" and query.dtype == torch.bfloat16


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q kᵀ / sqrt(D)) v with everything ahead masked: [B, Q, T, D] over [B, K, T, D] → [B, Q, T, D]."""
    attended: Tensor = _forward(query, key, value)[0]
    return attended


def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Attended values [B, Q, T, D] and the log-sum-exp of each query's scores [N, G, T]."""
    queries, keys, values = _grouped(query, key.shape[1]), key.flatten(0, 1), value.flatten(0, 1)
    attended, normaliser = torch.empty_like(queries), queries.new_empty(queries.shape[:3], dtype=torch.float32)
    for start, end in _blocks(query.shape[2]):
        scores = _scores(queries[:, :, start:end], keys[:, :end])
        probabilities = scores.softmax(dim=-1)
        # the largest score's probability is at least 1 / T, so its logarithm loses nothing
        normaliser[:, :, start:end] = scores.amax(dim=-1) - probabilities.amax(dim=-1).log()
        attended[:, :, start:end] = _product(probabilities.to(query.dtype), values[:, :end])
    return attended.view(query.shape), normaliser


def differentiate(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, attended: Tensor, normaliser: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query [B, Q, T, D], key and value [B, K, T, D] from that of the attended values [B, Q, T, D]."""
    kv_heads, dtype = key.shape[1], query.dtype
    queries, grads, keys, values = (
        *(_grouped(x, kv_heads) for x in (query, grad)),
        key.flatten(0, 1),
        value.flatten(0, 1),
    )
    through_normaliser = (grads * _grouped(attended, kv_heads)).sum(dim=-1, dtype=torch.float32)  # [N, G, T]
    query_grad = torch.empty_like(queries)
    key_grad, value_grad = (torch.zeros_like(keys, dtype=torch.float32) for _ in range(2))
    for start, end in _blocks(query.shape[2]):
        block = (slice(None), slice(None), slice(start, end))
        queries_here, grads_here = queries[block], grads[block]
        probabilities = _scores(queries_here, keys[:, :end]).sub_(normaliser[block].unsqueeze(-1)).exp_()
        value_grad[:, :end] += torch.bmm(probabilities.to(dtype).flatten(1, 2).mT, grads_here.flatten(1, 2))
        slope = _product(grads_here, values[:, :end].mT).float().sub_(through_normaliser[block].unsqueeze(-1))
        slope = slope.mul_(probabilities).mul_(query.shape[-1] ** -0.5).to(dtype)
        query_grad[block] = _product(slope, keys[:, :end])
        key_grad[:, :end] += torch.bmm(slope.flatten(1, 2).mT, queries_here.flatten(1, 2))
    return query_grad.view(query.shape), key_grad.to(dtype).view(key.shape), value_grad.to(dtype).view(value.shape)


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + BLOCK, length)) for start in range(0, length, BLOCK))


def _grouped(heads: Tensor, kv_heads: int) -> Tensor:
    """[B, Q, T, D] → [N, G, T, D], the queries of each key-value head together."""
    return heads.unflatten(1, (kv_heads, -1)).flatten(0, 1).contiguous()


def _product(left: Tensor, right: Tensor) -> Tensor:
    """[N, G, c, x] by [N, x, y] → [N, G, c, y]: one product for all queries of a key-value head."""
    return torch.bmm(left.flatten(1, 2), right).view(*left.shape[:3], -1)


def _scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Scaled scores [N, G, c, e] float32 of the last c of e positions; -inf ahead of each query."""
    count = queries.shape[2]
    scores = _product(queries, keys.mT).float().mul_(queries.shape[-1] ** -0.5)
    ahead = torch.ones(count, count, dtype=torch.bool, device=queries.device).triu(1)
    scores[..., -count:].masked_fill_(ahead, float("-inf"))
    return scores


_forward = torch.library.custom_op("llmtrain::causal_attention", attend, mutates_args=())
_backward = torch.library.custom_op("llmtrain::causal_attention_backward", differentiate, mutates_args=())


@_forward.register_fake
def _forward_shapes(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = query.shape
    shape = (batch * key.shape[1], heads // key.shape[1], length)
    return query.new_empty(query.shape), query.new_empty(shape, dtype=torch.float32)


@_backward.register_fake
def _backward_shapes(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, attended: Tensor, normaliser: Tensor
) -> tuple[Tensor, ...]:
    return tuple(part.new_empty(part.shape) for part in (query, key, value))


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor, Tensor] = _backward(grad, *ctx.saved_tensors)
    return gradients


_forward.register_autograd(_differentiate, setup_context=_save)
