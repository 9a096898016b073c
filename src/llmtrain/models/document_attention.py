"""Attention in rows that hold several documents: within a document only, in decoders causal.

On a CPU each document is attended to for itself, so that a row costs what its documents cost: with eight documents in
1024 positions a quarter of the masked product's time. Two custom operators, so that `torch.compile` takes each as a
whole. Elsewhere, and where attention has dropout, torch's kernels get a mask.

Shapes: B rows, T positions, D head size, Q query heads, K key-value heads, n positions of one document.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llmtrain.kernels import cpu_attention

# What `scaled_dot_product_attention` itself calls on a CPU; here for the log-sum-exp that the backward pass needs.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Documents(NamedTuple):
    """Which positions of a batch belong together, made once for all layers."""

    numbers: Tensor
    """[B, T] int, non-decreasing in a row."""
    mask: Tensor | None
    """[B, 1, T, T] bool, true where a position may see another; None where documents are taken one by one."""

    @classmethod
    def of(cls, numbers: Tensor, dropout: float, *, is_causal: bool = True) -> "Documents":
        """The documents of a batch; `dropout` is that of the attention, 0 outside training."""
        one_by_one = numbers.device.type == "cpu" and dropout == 0.0
        return cls(numbers, None if one_by_one else _mask(numbers, is_causal))

    def positions(self) -> Tensor:
        """The place of each position in its document, [B, T] int64."""
        place = torch.arange(self.numbers.shape[1], device=self.numbers.device).expand(self.numbers.shape)
        begins = torch.ones_like(self.numbers, dtype=torch.bool)
        begins[:, 1:] = self.numbers[:, 1:] != self.numbers[:, :-1]
        return place - torch.where(begins, place, 0).cummax(dim=1).values


def _mask(numbers: Tensor, is_causal: bool) -> Tensor:
    same = numbers[:, None, :, None] == numbers[:, None, None, :]
    return same & torch.ones(same.shape[2:], dtype=torch.bool, device=same.device).tril() if is_causal else same


def document_attention(
    query: Tensor, key: Tensor, value: Tensor, numbers: Tensor, *, is_causal: bool = True
) -> Tensor:  # fmt: skip
    """softmax(q kᵀ / sqrt(D)) v over the same document, or what stands before in it; on a CPU, without dropout.

    Queries [B, Q, T, D] over keys and values [B, K, T, D] in documents `numbers` [B, T] → [B, Q, T, D].
    """
    attended: Tensor = _forward(query, key, value, numbers, is_causal)[0]
    return attended


@torch.library.custom_op("llmtrain::document_attention", mutates_args=())
def _forward(query: Tensor, key: Tensor, value: Tensor, numbers: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
    """Attended values [B, Q, T, D] and the log-sum-exp of each query's scores [B, Q, T]."""
    attended, normaliser = _forward_shapes(query, key, value, numbers, is_causal)
    for here in _spans(numbers):
        attended[here], normaliser[here] = _attend(query[here], key[here], value[here], is_causal)
    return attended, normaliser


@torch.library.custom_op("llmtrain::document_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, numbers: Tensor, is_causal: bool,
    attended: Tensor, normaliser: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query [B, Q, T, D], key and value [B, K, T, D] from that of the attended values [B, Q, T, D]."""
    gradients = _like_a_projection(query), _like_a_projection(key), _like_a_projection(value)
    saved = (grad, query, key, value, attended, normaliser)
    for here in _spans(numbers):
        for whole, part in zip(
            gradients, _differentiate_one(*(each[here] for each in saved), is_causal=is_causal), strict=True
        ):
            whole[here] = part
    return gradients


def _spans(numbers: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Where each document lies in tensors [B, heads, T, ...]."""
    for row, each in enumerate(numbers.numpy()):
        borders = [0, *(np.flatnonzero(each[1:] != each[:-1]) + 1).tolist(), len(each)]
        for start, end in pairwise(borders):
            yield slice(row, row + 1), slice(None), slice(start, end)


def _attend(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
    """One document: attended values [1, Q, n, D] and log-sum-exp [1, Q, n], where the backward pass needs that."""
    if is_causal and cpu_attention.is_faster(query):
        return cpu_attention.attend(query, key, value)[0], torch.zeros(())
    return _flash(query, key, value, 0.0, is_causal)


def _differentiate_one(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, attended: Tensor, normaliser: Tensor, *,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`_backward` of one document."""
    if is_causal and cpu_attention.is_faster(query):
        return cpu_attention.differentiate(grad, query, key, value, kept=query.new_empty(0))
    return _flash_backward(grad, query, key, value, attended, normaliser, 0.0, is_causal)


def _like_a_projection(heads: Tensor) -> Tensor:
    """An empty [B, heads, T, D] that lies in memory as [B, T, heads, D]: the output projection needs no copy of it."""
    return heads.new_empty(heads.transpose(1, 2).shape).transpose(1, 2)


@_forward.register_fake
def _forward_shapes(
    query: Tensor, key: Tensor, value: Tensor, numbers: Tensor, is_causal: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    sums = torch.promote_types(query.dtype, torch.float32)
    return _like_a_projection(query), query.new_empty(query.shape[:3], dtype=sums)


@_backward.register_fake
def _backward_shapes(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, numbers: Tensor, is_causal: bool,
    attended: Tensor, normaliser: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(map(_like_a_projection, (query, key, value)))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.is_causal = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, numbers, attended, normaliser = ctx.saved_tensors
    return *_backward(grad, query, key, value, numbers, ctx.is_causal, attended, normaliser), None, None


_forward.register_autograd(_differentiate, setup_context=_save)
