"""Weights whose rows the processes hold in another order than the whole has.

A weight that holds several matrices, one below the other, is shared out so that each process has some rows of every
matrix. Checkpoints have the rows of the whole, whatever the layout: they get a copy in its order, and what is loaded
goes back from such a copy.
"""

from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard


def row_orders(model: nn.Module) -> dict[str, Tensor]:
    """By parameter, which row of the whole stands where, [O]; only of those that stand in another order."""
    return {
        f"{name}.{parameter}": module.row_order
        for name, module in model.named_modules()
        if isinstance(getattr(module, "row_order", None), Tensor)
        for parameter, _ in module.named_parameters(recurse=False)
    }


def whole(value: DTensor, order: Tensor | None) -> Tensor:
    """The whole of a weight in its own order, on every process."""
    rests_on, value = value.device, cast(DTensor, value.to(value.device_mesh.device_type))
    for dim in range(value.device_mesh.ndim - 1):  # one dimension after another, for torch warns of doing so by itself
        placements = [*[Replicate()] * (dim + 1), *value.placements[dim + 1 :]]
        value = value.redistribute(placements=placements)
    found = value.full_tensor().to(rests_on)
    return found if order is None else found[order.argsort().to(found.device)]


def in_whole_order(state: Mapping[str, Tensor], orders: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a run's state, copies of what stands in another order, in that of the whole; all processes call this.

    They are spread over the processes too. What is loaded into them reaches the weights by `put_back`.
    """
    copies: dict[str, Tensor] = {}
    for name, value in state.items():
        kind, _, rest = name.partition(".")
        parameter = rest.rpartition(".")[0] if kind == "optimizer" else rest  # of a moment, its own name follows
        order = orders.get(parameter)
        if order is not None and isinstance(value, DTensor) and len(value) == len(order):
            copy = _everywhere(whole(value, order), value)
            copies[name] = copy.redistribute(placements=[Shard(0)] * copy.device_mesh.ndim)
            copies[name].stands_for = value, order  # type: ignore[attr-defined]
    return copies


def put_back(state: Mapping[str, Tensor]) -> None:
    """Fill weights from what was loaded into their copies; all processes call this."""
    for copy in state.values():
        if isinstance(copy, DTensor) and hasattr(copy, "stands_for"):
            (weight, order), rows = copy.stands_for, whole(copy, None)
            weight.copy_(_everywhere(rows[order.to(rows.device)], weight).redistribute(placements=weight.placements))


def _everywhere(rows: Tensor, like: DTensor) -> DTensor:
    mesh = like.device_mesh
    return DTensor.from_local(rows, mesh, [Replicate()] * mesh.ndim, run_check=False)
