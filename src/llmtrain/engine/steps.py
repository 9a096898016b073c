"""What happens inside a step: the batch's updates, each over its micro-batches, and what is measured on the way.

The loop knows no model, data set or objective by name. It asks a `BatchSource` for the batch of a step, an `Objective`
for the summed loss of each micro-batch, and divides by what the loss is averaged over, counted over all processes
*before* the backward pass; hence neither micro-batches nor processes change the gradient.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from llmtrain.config.errors import UserError
from llmtrain.config.seeds import derive_seed
from llmtrain.engine import gradients
from llmtrain.engine.distributed import Layout, gradient_sync, largest, total
from llmtrain.engine.faults import Fault, Guard
from llmtrain.engine.loss_scale import LossScale
from llmtrain.engine.micro_batches import FoundRows, is_out_of_memory
from llmtrain.engine.pipeline import Portions, pipeline_of
from llmtrain.engine.speed import Speed

Metrics = dict[str, tuple[Tensor, Tensor]]
Samples = Sequence[Mapping[str, Any]]
# Metrics by the end of their name that are the largest or smallest value of a step, not a sum over a weight. Those of a
# rollout are none: rewards are called what users call them.
EXTREMES = {"_max": torch.maximum, "_min": torch.minimum}
ROLLOUT = "align/"
NO_WEIGHT = 1e-30
NOT_DETERMINISTIC = "does not have a deterministic implementation"  # torch's words
OUT_OF_MEMORY = "ran out of memory. Lower train.micro_batch_rows, or set it to auto, which finds the largest that fits."


class Rows(Protocol):
    """A batch, as the loop sees it."""

    @property
    def samples(self) -> Samples | None: ...
    def to(self, device: torch.device) -> Self: ...
    def updates(self) -> Iterator[Self]: ...
    def num_updates(self) -> int: ...
    def micro_batches(self, rows: int | None) -> Iterator[Self]: ...
    def metrics(self) -> Metrics: ...
    def num_tokens(self) -> int: ...
    def num_predicted(self) -> int: ...
    def width(self) -> int: ...
    def __len__(self) -> int: ...


class BatchSource(Protocol):
    """Where batches come from; pure in (config, step). `phase`, where it has one, is what its time is counted as."""

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


def nothing_adapts(is_made: bool) -> Metrics:
    """What goes by an update where nothing does."""
    return {}


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
    micro_batch_rows: int | FoundRows | None
    max_grad_norm: float | None
    after_update: Callable[[bool], Metrics]
    guard: Guard
    loss_scale: LossScale | None
    progress: Callable[[str], None]
    speed: Speed

    def __call__(self, step: int, batch: Rows) -> tuple[Metrics, int, list[Fault]]:
        """Every update that the step's batch is good for, unless it is left out.

        The step's metrics, its tokens over all processes, and what was wrong with its updates.
        """
        metrics, tokens, planned = Totals(batch.metrics()), 0, batch.num_updates()
        faults: list[Fault] = []
        begun = 0
        for number, update in enumerate(batch.updates()):
            begun += 1
            with self.speed.phase("forward_backward"):
                loss, measured = self._gradient_that_fits(step, number, update)
            metrics.add(measured)
            with self.speed.phase("optimizer"):
                gradients.complete(self.model)
                norm = gradients.clip(self.model, self.max_grad_norm)
                loss_of_all, norm_of_all = self._agreed(loss, norm)
                if math.isfinite(norm_of_all):
                    metrics.add({"train/grad_norm": (norm, torch.ones(()))})
                is_made = self._may_be_made(loss_of_all, norm_of_all, faults)
                if is_made:
                    self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                metrics.add(self.after_update(is_made))
            tokens += update.num_tokens()
            self.speed.predictions += update.num_predicted() * self.layout.data_world
        if planned > 1:  # a rollout's; the rest are left out once the policy has moved too far
            metrics.add({f"{ROLLOUT}updates": (torch.tensor(float(begun)), torch.tensor(float(planned)))})
        return metrics.sums, tokens * self.layout.data_world, faults

    def _may_be_made(self, loss: float, norm: float, faults: list[Fault]) -> bool:
        """Whether an update may be made; what is wrong with it, other than its scale, is added to `faults`."""
        if self.loss_scale and self.loss_scale.overflows(math.isfinite(loss), math.isfinite(norm)):
            return False
        fault = self.guard.judge(loss, norm)
        faults += [fault] if fault else []
        return fault is None or fault.remedy == "warn"

    def _gradient_that_fits(self, step: int, number: int, update: Rows) -> tuple[Tensor, Metrics]:
        """As `_add_gradient`; where memory does not suffice and it may have fewer rows, again with these."""
        rows = self.micro_batch_rows
        if isinstance(rows, FoundRows):
            rows = rows.at(step) or self._find_rows(rows, step, update)
        while True:
            try:
                return self._add_gradient(step, number, update, rows)
            except RuntimeError as error:
                if NOT_DETERMINISTIC in str(error):
                    raise UserError(f"engine.deterministic: {str(error).split('.')[0]}. Set it to false.") from error
                if not is_out_of_memory(error):
                    raise
                if not isinstance(self.micro_batch_rows, FoundRows):
                    raise UserError(f"step {step + 1}: {OUT_OF_MEMORY} ({str(error).splitlines()[0]})") from error
            rows = self.micro_batch_rows.halve(step, rows or len(update))
            self._forget()

    def _find_rows(self, found: FoundRows, step: int, update: Rows) -> int:
        def passes(number: int) -> None:
            micro = next(update.micro_batches(number))
            with gradient_sync(self.model, now=False), self.autocast():
                # not what a compiler made of it, which would do so for each number of rows
                self.objective(self.model, micro)[0].sum().backward()

        rows = found.find(step, passes, rows=len(update), width=max(update.width(), 1))
        self._forget()
        return rows

    def _forget(self) -> None:
        """Leave nothing of passes that do not count."""
        self.optimizer.zero_grad(set_to_none=True)
        self.after_update(False)
        if self.layout.device.type == "cuda":
            torch.cuda.empty_cache()

    def _add_gradient(self, step: int, number: int, update: Rows, rows: int | None) -> tuple[Tensor, Metrics]:
        """Add the gradient of an update, over its micro-batches and all processes.

        This process's part of the loss, and metrics.
        """
        # where nothing counts, the loss is 0 and so shall be the gradient, not 0 / 0
        weight = total(self.objective.weight(update), self.layout).clamp(min=NO_WEIGHT)
        # the token processes' gradients are averaged, so each counts its share that many times
        scale = self.layout.token_world * (float(self.loss_scale.scale) if self.loss_scale else 1.0) / weight
        metrics, summed = Totals({}), torch.zeros_like(weight)
        for loss, parts in self._passes(step, number, list(update.micro_batches(rows)), scale):
            summed += loss
            metrics.add(parts)
        if self.loss_scale:
            self.loss_scale.unscale(self.model.parameters())
        return (summed / weight).sum(), metrics.sums

    def _passes(
        self, step: int, number: int, micro_batches: Sequence[Any], scale: Tensor
    ) -> Iterator[tuple[Tensor, Metrics]]:
        """Add the gradients of micro-batches, times `scale`; their summed losses and metrics."""
        if pipeline := pipeline_of(self.model):
            seed_of = functools.partial(self._seed, step, number)
            yield from pipeline.train(Portions(self.loss_of, micro_batches, scale, seed_of, self.autocast))
            return
        for index, micro in enumerate(micro_batches):
            self.progress(f"step {step + 1}, update {number + 1}, micro-batch {index + 1}")
            torch.manual_seed(self._seed(step, number, index))
            with gradient_sync(self.model, now=index == len(micro_batches) - 1):
                with self.autocast():
                    loss, parts = self.loss_of(self.model, micro)
                (loss * scale).sum().backward()
            yield loss.detach(), parts

    def _agreed(self, loss: Tensor, norm: Tensor) -> list[float]:
        """The loss and the gradient's norm as numbers, the same on all processes; the one time a step is waited for."""
        own = torch.stack([loss.double(), norm.to(loss.device).double() / self.layout.token_world])
        numbers: list[float] = total(own, self.layout).tolist()
        return numbers

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
            combine = EXTREMES[name[-4:]] if _is_extreme(name) else torch.add
            self.sums[name] = (value, weight) if before is None else (combine(before[0], value), before[1] + weight)


