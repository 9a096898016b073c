"""Causal attention for processors without matrix tiles, where torch's fused kernel loses time in small products.

A block of queries of some heads meets all keys up to its end in one batched product, and what is above the diagonal is
not computed. Between the products stands one pass over the scores: softmax on the way there, its gradient on the way
back, in the products' dtype with float32 inside. Rows of up to KEPT_LENGTH positions keep the probabilities for the
backward pass, half of Q T numbers for each token; longer ones make them again, as FlashAttention does (arXiv
2205.14135, algorithms 1 and 4). Two custom operators, so that `torch.compile` takes each as a whole.

Shapes: B rows, T positions, the last U of which ask, D head size, Q query heads, K key-value heads, G = Q / K; N = B K.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# This and the lengths below: measured on an AMD EPYC of the fourth generation, 2 cores. Queries of a block; short rows
# in bfloat16 are one block, for cutting and adding costs more than the half above the diagonal.
BLOCK = 64
WHOLE_LENGTHS = {torch.bfloat16: 256, torch.float32: 0}
# Bytes of the scores made at once.
SCORES_BYTES = 2**21
# Most positions of a row that keeps its probabilities: above, they would be the larger part of what a layer keeps.
KEPT_LENGTH = 512
# Fewest and most positions of a row for which torch's kernel is slower: above, scores no longer stay in the cache;
# below, in float32, its products are large enough.
FASTER_LENGTHS = {torch.bfloat16: (1, 1024), torch.float32: (256, 1023)}

_HAS = torch.cpu.get_capabilities()
# A constant: a call would break the compiled graph at every layer.
PRODUCTS_WITHOUT_TILES = bool(_HAS.get("avx512_bf16", False)) and not _HAS.get("amx_bf16", False)


def is_faster(key: Tensor) -> bool:
    """Whether `causal_attention` beats the fused kernel for such keys [B, K, T, D]."""
    if not PRODUCTS_WITHOUT_TILES or key.device.type != "cpu" or key.dtype not in FASTER_LENGTHS:
        return False
    fewest, most = FASTER_LENGTHS[key.dtype]
    return fewest <= key.shape[2] <= most  # no `in range`: the compiler cannot take that of a length it leaves open


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q kᵀ / sqrt(D)) v with everything ahead masked: [B, Q, U, D] over [B, K, T, D] → [B, Q, U, D]."""
    attended: Tensor = _forward(query, key, value)[0]
    return attended


def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Attended values [B, Q, U, D], and the probabilities of all blocks in a row, none of long rows."""
    queries, keys, values = _by_kv_head(query, key, value)
    attended = torch.empty_like(queries)
    kept = queries.new_empty(_kept_numbers(query, key))
    for heads, block, seen, place in _blocks(queries, keys):
        queries_here = queries[heads, :, block].flatten(1, 2)
        room = kept[place] if len(kept) else None
        probabilities = _probabilities(queries_here, keys[heads, seen], block, room)
        product = torch.bmm(probabilities, values[heads, seen])
        attended[heads, :, block] = _per_query(product, queries)
    return attended.view(query.shape), kept


def differentiate(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query [B, Q, U, D], key and value [B, K, T, D] from that of the attended values [B, Q, U, D].

    `kept` are the probabilities that `attend` gave, or nothing: they are made again.
    """
    queries, keys, values = _by_kv_head(query, key, value)
    grads = grad.unflatten(1, (key.shape[1], -1)).flatten(0, 1).contiguous()
    query_grad, key_grad, value_grad = (torch.empty_like(each) for each in (queries, keys, values))
    for heads, block, seen, place in _blocks(queries, keys):
        queries_here, grads_here = (each[heads, :, block].flatten(1, 2) for each in (queries, grads))
        keys_here, values_here = (each[heads, seen] for each in (keys, values))
        if len(kept):
            probabilities = kept[place].view(len(keys_here), -1, seen.stop)
        else:
            probabilities = _probabilities(queries_here, keys_here, block)
        slope = torch.bmm(grads_here, values_here.mT)
        slope = torch._softmax_backward_data(slope, probabilities, -1, slope.dtype)
        query_grad[heads, :, block] = _per_query(torch.bmm(slope, keys_here), queries)
        of_keys, of_values = torch.bmm(slope.mT, queries_here), torch.bmm(probabilities.mT, grads_here)
        if block.stop == queries.shape[2]:  # the first block to be seen
            key_sum, value_sum = of_keys.float(), of_values.float()
        else:
            key_sum[:, seen] += of_keys
            value_sum[:, seen] += of_values
        if block.start == 0:  # the last
            key_grad[heads], value_grad[heads] = key_sum, value_sum
    query_grad *= query.shape[-1] ** -0.5
    return query_grad.view(query.shape), key_grad.view(key.shape), value_grad.view(value.shape)


