"""Attention over keys and values that are given: one query of each row and head, and scores that are capped.

Shapes: B rows, T queries, S keys, D head size, Q query heads, K key-value heads (Q a multiple of K), G = Q / K.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.models.masks import added

# Behind the keys with sinks: the one that is attended to, and as many as make a multiple.
SINK_COLUMNS = 16
# A product in bfloat16 sums up so many columns in one go; beyond, where it is cut depends on how many there are.
SUMMED_COLUMNS = 1024
# Smaller products torch does not give to oneDNN, or to it if there are enough rows: all heads' sizes, and that of one.
PRODUCTS_FROM, PRODUCTS_FROM_HEAD_SIZE = 72, 8


def with_sinks(keys: Tensor, values: Tensor, mask: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [B, K, S + 16, D] and a mask [B or 1, Q, T, S + 16] with which a head can attend to nothing.

    Behind the others comes a key of zeros, whose value is zeros too, and to whose score the mask adds a learned number,
    `sinks` [Q]: softmax(s)_j becomes exp(s_j) / (exp(sink) + Σ exp(s)) (gpt-oss, arXiv 2508.10925, section 2; Xiao
    et al. 2024, arXiv 2309.17453, learn such a token). Columns are read in multiples of 16; the rest are not seen.
    """
    mask = added(mask, keys.dtype)
    columns = F.pad(sinks[:, None, None], (0, SINK_COLUMNS - 1), value=float("-inf"))  # [Q, 1, 16]
    shape = (len(mask), len(sinks), mask.shape[2])
    mask = torch.cat((mask.expand(*shape, -1), columns.to(mask.dtype).expand(*shape, -1)), dim=-1)
    behind = (0, 0, 0, SINK_COLUMNS)
    return F.pad(keys, behind), F.pad(values, behind), mask


def attend_one(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """One query for each row and head [B, Q, 1, D] over keys and values [B, K, S, D], `mask` [B, 1 or Q, 1, S] added.

    The queries that share a key-value head are taken as so many queries of that head: nothing is expanded, and the
    keys are read once. In float32 torch's CPU kernel depends on S for more than two of them, so each is taken alone.
    """
    kv_heads = keys.shape[1]
    on_cpu = query.device.type == "cpu"
    if on_cpu and query.dtype == torch.float32:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)
    grouped = query.reshape(len(query), kv_heads, -1, query.shape[3])
    mask = mask if mask.shape[1] == 1 else mask.view(len(mask), kv_heads, -1, mask.shape[3])
    if on_cpu and _goes_by_products(query):
        attended = _attend_by_products(grouped, keys, values, mask)
    else:
        attended = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
    return attended.reshape(query.shape)


def _goes_by_products(query: Tensor) -> bool:
    """Whether `_attend_by_products` is faster for [B, Q, 1, D], and one kernel computes any number of rows."""
    wide_enough = query.shape[1] * query.shape[3] >= PRODUCTS_FROM and query.shape[3] >= PRODUCTS_FROM_HEAD_SIZE
    return query.dtype == torch.bfloat16 and wide_enough and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _attend_by_products(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """G queries for each key-value head [B, K, G, D] over keys and values [B, K, S, D], as products over all heads.

    torch's fused CPU kernel calls a product for each head of each row, and calls cost more than such products do.
    They are the operators of `kernels/cpu_attention.py`, which training goes through.
    """
    rows = (query * query.shape[-1] ** -0.5).flatten(0, 1)  # [B K, G, D]
    scores = torch.bmm(rows, keys.flatten(0, 1).mT).view(*query.shape[:3], -1)
    probabilities = scores.add_(mask).softmax(dim=-1).flatten(0, 1)  # [B K, G, S]
    parts = probabilities.split(SUMMED_COLUMNS, dim=2), values.flatten(0, 1).split(SUMMED_COLUMNS, dim=1)
    attended = [torch.bmm(*part) for part in zip(*parts, strict=True)]
    return functools.reduce(torch.Tensor.add_, attended).view(query.shape)


def attend_capped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, softcap: float, dropout: float = 0.0
) -> Tensor:
    """softmax(c tanh(q kᵀ / (c sqrt(D))) + mask) v: queries [B, Q, T, D] over [B, K, S, D] → [B, Q, T, D].

    Gemma 2 (arXiv 2408.00118, section 2). No kernel of torch's caps its scores: here they are made, Q T S numbers for
    each row, and float32 or wider from the cap to the probabilities. `mask` [B or 1, 1 or Q, T, S] is `score_mask`'s.
    """
    kv_heads, length, head_size = key.shape[1], query.shape[2], query.shape[3]
    grouped = query.unflatten(1, (kv_heads, -1)).flatten(2, 3)  # [B, K, G T, D]
    scores = (grouped @ key.mT).unflatten(2, (-1, length)).flatten(1, 2)  # [B, Q, T, S]
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = softcap * torch.tanh(scores * (head_size**-0.5 / softcap))
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    probabilities = F.dropout(scores.softmax(dim=-1).to(value.dtype), dropout)
    probabilities = probabilities.unflatten(1, (kv_heads, -1)).flatten(2, 3)  # [B, K, G T, S]
    return (probabilities @ value).view(query.shape)


def attend_one_capped(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, softcap: float) -> Tensor:
    """`attend_capped` for one query of each row and head [B, Q, 1, D].

    On a CPU the products are sums, not matrix products, for these round by the number of columns and so by what other
    rows have: zeros at the end of a sum leave it as it is.
    """
    if query.device.type != "cpu":
        return attend_capped(query, keys, values, mask, softcap)
    heads, head_size = query.shape[1], query.shape[3]
    attended = torch.empty_like(query)
    for head in range(heads):  # one at a time, for what is summed up has R S D numbers
        shared = head // (heads // keys.shape[1])
        scores = (query[:, head].float() * keys[:, shared]).sum(dim=-1)  # [B, S]
        capped = softcap * torch.tanh(scores * (head_size**-0.5 / softcap))
        probabilities = (capped + mask[:, min(head, mask.shape[1] - 1), 0]).softmax(dim=-1)
        attended[:, head, 0] = (probabilities[..., None] * values[:, shared]).sum(dim=1).to(query.dtype)
    return attended
