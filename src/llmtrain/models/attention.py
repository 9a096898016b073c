"""Causal self-attention with grouped queries, and the cache that generation keeps of keys and values.

Shapes: B rows, T positions, S positions in the cache, H hidden size, D head size,
Q query heads, K key-value heads (Q a multiple of K), G = Q / K.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.config.schema import ModelConfig
from llmtrain.kernels import cpu_attention
from llmtrain.models.document_attention import document_attention
from llmtrain.models.linear import Linear
from llmtrain.models.masks import added, score_mask
from llmtrain.models.norms import make_norm
from llmtrain.models.positions import RotaryTables, rotate
from llmtrain.models.shared_rows import SharedRows, taken

# Columns of a cache are read, and prompts padded, in multiples of this: torch's CPU kernels then give a row the same
# bits whatever stands behind its own columns.
WIDTH_MULTIPLE = 16


class KVCache:
    """Keys and values of the tokens that rows have seen, per layer [R, 2K, S, D]: position p of a row in column p.

    The first forward pass takes right-padded prompts, every later one a single token more for each row. Columns behind
    a row's own tokens hold padding, or what other rows have left there: finite, and masked.

    `lengths` are the unpadded lengths of the prompts, 0 for rows that `adopt` fills; `capacity` is the longest that a
    row may grow, `dtype` that of the projections.
    """

    def __init__(
        self, config: ModelConfig, lengths: Sequence[int], capacity: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.config, self.windows = config, {*config.windows}
        shape = (len(lengths), 2 * config.kv_heads, rounded_up(capacity), config.head_size)
        self.layers = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.lengths = torch.tensor(lengths, device=device)  # [R]
        self.longest = max(lengths)  # known without asking the device
        self.last = min(config.max_sequence_length, shape[2]) - 1
        self.width = 0  # columns that are read
        self.written = 0  # columns that hold numbers
        self.adding = False  # single tokens, no longer prompts

    def begin(self, tokens: Tensor) -> Tensor:
        """Positions of the tokens [B, T] that come next, [1, T] for prompts, [B, 1] for one token more of each row.

        There may be more rows of tokens than the cache has: what is added to fill them up is not kept.
        """
        if self.width == 0:
            self._set_width(tokens.shape[1])
            return torch.arange(tokens.shape[1], device=tokens.device)[None]
        self.adding = True
        self._set_width(self.longest + 1)
        rows, kv_heads, capacity, _ = self.layers[0].shape
        # A row that has ended may be computed along with the others: its position must exist.
        columns = self.lengths.clamp(max=self.last)[:, None]  # [R, 1]
        starts = torch.arange(0, rows * kv_heads * capacity, capacity, device=tokens.device)
        self.places = (starts.view(rows, kv_heads) + columns).flatten()  # [R 2K], of R 2K S
        keys, dtype = torch.arange(self.width, device=tokens.device), self.layers[0].dtype
        self.masks = {  # of each kind of layer, [R, 1 or Q, 1, width]
            window: added(score_mask(self.config, window, columns, keys), dtype) for window in self.windows
        }
        self.lengths = columns[:, 0] + 1
        self.longest += 1
        return F.pad(columns, (0, 0, 0, len(tokens) - rows)) if len(tokens) > rows else columns

    def keep_prompts(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Writes a layer's keys and values of the prompts, [R, T, K, D]."""
        self.layers[layer][:, :, : key.shape[1]] = torch.cat((key, value), dim=2).transpose(1, 2)

    def attend(self, layer: int, window: int | None, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Adds one position [B, 1, K, D] and attends to those it sees: queries [B, 1, Q, D] → [B, Q, 1, D]."""
        rows, head_size = len(self.lengths), key.shape[3]
        new = torch.cat((key, value), dim=2)[:rows]
        self.layers[layer].view(-1, head_size).index_copy_(0, self.places, new.view(-1, head_size))
        keys, values = self.views[layer]
        one, mask = query[:rows].transpose(1, 2), self.masks[window]
        if self.config.attention_softcap is None:
            attended = attend_one(one, keys, values, mask)
        else:
            attended = attend_one_capped(one, keys, values, mask, self.config.attention_softcap)
        lacking = len(query) - rows
        return F.pad(attended, (0, 0, 0, 0, 0, 0, 0, lacking)) if lacking else attended

    def adopt(self, rows: Tensor, other: "KVCache", which: Tensor) -> None:
        """Puts rows `which` ([N] indices) of another cache in place of the given rows [N]."""
        self._set_width(other.width)
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine[rows, :, : other.width] = theirs[which, :, : other.width]
        self.lengths[rows] = other.lengths[which]
        self.longest = int(self.lengths.max())

    def release(self, rows: Tensor) -> None:
        """Forgets what the given rows ([N] indices) have seen; they are computed on as if they were new."""
        self.lengths[rows] = 0
        self.longest = int(self.lengths.max())

    def select(self, rows: Tensor) -> None:
        """Keeps the given rows ([new R] indices, each at most once) only, in this order."""
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0]
        for layer, columns in enumerate(self.layers):
            columns[moved, :, : self.longest] = columns[rows[moved], :, : self.longest]
            self.layers[layer] = columns[: len(rows)]
        self.lengths = self.lengths[rows]
        self.longest = int(self.lengths.max())
        self.width = 0
        self._set_width(self.longest)

    def _set_width(self, columns: int) -> None:
        """Makes at least so many columns readable. Memory is touched only when it is first needed."""
        width = min(rounded_up(columns), self.layers[0].shape[2])
        if width == self.width:
            return
        for layer in self.layers if width > self.written else ():
            layer[:, :, self.written : width] = 0
        self.width, self.written = width, max(self.written, width)
        self.views = [layer[:, :, :width].chunk(2, dim=1) for layer in self.layers]  # keys, values [R, K, width, D]


def rounded_up(columns: int) -> int:
    """The next multiple of WIDTH_MULTIPLE."""
    return -(-columns // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


class Context(NamedTuple):
    """What the layers with the same window are given beside hidden states, made once for a forward pass."""

    rotary: RotaryTables | None = None
    mask: Tensor | None = None
    """Of `score_mask`, over the positions of a row; None where one sees all before it, in its document."""
    documents: Tensor | None = None
    """[B, T] numbers of documents that are attended to one by one."""
    rows: SharedRows | None = None
    """Where positions that rows share are found."""


class Attention(nn.Module):
    """softmax(q kᵀ / sqrt(D)) v per head, each position seeing itself and what is before it, [B, T, H] → [B, T, H].

    With documents, it sees what is before it in its own document; with shared rows, B is 1, T what is computed, and a
    position sees what is before it in its row. Vaswani et al. 2017 (arXiv 1706.03762, eq. 1);
    Q/K query heads share a key-value head (Ainslie et al. 2023, arXiv 2305.13245). `qkv` holds the three projections,
    query rows first, so that one product computes all.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.window = config.windows[layer]
        self.num_heads, self.num_kv_heads, self.head_size = config.num_heads, config.kv_heads, config.head_size
        self.softcap = config.attention_softcap
        self.dropout = config.dropout
        qkv_size = (self.num_heads + 2 * self.num_kv_heads) * self.head_size
        self.qkv = Linear(config.hidden_size, qkv_size, bias=config.has_bias("qkv"))
        self.output = Linear(
            self.num_heads * self.head_size, config.hidden_size, bias=config.has_bias("attention_output")
        )
        # Kernels scale by 1 / sqrt(D): the queries get what is lacking.
        self.query_factor = 1.0 if config.attention_scale is None else config.attention_scale * self.head_size**0.5
        self.qk_norm = config.qk_norm
        if config.qk_norm != "none":
            whole = config.qk_norm == "full"
            self.query_norm = make_norm(config, self.head_size * (self.num_heads if whole else 1))
            self.key_norm = make_norm(config, self.head_size * (self.num_kv_heads if whole else 1))

    def forward(self, hidden: Tensor, context: Context, cache: KVCache | None = None) -> Tensor:
        heads = self.qkv(hidden).unflatten(-1, (-1, self.head_size))  # [B, T, Q + 2K, D]
        query_key, value = heads.split((self.num_heads + self.num_kv_heads, self.num_kv_heads), dim=2)
        if self.qk_norm != "none":
            query_key = self._normalised(query_key.to(hidden.dtype)).to(query_key.dtype)  # autocast's is another
        if context.rotary is not None:
            query_key = rotate(query_key, context.rotary)
        query, key = query_key.split((self.num_heads, self.num_kv_heads), dim=2)
        if self.query_factor != 1.0:
            query = query * self.query_factor
        if cache is not None and cache.adding:
            attended = cache.attend(self.layer, self.window, query, key, value)
        elif context.rows is not None:
            attended = self._attend_shared(query[0], key[0], value[0], context.rows, context.mask)
        else:
            attended = self._attend_all(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), context)
            if cache is not None:
                cache.keep_prompts(self.layer, key, value)
        return self.output(attended.transpose(1, 2).flatten(2))  # [B, T, H]

    def _normalised(self, query_key: Tensor) -> Tensor:
        """Queries and keys [B, T, Q + K, D], each head by itself (Qwen3) or all heads together (OLMo 2)."""
        query, key = query_key.split((self.num_heads, self.num_kv_heads), dim=2)
        if self.qk_norm == "full":
            query, key = self.query_norm(query.flatten(2)).view_as(query), self.key_norm(key.flatten(2)).view_as(key)
        else:
            query, key = self.query_norm(query), self.key_norm(key)
        return torch.cat((query, key), dim=2)

    def _attend_all(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        """Queries [B, Q, T, D] over keys and values [B, K, T, D] of the same positions → [B, Q, T, D]."""
        if context.documents is not None:
            return document_attention(query, key, value, context.documents)
        return self._attend(query, key, value, context.mask)

    def _attend_shared(
        self, query: Tensor, key: Tensor, value: Tensor, shared: SharedRows, mask: Tensor | None
    ) -> Tensor:  # fmt: skip
        """Queries [N, Q, D] over keys and values [N, K, D] of the rows that they stand in → [1, Q, N, D]."""

        def rows(heads: Tensor, which: Tensor) -> Tensor:  # [N, heads, D], [R, T] → [R, heads, T, D]
            return taken(heads.flatten(1), which).unflatten(-1, (-1, self.head_size)).transpose(1, 2)

        whole, others = shared.sources[shared.leaders], shared.sources[shared.followers]
        attended = [self._attend(rows(query, whole), rows(key, whole), rows(value, whole), mask)]
        if len(others):
            own = rows(query, others[:, shared.first_own :])
            own_mask = None if mask is None else mask[:, :, shared.first_own :]
            attended.append(self._attend(own, rows(key, others), rows(value, others), own_mask))
        found = torch.cat([each.transpose(1, 2).flatten(2).flatten(0, 1) for each in attended])  # [L T + F U, Q D]
        return taken(found, shared.attended).unflatten(-1, (-1, self.head_size)).transpose(0, 1)[None]

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Queries [B, Q, T, D] over keys and values [B, K, S, D] → [B, Q, T, D]; no mask: causal, of the last T."""
        dropout = self.dropout if self.training else 0.0
        if mask is None and dropout == 0.0 and cpu_attention.is_faster(key):
            return cpu_attention.causal_attention(query, key, value)
        causal = mask is None and query.shape[2] == key.shape[2]
        if mask is None and not causal:  # torch's own mask would be that of the first ones
            everything = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
            mask = everything.tril(key.shape[2] - query.shape[2])
        if mask is not None and self.softcap is not None:
            return attend_capped(query, key, value, mask, self.softcap, dropout)
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask if mask is None or mask.dtype == torch.bool else mask.to(query.dtype),
            is_causal=causal,
            dropout_p=dropout,
            enable_gqa=self.num_heads != self.num_kv_heads,
        )


def attend_one(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """One query for each row and head [B, Q, 1, D] over keys and values [B, K, S, D], `mask` [B, 1 or Q, 1, S] added.

    The queries that share a key-value head are taken as so many queries of that head: nothing is expanded, and the
    keys are read once. In bfloat16 torch's CPU kernel is slow for a single query (3.5 times slower than for two), so
    there is a copy beside a lone one. In float32 it is as fast either way, but depends on S for more than two.
    """
    batch, heads, _, head_size = query.shape
    kv_heads = keys.shape[1]
    if query.device.type == "cpu" and query.dtype == torch.float32:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=heads != kv_heads)
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, head_size)
    if mask.shape[1] != 1:
        mask = mask.view(batch, kv_heads, heads // kv_heads, -1)
    if heads == kv_heads and query.device.type == "cpu":
        grouped = grouped.expand(-1, -1, 2, -1)
    attended = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
    return attended[:, :, : heads // kv_heads].reshape(query.shape)


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
