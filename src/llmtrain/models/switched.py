"""Layers that have parts for one use and parts for another, of which one is switched on at a time."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn


class Switched(nn.Module):
    """A layer that computes with the part called `active`; None stands for none."""

    active: str | None


def switched_layers(model: nn.Module) -> list[Switched]:
    """The layers that have such parts."""
    return [module for module in model.modules() if isinstance(module, Switched)]


@contextmanager
def switched_to(active: Mapping[Switched, str | None]) -> Iterator[None]:
    """Within, each of these layers computes with the part that is named."""
    before = {layer: layer.active for layer in active}
    _switch(active)
    try:
        yield
    finally:
        _switch(before)


def _switch(active: Mapping[Switched, str | None]) -> None:
    for layer, part in active.items():
        layer.active = part