def _by_kv_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [N, G, U, D], scaled, those of each key-value head together; keys and values [N, T, D]."""
    queries = query.unflatten(1, (key.shape[1], -1)).flatten(0, 1) * query.shape[-1] ** -0.5
    return queries.contiguous(), key.flatten(0, 1).contiguous(), value.flatten(0, 1).contiguous()


def _block_length(queries: Tensor) -> int:
    """Queries of a block, for queries [..., U, D]."""
    length = queries.shape[-2]
    return length if length <= WHOLE_LENGTHS.get(queries.dtype, 0) else BLOCK


def _kept_numbers(query: Tensor, key: Tensor) -> int:
    """Numbers of the probabilities that are kept for queries [B, Q, U, D]: block by block, each up to its end."""
    rows, heads, length, _ = query.shape
    if key.shape[2] > KEPT_LENGTH:
        return 0
    size, before = _block_length(query), key.shape[2] - length
    whole, rest = length // size, length % size
    return rows * heads * (size * size * whole * (whole + 1) // 2 + rest * length + before * length)


def _blocks(queries: Tensor, keys: Tensor) -> Iterator[tuple[slice, slice, slice, slice]]:
    """Key-value heads, queries, keys and place among what is kept, of each block of [N, G, U, D]; last one first."""
    total, group, length, _ = queries.shape
    size, before = _block_length(queries), keys.shape[1] - length
    portion = max(SCORES_BYTES // (group * size * keys.shape[1] * queries.element_size()), 1)
    place = 0
    for first in range(0, total, portion):
        heads = slice(first, min(first + portion, total))
        for start in reversed(range(0, length, size)):
            block = slice(start, min(start + size, length))
            seen = slice(0, before + block.stop)
            numbers = (heads.stop - first) * group * (block.stop - start) * seen.stop
            yield heads, block, seen, slice(place, place + numbers)
            place += numbers


def _per_query(rows: Tensor, queries: Tensor) -> Tensor:
    """[n, G c, D] → [n, G, c, D], with G that of the queries [N, G, U, D]."""
    return rows.unflatten(1, (queries.shape[1], -1))


def _probabilities(queries: Tensor, keys: Tensor, block: slice, room: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ) of the last c of e positions, queries [n, G c, D] over keys [n, e, D]; 0 ahead. Written to room."""
    scores = torch.bmm(queries, keys.mT)
    count = block.stop - block.start
    ahead = torch.ones(count, count, dtype=torch.bool, device=queries.device).triu(1)
    scores.unflatten(1, (-1, count))[..., -count:].masked_fill_(ahead, float("-inf"))
    return torch.softmax(scores, dim=-1, out=None if room is None else room.view(scores.shape))


_forward = torch.library.custom_op("llmtrain::causal_attention", attend, mutates_args=())
_backward = torch.library.custom_op("llmtrain::causal_attention_backward", differentiate, mutates_args=())


@_forward.register_fake
def _forward_shapes(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(_kept_numbers(query, key))


@_backward.register_fake
def _backward_shapes(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # of what is kept there is none
    ctx.save_for_backward(*inputs, output[1])


def _differentiate(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor, Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor, Tensor] = _backward(grad, *ctx.saved_tensors)
    return gradients


_forward.register_autograd(_differentiate, setup_context=_save)
