"""Averages of the weights over the steps of a run, which are often better than the last weights."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from llmtrain.engine.distributed import bare, local


class WeightAverages:
    """Exponential moving averages of the trained weights, a ← d·a + (1 − d)·w after each step, from a = w on.

    Polyak and Juditsky 1992; with a decay, as in `torch.optim.swa_utils.get_ema_multi_avg_fn`. Each process averages
    the part of the weights that it holds. With a decay of None there are none, and nothing is done.
    """

    def __init__(self, model: nn.Module, decay: float | None) -> None:
        self.decay = decay
        trained = bare(model).named_parameters() if decay is not None else ()
        self._weights = {name: weight.detach() for name, weight in trained if weight.requires_grad}
        self._averages = {name: weight.clone() for name, weight in self._weights.items()}

    def state(self) -> dict[str, Tensor]:
        """The live averages, by the weights' names."""
        return dict(self._averages)

    def update(self) -> None:
        """Take in the weights of the step."""
        if self.decay is not None and self._averages:
            torch._foreach_lerp_(_parts(self._averages), _parts(self._weights), 1.0 - self.decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the model's weights are the averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def hand_over(self) -> None:
        """The averages become the model's weights."""
        for weight, average in zip(_parts(self._weights), _parts(self._averages), strict=True):
            weight.copy_(average)

    def _swap(self) -> None:
        for weight, average in zip(_parts(self._weights), _parts(self._averages), strict=True):
            before = weight.clone()
            weight.copy_(average)
            average.copy_(before)


def _parts(tensors: dict[str, Tensor]) -> list[Tensor]:
    """What this process holds of them."""
    return [local(tensor) for tensor in tensors.values()]
