"""Context parallelism: each process computes some positions of all rows, and attends to the keys and values of all.

Keys and values are gathered once in each layer, and their gradients are summed back to where they come from, as Llama 3
was trained (arXiv 2407.21783, section 3.3.2): queries see them through a mask, so windows, documents and ALiBi are what
they are in one process. What a process holds of them is one layer's at a time, all else a share.

Shapes: B rows, T positions, P positions filled up, N of this process, C processes.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from llmtrain.objectives.own_positions import own_columns, padded_length


class PositionShare:
    """Which positions this process computes, and how those of all are put together; see `own_columns`."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def __deepcopy__(self, memo: object) -> "PositionShare":
        """Itself: processes are not copied."""
        return self

    def columns(self, length: int, device: torch.device) -> Tensor:
        """Those of this process, [N], in rows of `length`."""
        return own_columns(length, self.rank, self.size, device)

    def filled_up(self, values: Tensor) -> Tensor:
        """Values [B, T] in P columns, with zeros behind."""
        length = values.shape[1]
        return F.pad(values, (0, padded_length(length, self.size) - length))

    def gathered(self, own: Tensor) -> Tensor:
        """Values [B, N, ...] of every process as [B, P, ...]; gradients go back summed."""
        rows, length = len(own), own.shape[1] * self.size
        found: Tensor = _Gathered.apply(own.contiguous(), self.group, self.size)
        order = torch.cat([own_columns(length, rank, self.size, own.device) for rank in range(self.size)])
        return found.unflatten(0, (self.size, rows)).transpose(0, 1).flatten(1, 2).index_select(1, order.argsort())

    def in_rows(self, own: Tensor, length: int, *, alone: bool) -> Tensor:
        """Values [B, N, H] in their places among those of all processes, [B, T, H]; `alone`: among zeros."""
        if not alone:
            return self.gathered(own)[:, :length]
        rows = own.new_zeros(len(own), own.shape[1] * self.size, own.shape[2])
        return rows.index_copy(1, self.columns(length, own.device), own)[:, :length]


class _Gathered(torch.autograd.Function):
    """[B, ...] of each process, one behind the other, [C · B, ...]."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: dist.ProcessGroup, size: int) -> Tensor:
        ctx.group, ctx.size = group, size
        found = own.new_empty(size * len(own), *own.shape[1:])
        dist.all_gather(list(found.chunk(size)), own, group=group)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        parts = list(grad.contiguous().chunk(ctx.size))
        own = torch.empty_like(parts[0])
        dist.reduce_scatter(own, parts, group=ctx.group)
        return own, None, None