def as_numbers(metrics: Metrics, layout: Layout) -> dict[str, float]:
    """A step's metrics over all processes."""
    names = sorted(name for name in metrics if not _is_extreme(name))
    pairs = torch.tensor([[float(part) for part in metrics[name]] for name in names], dtype=torch.float64)
    sums = total(pairs.to(layout.device), layout).tolist()
    values = {_in_group(name): value / weight for name, (value, weight) in zip(names, sums, strict=True) if weight}
    return values | _extremes(metrics, layout)


def _extremes(metrics: Metrics, layout: Layout) -> dict[str, float]:
    """The step's largest and smallest values, over all processes."""
    signs = {name: 1.0 if name.endswith("_max") else -1.0 for name in sorted(metrics) if _is_extreme(name)}
    if not signs:
        return {}
    own = torch.tensor([sign * float(metrics[name][0]) for name, sign in signs.items()], dtype=torch.float64)
    found = largest(own.to(layout.device), layout).tolist()
    return {_in_group(name): sign * value for (name, sign), value in zip(signs.items(), found, strict=True)}


def _is_extreme(name: str) -> bool:
    return name[-4:] in EXTREMES and not name.startswith(ROLLOUT)


def _in_group(name: str) -> str:
    """Metrics without a group of their own are the training's."""
    return name if "/" in name else f"train/{name}"
