"""Linear layers of which each process computes a part, for the same rows.

    by outputs   y_p = x W_pᵀ + b_p        x is whole, W_p some rows of W
    by inputs    y = Σ_p x_p W_pᵀ + b      x_p is what a layer by outputs has come to, W_p some columns of W

Shoeybi et al. 2019 (Megatron-LM, arXiv 1909.08053, section 3): forward, the second adds up over the processes,
backward, the first. Weights are DTensors, so that whoever saves them knows the whole.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from llmtrain.config.errors import ConfigError
from llmtrain.models.linear import Linear, product


class GradientSum(NamedTuple):
    """What is lacking to a gradient after the backward pass: a sum over processes, and a factor."""

    group: dist.ProcessGroup | None
    """None: of this process alone."""
    factor: float


class ByOutputs:
    """A layer of which this process has some outputs."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __call__(self, linear: nn.Linear, inputs: Tensor) -> Tensor:
        bias = None if linear.bias is None else local(linear.bias)
        return product(_Copied.apply(inputs, self.group), local(linear.weight), bias)


class ByInputs:
    """A layer of which this process has some inputs; the bias is added once, to the sum."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __call__(self, linear: nn.Linear, inputs: Tensor) -> Tensor:
        summed: Tensor = _Summed.apply(product(inputs, local(linear.weight), None), self.group)
        return summed if linear.bias is None else summed + linear.bias.to(summed.dtype)


def even(what: str, number: int, mesh: DeviceMesh) -> int:
    """The number; raises ConfigError where the processes cannot share it out evenly."""
    if number % mesh.size():
        raise ConfigError(f"engine.tensor_parallel={mesh.size()} does not divide {what} of the model, {number}")
    return number


def split_by_outputs(linear: Linear, mesh: DeviceMesh, pieces: Sequence[int]) -> None:
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
    linear.part = ByOutputs(mesh.get_group())


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
    part: Tensor = weight.to_local() if hasattr(weight, "to_local") else weight
    return part


class _Copied(torch.autograd.Function):
    """The same on every process; the gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return inputs.view_as(inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _sum(grad, ctx.group), None


class _Summed(torch.autograd.Function):
    """The sum over the processes, which is used alike on all of them; so the gradient is that of any."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _sum(inputs, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None


def _sum(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    values = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(values, group=group)
    return values
