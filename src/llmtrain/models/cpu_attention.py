"""Causal attention for processors without matrix tiles, where torch's fused kernel loses time in small products.

Long rows: a block of queries of some heads meets all keys up to its end in one batched product, and what is above the
diagonal is not computed. The probabilities are made again in the backward pass, as in FlashAttention (arXiv 2205.14135,
algorithms 1 and 4). Short rows: so little lies above the diagonal that cutting and adding blocks costs more than it
saves, and the probabilities are kept, 2 Q T bytes for each token in bfloat16. Between the products stands one pass over
the scores: softmax on the way there, its gradient on the way back, in the products' dtype with float32 inside. Custom
operators, so that `torch.compile` takes each as a whole.

Shapes: B rows, T positions, D head size, Q query heads, K key-value heads, G = Q / K; N = B K.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Queries of a block, and bytes of the scores made at once. This and the lengths below: measured on an AMD EPYC of the
# fourth generation, 2 cores.
BLOCK = 64
SCORES_BYTES = 2**21
# Most positions of a short row.
SHORT_LENGTH = 256
# Fewest and most positions of a row for which torch's kernel is slower: above, scores no longer stay in the cache;
# below, in float32, its products are large enough.
FASTER_LENGTHS = {torch.bfloat16: (1, 1024), torch.float32: (512, 1023)}

_HAS = torch.cpu.get_capabilities()
# A constant: a call would break the compiled graph at every layer.
PRODUCTS_WITHOUT_TILES = bool(_HAS.get("avx512_bf16", False)) and not _HAS.get("amx_bf16", False)


def is_faster(query: Tensor) -> bool:
    """Whether `causal_attention` beats the fused kernel for such queries [B, Q, T, D]."""
    if not PRODUCTS_WITHOUT_TILES or query.device.type != "cpu" or query.dtype not in FASTER_LENGTHS:
        return False
    fewest, most = FASTER_LENGTHS[query.dtype]
    return fewest <= query.shape[2] <= most  # no `in range`: the compiler cannot take that of a length it leaves open


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q kᵀ / sqrt(D)) v with everything ahead masked: [B, Q, T, D] over [B, K, T, D] → [B, Q, T, D]."""
    attended: Tensor
    if query.shape[2] <= SHORT_LENGTH:
        queries, keys, values = _by_kv_head(query, key, value)
        attended, _ = _short_forward(queries.flatten(1, 2), keys, values)
        return attended.view(query.shape)
    attended = _forward(query, key, value)
    return attended


