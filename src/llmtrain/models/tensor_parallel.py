"""Linear layers of which each process computes a part, for the same rows.

    by outputs   y_p = x W_pᵀ + b_p        W_p some rows of W
    by inputs    y = Σ_p x_p W_pᵀ + b      x_p is what a layer by outputs has come to, W_p some columns of W

Between such pairs, where norms and residual sums go position by position, each process has its share of the positions
alone: x is gathered, and of y each process gets the sum for its own positions (Shoeybi et al. 2019, Megatron-LM, arXiv
1909.08053, section 3, with the sequence parallelism of Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2).
What gathers forward adds up backward, and the other way round. Rows that do not divide are filled up with zeros.

Weights are DTensors, so that whoever saves them knows the whole.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from llmtrain.config.errors import ConfigError
from llmtrain.models.linear import Linear, product

# Of tensors one behind the other, under the names that torch has had since 2.13.
ALL_GATHER = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
Exchange = Callable[[Tensor, dist.ProcessGroup], Tensor]


class GradientSum(NamedTuple):
    """What is lacking to a gradient after the backward pass: a sum over processes, and a factor."""

    group: dist.ProcessGroup | None
    """None: of this process alone."""
    factor: float


class ByOutputs:
    """A layer of which this process has some outputs: [B, T / P, I] → [B, T, O / P].

    With `takes_all`, what it is given has all positions already, and is the same on all P processes.
    """

    def __init__(self, group: dist.ProcessGroup, *, takes_all: bool = False) -> None:
        self.group, self.takes_all = group, takes_all

    def __call__(self, linear: nn.Linear, inputs: Tensor) -> Tensor:
        # each does something else with them: the gradient is the sum of theirs
        inputs = _exchanged(inputs, self.group, *((_same, _sum) if self.takes_all else (_gather, _sum_of_own)))
        bias = None if linear.bias is None else local(linear.bias)
        return product(inputs, local(linear.weight), bias)


class ByInputs:
    """A layer of which this process has some inputs, [B, T, I / P] → [B, T / P, O]; the bias is added once."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __call__(self, linear: nn.Linear, inputs: Tensor) -> Tensor:
        products = _filled_up(product(inputs, local(linear.weight), None), self.group)
        summed = _exchanged(products, self.group, _sum_of_own, _gather)
        # a process sees its positions' gradient of the bias alone
        bias = None if linear.bias is None else _exchanged(linear.bias, self.group, _same, _sum)
        return summed if bias is None else summed + bias.to(summed.dtype)


def share_of(hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This process's positions of hidden states [B, T, H] that are the same on all: [B, T / P rounded up, H]."""
    return _exchanged(_filled_up(hidden, group), group, _own, _gather)


def all_of(hidden: Tensor, group: dist.ProcessGroup, length: int) -> Tensor:
    """[B, T, H] of each process's share of T = `length` positions; what follows is the same on all processes."""
    return _exchanged(hidden, group, _gather, _own)[:, :length]


def even(what: str, number: int, mesh: DeviceMesh) -> int:
    """The number; raises ConfigError where the processes cannot share it out evenly."""
    if number % mesh.size():
        raise ConfigError(f"engine.tensor_parallel={mesh.size()} does not divide {what} of the model, {number}")
    return number


def split_by_outputs(linear: Linear, mesh: DeviceMesh, pieces: Sequence[int], *, takes_all: bool = False) -> None:
    """Keeps this process's rows: its even share of each of the `pieces`, numbers of rows one below the other."""
    starts = [sum(pieces[:number]) for number in range(len(pieces))]
    shares = [
        torch.arange(start + size * rank // mesh.size(), start + size * (rank + 1) // mesh.size())
        for rank in range(mesh.size())
        for start, size in zip(starts, pieces, strict=True)
    ]
    order = torch.cat(shares)
    own = order.chunk(mesh.size())[mesh.get_local_rank()].to(linear.weight.device)
    linear.weight = _parameter(linear.weight, linear.weight[own], mesh, dim=0)
    if linear.bias is not None:
        linear.bias = _parameter(linear.bias, linear.bias[own], mesh, dim=0)
    linear.row_order = order if len(pieces) > 1 else None
    linear.part = ByOutputs(mesh.get_group(), takes_all=takes_all)


def split_by_inputs(linear: Linear, mesh: DeviceMesh) -> None:
    """Keeps this process's even share of the columns."""
    own = linear.weight.chunk(mesh.size(), dim=1)[mesh.get_local_rank()]
    linear.weight = _parameter(linear.weight, own, mesh, dim=1)
    linear.part = ByInputs(mesh.get_group())


def sum_gradients(module: nn.Module, group: dist.ProcessGroup | None, factor: float = 1.0) -> None:
    """Says that each process sees a part only of what the module's parameters do."""
    module.gradient_sum = GradientSum(group, factor)  # type: ignore[assignment]


def _parameter(whole: Tensor, own: Tensor, mesh: DeviceMesh, dim: int) -> nn.Parameter:
    from torch.distributed.tensor import DTensor, Shard  # takes as long to import as torch itself

    sharded = DTensor.from_local(own.detach().clone(), mesh, [Shard(dim)], run_check=False)
    return nn.Parameter(sharded, requires_grad=whole.requires_grad)


def local(weight: Tensor) -> Tensor:
    """This process's part of a weight."""
    from torch.distributed.tensor import DTensor

    part: Tensor = weight.to_local() if isinstance(weight, DTensor) else weight
    return part


class _Exchange(torch.autograd.Function):
    """there(values, group); the gradient is back(its gradient, group)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup, there: Exchange, back: Exchange) -> Tensor:
        ctx.group, ctx.back = group, back
        return there(values, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.back(grad, ctx.group), None, None, None


def _exchanged(values: Tensor, group: dist.ProcessGroup, there: Exchange, back: Exchange) -> Tensor:
    found: Tensor = _Exchange.apply(values, group, there, back)
    return found


def _same(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    return values.view_as(values)


def _sum(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    summed = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(summed, group=group)
    return summed


def _filled_up(hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
    """With zeros behind the last position, so that all processes have as many."""
    return F.pad(hidden, (0, 0, 0, -hidden.shape[1] % group.size()))


def _own(everything: Tensor, group: dist.ProcessGroup) -> Tensor:
    return everything.chunk(group.size(), dim=1)[group.rank()].contiguous()


def _gather(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, P t, H] of [B, t, H]."""
    shares = own.new_empty(group.size() * len(own), *own.shape[1:])
    ALL_GATHER(shares, own.contiguous(), group=group)
    return shares.unflatten(0, (group.size(), -1)).transpose(0, 1).flatten(1, 2)


def _sum_of_own(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, t, H], the sum over the processes, of [B, P t, H]."""
    shares = parts.unflatten(1, (group.size(), -1)).transpose(0, 1).flatten(0, 1).contiguous()
    own = parts.new_empty(len(parts), *shares.shape[1:])
    REDUCE_SCATTER(own, shares, group=group)
    return own
