"""Attention with grouped queries, to the row itself or to a source.

Shapes: B rows, T positions, S positions of a source, H hidden size, D head size,
Q query heads, K key-value heads (Q a multiple of K).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from llmtrain.config.schema import ModelConfig
from llmtrain.kernels import cpu_attention
from llmtrain.models.attend import attend_capped, with_sinks
from llmtrain.models.cache import KVCache
from llmtrain.models.context_parallel import PositionShare
from llmtrain.models.document_attention import document_attention
from llmtrain.models.linear import Linear
from llmtrain.models.norms import make_norm
from llmtrain.models.positions import RotaryTables, rotate
from llmtrain.models.shared_rows import SharedRows, taken
from llmtrain.models.tensor_parallel import even, split_by_inputs, split_by_outputs, sum_gradients


class Source(NamedTuple):
    """What an encoder has made of another text."""

    states: Tensor
    """[B, S, H]."""
    mask: Tensor | None = None
    """[B, 1, 1, S] bool, true for what is no padding; None where all is."""


class Context(NamedTuple):
    """What the layers with the same window are given beside hidden states, made once for a forward pass."""

    rotary: RotaryTables | None = None
    mask: Tensor | None = None
    """Of `score_mask`, over the positions of a row; None where one sees all of its document, or all before it."""
    documents: Tensor | None = None
    """[B, T] numbers of documents that are attended to one by one."""
    rows: SharedRows | None = None
    """Where positions that rows share are found."""
    source: Source | None = None
    """What cross-attention looks at, but for what a cache holds of it."""
    share: PositionShare | None = None
    """Where the keys and values of other processes' positions are found."""
    length: int | None = None
    """Of rows that tensor parallel layers have filled up, T; None where they have not."""