def attend_short(queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Attended values [N, G T, D] and probabilities [N, G T, T] of scaled queries [N, G T, D] over [N, T, D]."""
    length = keys.shape[1]
    attended = torch.empty_like(queries)
    probabilities = queries.new_empty(*queries.shape[:2], length)
    ahead = torch.ones(length, length, dtype=torch.bool, device=queries.device).triu(1)
    for heads in _portions(queries, length):
        scores = torch.bmm(queries[heads], keys[heads].mT)
        scores.unflatten(1, (-1, length)).masked_fill_(ahead, float("-inf"))
        torch.softmax(scores, dim=-1, out=probabilities[heads])
        torch.bmm(probabilities[heads], values[heads], out=attended[heads])
    return attended, probabilities


def differentiate_short(
    grad: Tensor, queries: Tensor, keys: Tensor, values: Tensor, probabilities: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries [N, G T, D], keys and values [N, T, D] from that of the attended values [N, G T, D]."""
    gradients = query_grad, key_grad, value_grad = tuple(map(torch.empty_like, (queries, keys, values)))
    grad = grad.contiguous()
    for heads in _portions(queries, keys.shape[1]):
        torch.bmm(probabilities[heads].mT, grad[heads], out=value_grad[heads])
        slope = torch.bmm(grad[heads], values[heads].mT)
        slope = torch._softmax_backward_data(slope, probabilities[heads], -1, slope.dtype)
        torch.bmm(slope.mT, queries[heads], out=key_grad[heads])
        torch.bmm(slope, keys[heads], out=query_grad[heads])
    return gradients


def _portions(queries: Tensor, length: int) -> Iterator[slice]:
    """Ranges of heads of queries [N, G T, D] whose scores over `length` keys are made at once."""
    heads = max(SCORES_BYTES // (queries.shape[1] * length * queries.element_size()), 1)
    return (slice(first, first + heads) for first in range(0, len(queries), heads))


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attended values [B, Q, T, D]."""
    queries, keys, values = _by_kv_head(query, key, value)
    attended = torch.empty_like(queries)
    for heads, start, end in _blocks(queries):
        queries_here = queries[heads, :, start:end].flatten(1, 2)
        probabilities = _probabilities(queries_here, keys[heads, :end], end - start)
        attended[heads, :, start:end] = _per_query(torch.bmm(probabilities, values[heads, :end]), queries)
    return attended.view(query.shape)


def differentiate(grad: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query [B, Q, T, D], key and value [B, K, T, D] from that of the attended values [B, Q, T, D]."""
    queries, keys, values = _by_kv_head(query, key, value)
    grads = grad.unflatten(1, (key.shape[1], -1)).flatten(0, 1)
    query_grad = torch.empty_like(queries)
    key_grad, value_grad = (torch.zeros_like(keys, dtype=torch.float32) for _ in range(2))
    for heads, start, end in _blocks(queries):
        queries_here, grads_here = (each[heads, :, start:end].flatten(1, 2) for each in (queries, grads))
        probabilities = _probabilities(queries_here, keys[heads, :end], end - start)
        value_grad[heads, :end] += torch.bmm(probabilities.mT, grads_here)
        slope = torch.bmm(grads_here, values[heads, :end].mT)
        slope = torch._softmax_backward_data(slope, probabilities, -1, slope.dtype)
        key_grad[heads, :end] += torch.bmm(slope.mT, queries_here)
        query_grad[heads, :, start:end] = _per_query(torch.bmm(slope, keys[heads, :end]), queries)
    query_grad *= query.shape[-1] ** -0.5
    return (
        query_grad.view(query.shape),
        key_grad.to(key.dtype).view(key.shape),
        value_grad.to(key.dtype).view(key.shape),
    )


def _by_kv_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [N, G, T, D], scaled, those of each key-value head together; keys and values [N, T, D]."""
    queries = query.unflatten(1, (key.shape[1], -1)).flatten(0, 1) * query.shape[-1] ** -0.5
    return queries.contiguous(), key.flatten(0, 1).contiguous(), value.flatten(0, 1).contiguous()


def _blocks(queries: Tensor) -> Iterator[tuple[slice, int, int]]:
    """Key-value heads, first and last query of each block, of queries [N, G, T, D]."""
    total, group, length, _ = queries.shape
    heads = max(SCORES_BYTES // (group * BLOCK * length * queries.element_size()), 1)
    for first in range(0, total, heads):
        for start in range(0, length, BLOCK):
            yield slice(first, first + heads), start, min(start + BLOCK, length)


def _per_query(rows: Tensor, queries: Tensor) -> Tensor:
    """[n, G c, D] → [n, G, c, D], with G that of the queries [N, G, T, D]."""
    return rows.unflatten(1, (queries.shape[1], -1))


def _probabilities(queries: Tensor, keys: Tensor, count: int) -> Tensor:
    """softmax(q kᵀ) of the last `count` of e positions, queries [n, G count, D] over keys [n, e, D]; 0 ahead."""
    scores = torch.bmm(queries, keys.mT)
    ahead = torch.ones(count, count, dtype=torch.bool, device=queries.device).triu(1)
    scores.unflatten(1, (-1, count))[..., -count:].masked_fill_(ahead, float("-inf"))
    return scores.softmax(dim=-1)


_forward = torch.library.custom_op("llmtrain::causal_attention", attend, mutates_args=())
_backward = torch.library.custom_op("llmtrain::causal_attention_backward", differentiate, mutates_args=())


@_forward.register_fake
def _forward_shape(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return query.new_empty(query.shape)


@_backward.register_fake
def _backward_shapes(grad: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    return tuple(part.new_empty(part.shape) for part in (query, key, value))


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor, Tensor] = _backward(grad, *ctx.saved_tensors)
    return gradients


_forward.register_autograd(_differentiate, setup_context=_save)

_short_forward = torch.library.custom_op("llmtrain::short_attention", attend_short, mutates_args=())
_short_backward = torch.library.custom_op("llmtrain::short_attention_backward", differentiate_short, mutates_args=())


@_short_forward.register_fake
def _short_forward_shapes(queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(queries), queries.new_empty(*queries.shape[:2], keys.shape[1])


@_short_backward.register_fake
def _short_backward_shapes(
    grad: Tensor, queries: Tensor, keys: Tensor, values: Tensor, probabilities: Tensor
) -> tuple[Tensor, ...]:
    return tuple(map(torch.empty_like, (queries, keys, values)))


def _save_short(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # of the probabilities there is none
    ctx.save_for_backward(*inputs, output[1])


def _differentiate_short(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor, Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor, Tensor] = _short_backward(grad, *ctx.saved_tensors)
    return gradients


_short_forward.register_autograd(_differentiate_short, setup_context=_save_short)
