"""Experts on several processes: each has some of them, and tokens go to where theirs are and back.

GShard (Lepikhin et al. 2020, arXiv 2006.16668, section 3.2). The processes take different rows; an expert's gradient
is that of all tokens that have come to it, so it lacks no sum but over the processes that have the same experts.

Shapes: N rows of this process, M rows that come to it, H hidden size, E experts in all, P processes.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

Compute = Callable[[Tensor, Tensor, Tensor], Tensor]


def own_experts(whole: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    """This process's experts of a parameter [E, ...], on a mesh [with the same ones, with others]."""
    from torch.distributed.tensor import DTensor, Replicate, Shard  # takes as long to import as torch itself

    own = whole.detach().chunk(mesh.size(1))[mesh.get_local_rank(1)].clone()
    sharded = DTensor.from_local(own, mesh, [Replicate(), Shard(0)], run_check=False)
    return nn.Parameter(sharded, requires_grad=whole.requires_grad)


def compute_elsewhere(rows: Tensor, ends: Tensor, group: dist.ProcessGroup, compute: Compute) -> Tensor:
    """Rows [N, H] sorted by expert, each through the expert that it is for, wherever that is → [N, H].

    `ends` [E] are the experts' last rows; rows behind them are for none and become zero. `compute` takes rows [M, H]
    sorted by expert, their experts [M] and the last rows of each, both counted among this process's experts.
    """
    processes = dist.get_world_size(group)
    counts = ends.diff(prepend=ends.new_zeros(1)).view(processes, -1)  # [P, E / P]
    coming = torch.empty_like(counts)
    dist.all_to_all_single(coming, counts, group=group)  # [P, E / P]: from each process, for each expert here
    sent, received = counts.sum(dim=1).tolist(), coming.sum(dim=1).tolist()
    arrived: Tensor = _Exchanged.apply(rows[: sum(sent)], received, sent, group)  # [M, H], by process, then by expert
    numbers = torch.arange(coming.shape[1], device=rows.device).expand_as(coming)
    experts, order = numbers.flatten().repeat_interleave(coming.flatten()).sort(stable=True)
    places = inverse(order)
    computed = compute(reordered(arrived, order, places), experts, coming.sum(dim=0).cumsum(dim=0))
    returned: Tensor = _Exchanged.apply(reordered(computed, places, order), sent, received, group)
    return F.pad(returned, (0, 0, 0, len(rows) - len(returned)))


def inverse(order: Tensor) -> Tensor:
    """The permutation [N] that undoes another.

    Sorted, which costs a little: where numbers are scattered to their places, torch 2.13's compiler for processors
    fuses the loop with one that reads them, and so reads places before they are written (capacities were ignored).
    """
    return order.argsort()


def reordered(values: Tensor, order: Tensor, places: Tensor) -> Tensor:
    """values[order]; `places` is the permutation that undoes it."""
    found: Tensor = _Reordered.apply(values, order, places)
    return found


class _Reordered(torch.autograd.Function):
    """The gradient goes back by the other permutation, where indexing's own would add up."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, order: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return values[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        return grad[places], None, None


class _Exchanged(torch.autograd.Function):
    """Rows for each process in turn, against those of each; the gradient goes the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.received, ctx.sent, ctx.group = received, sent, group
        return _exchange(rows, received, sent, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _exchange(grad, ctx.sent, ctx.received, ctx.group), None, None, None


def _exchange(rows: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> Tensor:
    found = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(found, rows.contiguous(), received, sent, group=group)
    return found