class Attention(nn.Module):
    """softmax(q kᵀ / sqrt(D)) v per head, each position seeing itself and what is before it, [B, T, H] → [B, T, H].

    In an encoder it sees what is behind it too; with documents, its own document alone; with shared rows, B is 1, T
    what is computed, and a position sees what is before it in its row. With `crosses`, keys and values are those of a
    source, all of which is seen. Vaswani et al. 2017 (arXiv 1706.03762, eq. 1); Q/K query heads share a key-value head
    (Ainslie et al. 2023, arXiv 2305.13245). `qkv` holds the three projections, query rows first, so that one product
    computes all; `key_value` those of a source.
    """

    def __init__(self, config: ModelConfig, layer: int, *, crosses: bool = False) -> None:
        super().__init__()
        self.layer, self.crosses = layer, crosses
        self.is_causal = config.is_causal and not crosses
        self.window = config.windows[layer]
        self.num_heads, self.num_kv_heads, self.head_size = config.num_heads, config.kv_heads, config.head_size
        self.softcap = config.attention_softcap
        self.dropout = config.dropout
        query_size, key_size = self.num_heads * self.head_size, self.num_kv_heads * self.head_size
        if crosses:
            self.query = Linear(config.hidden_size, query_size, bias=config.has_bias("qkv"))
            self.key_value = Linear(config.hidden_size, 2 * key_size, bias=config.has_bias("qkv"))
        else:
            self.qkv = Linear(config.hidden_size, query_size + 2 * key_size, bias=config.has_bias("qkv"))
        self.output = Linear(query_size, config.hidden_size, bias=config.has_bias("attention_output"))
        # Kernels scale by 1 / sqrt(D): the queries get what is lacking.
        self.query_factor = 1.0 if config.attention_scale is None else config.attention_scale * self.head_size**0.5
        self.qk_norm = config.qk_norm
        if config.qk_norm != "none":
            whole = config.qk_norm == "full"
            self.query_norm = make_norm(config, self.head_size * (self.num_heads if whole else 1))
            self.key_norm = make_norm(config, self.head_size * (self.num_kv_heads if whole else 1))
        has_sinks = config.attention_sinks and not crosses
        self.sink_bias = nn.Parameter(torch.zeros(self.num_heads)) if has_sinks else None

    def split(self, mesh: DeviceMesh) -> None:
        """Keep this process's share of the heads; raises ConfigError where that is not even."""
        queries = even("the number of heads", self.num_heads, mesh) * self.head_size
        keys = even("the number of key-value heads", self.num_kv_heads, mesh) * self.head_size
        if self.crosses:
            split_by_outputs(self.query, mesh, [queries])
            split_by_outputs(self.key_value, mesh, [keys, keys], takes_all=True)
        else:
            split_by_outputs(self.qkv, mesh, [queries, keys, keys])
        split_by_inputs(self.output, mesh)
        if self.qk_norm == "head":  # of whose weight a process sees its own heads
            sum_gradients(self.query_norm, mesh.get_group())
            sum_gradients(self.key_norm, mesh.get_group())
        self.num_heads, self.num_kv_heads = self.num_heads // mesh.size(), self.num_kv_heads // mesh.size()

    def forward(self, hidden: Tensor, context: Context, cache: KVCache | None = None) -> Tensor:
        attend = self._attend_source if self.crosses else self._attend_row
        return self.output(attend(hidden, context, cache).transpose(1, 2).flatten(2))  # [B, T, H]

    def _attend_row(self, hidden: Tensor, context: Context, cache: KVCache | None) -> Tensor:
        """Self-attention of hidden states [B, T, H] → [B, Q, T, D]."""
        heads = self.qkv(hidden)[:, : context.length].unflatten(-1, (-1, self.head_size))  # [B, T, Q + 2K, D]
        query_key, value = heads.split((self.num_heads + self.num_kv_heads, self.num_kv_heads), dim=2)
        if self.qk_norm != "none":
            query, key = query_key.split((self.num_heads, self.num_kv_heads), dim=2)
            normed = (self._normed(*each, hidden) for each in ((self.query_norm, query), (self.key_norm, key)))
            query_key = torch.cat(tuple(normed), dim=2)
        if context.rotary is not None:
            query_key = rotate(query_key, context.rotary)
        query, key = query_key.split((self.num_heads, self.num_kv_heads), dim=2)
        if self.query_factor != 1.0:
            query = query * self.query_factor
        if context.share is not None:
            heads = context.share.gathered(torch.cat((key, value), dim=2))
            key, value = heads.split(self.num_kv_heads, dim=2)
        if cache is not None and cache.adding:
            return cache.attend(self.layer, self.window, query, key, value, self.sink_bias)
        if context.rows is not None:
            return self._attend_shared(query[0], key[0], value[0], context.rows, context.mask)
        attended = self._attend_all(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), context)
        if cache is not None:
            cache.keep_prompts(self.layer, key, value)
        return attended

    def _attend_source(self, hidden: Tensor, context: Context, cache: KVCache | None) -> Tensor:
        """Cross-attention of hidden states [B, T, H] → [B, Q, T, D]; nothing is rotated, for no distance is between."""
        query = self.query(hidden)[:, : context.length].unflatten(-1, (-1, self.head_size))  # [B, T, Q, D]
        if self.qk_norm != "none":
            query = self._normed(self.query_norm, query, hidden)
        if self.query_factor != 1.0:
            query = query * self.query_factor
        source = None if cache is None else cache.source
        if source is not None and cache is not None and cache.adding:
            return source.attend(self.layer, query)
        assert context.source is not None, "cross-attention needs a source"
        states, mask = context.source
        key, value = self.key_value(states).unflatten(-1, (-1, self.head_size)).chunk(2, dim=2)  # [B, S, K, D] each
        if self.qk_norm != "none":
            key = self._normed(self.key_norm, key, states)
        if source is not None:
            source.keep(self.layer, key, value)
        return self._attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask)

    def _normed(self, norm: nn.Module, heads: Tensor, like: Tensor) -> Tensor:
        """Queries or keys [B, T, N, D], each head by itself (Qwen3) or all together (OLMo 2).

        In the dtype of `like`, the hidden states: autocast gives heads another.
        """
        wide = heads.to(like.dtype)
        normed = norm(wide.flatten(2)).view_as(wide) if self.qk_norm == "full" else norm(wide)
        return normed.to(heads.dtype)

    def _attend_all(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        """Queries [B, Q, T, D] over keys and values [B, K, T, D] of the same positions → [B, Q, T, D]."""
        if context.documents is not None:
            return document_attention(query, key, value, context.documents, is_causal=self.is_causal)
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
        """Queries [B, Q, T, D] over keys and values [B, K, S, D] → [B, Q, T, D].

        No mask: they see all, or where attention is causal and they are the last T, all before them.
        """
        dropout = self.dropout if self.training else 0.0
        if self.sink_bias is not None:
            assert mask is not None, "`needs_mask` sees to it"
            key, value, mask = with_sinks(key, value, mask, self.sink_bias)
        masks_ahead = mask is None and self.is_causal
        if masks_ahead and dropout == 0.0 and cpu_attention.is_faster(key):
            return cpu_attention.causal_attention(query, key, value)
        causal = masks_ahead and query.shape[2] == key.shape[2]
        if masks_ahead and not causal:  # torch's own mask would be that of the first ones
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
