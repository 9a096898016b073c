"""Causal self-attention with grouped queries, and the cache that generation keeps of keys and values.

Shapes: B rows, T positions, S positions in the cache, H hidden size, D head size,
Q query heads, K key-value heads (Q a multiple of K).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.config.schema import ModelConfig
from llmtrain.models import cpu_attention
from llmtrain.models.cpu_linear import Linear
from llmtrain.models.document_attention import Documents, document_attention
from llmtrain.models.positions import RotaryTables, rotate


class KVCache:
    """Keys and values of the tokens that a batch of right-padded prompts has seen, per layer [B, 2K, S, D].

    The first forward pass fills one column for each position of the padded prompts, every later one appends the
    same column for all rows: a plain slice is written, no scatter. Columns between a row's own prompt
    and the longest one hold padding and are masked; the positions that a row's tokens are given leave no gap.

    `prompt_lengths` are the unpadded lengths of the rows, `capacity` is S, `dtype` that of the projections.
    """

    def __init__(
        self, config: ModelConfig, prompt_lengths: list[int], capacity: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        kv_heads = config.num_kv_heads or config.num_heads
        shape = (len(prompt_lengths), 2 * kv_heads, capacity, config.hidden_size // config.num_heads)
        self.layers = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.filled = 0
        self.last_position = config.max_sequence_length - 1
        self.lengths = torch.tensor(prompt_lengths, device=device)  # [B]
        self.mask: Tensor | None = None
        if min(prompt_lengths) < max(prompt_lengths):
            columns = torch.arange(capacity, device=device)
            padding = (columns >= self.lengths[:, None]) & (columns < max(prompt_lengths))  # [B, S]
            mask = torch.zeros(padding.shape, dtype=dtype, device=device).masked_fill(padding, float("-inf"))
            self.mask = mask[:, None, None]  # [B, 1, 1, S], added to the attention scores

    def positions(self, tokens: Tensor) -> Tensor:
        """Positions of the tokens [B, T] that come next: [1, T] for the prompts, [B, 1] for one more token each."""
        if self.filled == 0:
            return torch.arange(tokens.shape[1], device=tokens.device)[None]
        # A row that has reached the model's end may be computed along with the others; its position must exist.
        return self.lengths.clamp(max=self.last_position)[:, None]

    def append(self, layer: int, key: Tensor, value: Tensor) -> Tensor:
        """Writes a layer's new keys and values [B, T, K, D]; returns all of that layer, [B, 2K, filled + T, D]."""
        end = self.filled + key.shape[1]
        kv_heads = key.shape[2]
        columns = self.layers[layer][:, :, self.filled : end]
        columns[:, :kv_heads] = key.transpose(1, 2)
        columns[:, kv_heads:] = value.transpose(1, 2)
        return self.layers[layer][:, :, :end]

    def advance(self, count: int) -> None:
        """Called once per forward pass, after the last layer has appended `count` columns."""
        if self.filled > 0:
            self.lengths = self.lengths + count
        self.filled += count

    def select(self, rows: Tensor) -> None:
        """Keeps the given rows ([new B] indices) only."""
        for layer, old in enumerate(self.layers):
            kept = old.new_empty((len(rows), *old.shape[1:]))
            kept[:, :, : self.filled] = old[:, :, : self.filled][rows]
            self.layers[layer] = kept
        self.lengths = self.lengths[rows]
        self.mask = None if self.mask is None else self.mask[rows]


class Attention(nn.Module):
    """softmax(q kᵀ / sqrt(D)) v per head, each position seeing itself and what is before it, [B, T, H] → [B, T, H].

    With `documents`, it sees what is before it in its own document. Vaswani et al. 2017 (arXiv 1706.03762, eq. 1);
    Q/K query heads share a key-value head (Ainslie et al. 2023, arXiv 2305.13245). `qkv` holds the three projections,
    query rows first, so that one product computes all.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads or config.num_heads
        self.head_size = config.hidden_size // config.num_heads
        self.dropout = config.dropout
        qkv_size = (self.num_heads + 2 * self.num_kv_heads) * self.head_size
        self.qkv = Linear(config.hidden_size, qkv_size, bias=config.bias)
        self.output = Linear(config.hidden_size, config.hidden_size, bias=config.bias)

    def forward(
        self, hidden: Tensor, rotary: RotaryTables | None = None, cache: KVCache | None = None,
        documents: Documents | None = None,
    ) -> Tensor:  # fmt: skip
        heads = self.qkv(hidden).unflatten(-1, (-1, self.head_size))  # [B, T, Q + 2K, D]
        query_key, value = heads.split((self.num_heads + self.num_kv_heads, self.num_kv_heads), dim=2)
        if rotary is not None:
            query_key = rotate(query_key, rotary)
        query, key = query_key.split((self.num_heads, self.num_kv_heads), dim=2)
        if cache is None or cache.filled == 0:
            attended = self._attend_all(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), documents)
            if cache is not None:
                cache.append(self.layer, key, value)
        else:
            seen = cache.append(self.layer, key, value)
            keys, values = seen.split(self.num_kv_heads, dim=1)  # [B, K, S, D]
            mask = None if cache.mask is None else cache.mask[..., : seen.shape[2]]
            attended = self._attend(query.transpose(1, 2), keys, values, mask=mask)
        return self.output(attended.transpose(1, 2).flatten(2))  # [B, T, H]

    def _attend_all(self, query: Tensor, key: Tensor, value: Tensor, documents: Documents | None) -> Tensor:
        """Queries [B, Q, T, D] over keys and values [B, K, T, D] of the same positions → [B, Q, T, D]."""
        if documents is None:
            return self._attend(query, key, value, causal=True)
        if documents.mask is None:
            return document_attention(query, key, value, documents.numbers)
        return self._attend(query, key, value, mask=documents.mask)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """Queries [B, Q, T, D] over keys and values [B, K, S, D] → [B, Q, T, D]."""
        dropout = self.dropout if self.training else 0.0
        if causal and dropout == 0.0 and cpu_attention.is_faster(query):
            return cpu_attention.causal_attention(query, key, value)
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=causal,
            dropout_p=dropout,
            enable_gqa=self.num_heads != self.num_kv_heads,
        )
