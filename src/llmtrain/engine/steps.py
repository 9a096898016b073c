"""What happens inside a step: the batch's updates, each over its micro-batches, and what is measured on the way.

The loop knows no model, data set or objective by name. It asks a `BatchSource` for the batch of a step, an `Objective`
for the summed loss of each micro-batch, and divides by what the loss is averaged over, counted over all processes
*before* the backward pass; hence neither micro-batches nor processes change the gradient.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from llmtrain.config.seeds import derive_seed
from llmtrain.engine import gradients
from llmtrain.engine.distributed import Layout, gradient_sync, largest, total
from llmtrain.engine.pipeline import Portions, pipeline_of

Metrics = dict[str, tuple[Tensor, Tensor]]
Samples = Sequence[Mapping[str, Any]]
# Metrics by the end of their name that are the largest or smallest value of a step, not a sum over a weight.
EXTREMES = {"_max": torch.maximum, "_min": torch.minimum}
NO_WEIGHT = 1e-30


class Rows(Protocol):
    """A batch, as the loop sees it."""

    @property
    def samples(self) -> Samples | None: ...
    def to(self, device: torch.device) -> Self: ...
    def updates(self) -> Iterator[Self]: ...
    def micro_batches(self, rows: int | None) -> Iterator[Self]: ...
    def metrics(self) -> Metrics: ...
    def num_tokens(self) -> int: ...


class BatchSource(Protocol):
    """Where batches come from; pure in (config, step)."""

    def __call__(self, step: int) -> Any:
        """The rows this process trains on at `step` (from 0)."""

    def counts(self, step: int) -> dict[str, float]:
        """What the first `step` steps have consumed, by source."""


class Objective(Protocol):
    """What is minimised."""

    def weight(self, batch: Any) -> Tensor:
        """What the loss is averaged over: tokens, pairs. A loss of several terms has one for each."""

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, Metrics]:
        """Summed loss, or one for each term; metrics as (sum, weight) pairs."""


LossFunction = Callable[[nn.Module, Any], tuple[Tensor, Metrics]]


@dataclasses.dataclass(kw_only=True)
class Updates:
    """Makes the updates of a step."""

    layout: Layout
    model: nn.Module
    objective: Objective
    loss_of: LossFunction
    """The objective, or what a compiler made of it."""
    optimizer: torch.optim.Optimizer
    seed: int
    autocast: Callable[[], torch.autocast]
    micro_batch_rows: int | None
    max_grad_norm: float | None
    after_update: Callable[[], Metrics]

    def __call__(self, step: int, batch: Rows) -> tuple[Metrics, int]:
        """Every update that the step's batch is good for; the step's metrics, and its tokens over all processes."""
        metrics, tokens = Totals(batch.metrics()), 0
        for number, update in enumerate(batch.updates()):
            self._add_gradient(step, number, update, metrics)
            gradients.complete(self.model)
            metrics.add({"train/grad_norm": (gradients.clip(self.model, self.max_grad_norm), torch.ones(()))})
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            metrics.add(self.after_update())
            tokens += update.num_tokens()
        return metrics.sums, tokens * self.layout.data_world

    def _add_gradient(self, step: int, number: int, update: Rows, metrics: "Totals") -> None:
        """Add the gradient of an update, over all its micro-batches and all processes."""
        # where nothing counts, the loss is 0 and so shall be the gradient, not 0 / 0
        weight = total(self.objective.weight(update), self.layout).clamp(min=NO_WEIGHT)
        # the token processes' gradients are averaged, so each counts its share that many times
        scale = self.layout.token_world / weight
        micro_batches = list(update.micro_batches(self.micro_batch_rows))
        if pipeline := pipeline_of(self.model):
            seed_of = functools.partial(self._seed, step, number)
            for _, parts in pipeline.train(Portions(self.loss_of, micro_batches, scale, seed_of, self.autocast)):
                metrics.add(parts)
            return
        for index, micro in enumerate(micro_batches):
            torch.manual_seed(self._seed(step, number, index))
            with gradient_sync(self.model, now=index == len(micro_batches) - 1):
                with self.autocast():
                    loss, parts = self.loss_of(self.model, micro)
                (loss * scale).sum().backward()
            metrics.add(parts)

    def _seed(self, step: int, update: int, micro_batch: int, *stage: int) -> int:
        """Of dropout in a micro-batch, and of those in a stage of a pipeline."""
        return derive_seed(self.seed, "dropout", step, update, self.layout.token_rank, micro_batch, *stage)


class Totals:
    """Running sums of (sum, weight) pairs; nothing is read back from the device."""

    def __init__(self, metrics: Metrics) -> None:
        self.sums: Metrics = {}
        self.add(metrics)

    def add(self, metrics: Metrics) -> None:
        """Add another micro-batch's pairs."""
        for name, (value, weight) in metrics.items():
            before = self.sums.get(name)
            value, weight = value.detach(), weight.detach()
            combine = EXTREMES.get(name[-4:], torch.add)
            self.sums[name] = (value, weight) if before is None else (combine(before[0], value), before[1] + weight)


def as_numbers(metrics: Metrics, layout: Layout) -> dict[str, float]:
    """A step's metrics over all processes."""
    names = sorted(name for name in metrics if name[-4:] not in EXTREMES)
    pairs = torch.tensor([[float(part) for part in metrics[name]] for name in names], dtype=torch.float64)
    sums = total(pairs.to(layout.device), layout).tolist()
    values = {_in_group(name): value / weight for name, (value, weight) in zip(names, sums, strict=True) if weight}
    return values | _extremes(metrics, layout)


def _extremes(metrics: Metrics, layout: Layout) -> dict[str, float]:
    """The step's largest and smallest values, over all processes."""
    signs = {name: 1.0 if name.endswith("_max") else -1.0 for name in sorted(metrics) if name[-4:] in EXTREMES}
    if not signs:
        return {}
    own = torch.tensor([sign * float(metrics[name][0]) for name, sign in signs.items()], dtype=torch.float64)
    found = largest(own.to(layout.device), layout).tolist()
    return {_in_group(name): sign * value for (name, sign), value in zip(signs.items(), found, strict=True)}


def _in_group(name: str) -> str:
    """Metrics without a group of their own are the training's."""
    return name if "/" in name else f"train/{name}"
