"""The one training loop, for every stage.

The state of a run is its weights, its optimizer moments and its step number; everything else is a pure function of the
config and the step: the batch, the learning rate and the random draws. So resuming is: load a checkpoint, go on.

The loop knows no model, data set or objective by name. It asks a `BatchSource` for the batch of a step, an `Objective`
for the summed loss of each micro-batch, and divides by what the loss is averaged over, counted over all processes
*before* the backward pass; hence neither micro-batches nor processes change the gradient.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from llmtrain.config.errors import UserError
from llmtrain.config.schema import CheckpointConfig, EvalConfig, HealthConfig, TrackerConfig
from llmtrain.config.seeds import derive_seed
from llmtrain.engine import checkpoints
from llmtrain.engine.averages import WeightAverages
from llmtrain.engine.distributed import Layout, agree, gathered, gradient_sync, largest, total
from llmtrain.engine.health import Health, HealthWarning
from llmtrain.engine.mirror import Mirror
from llmtrain.engine.saving import Saver
from llmtrain.engine.speed import Speed
from llmtrain.engine.tracking import Tracker

Metrics = dict[str, tuple[Tensor, Tensor]]
Samples = Sequence[Mapping[str, Any]]
# Metrics by the end of their name that are the largest or smallest value of a step, not a sum over a weight.
EXTREMES = {"_max": torch.maximum, "_min": torch.minimum}
NO_WEIGHT = 1e-30
# How often in a run people are shown samples, the first step not counted, where the config does not say.
SHOWN_TIMES = 10


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
Evaluator = Callable[[], dict[str, float]]


@dataclasses.dataclass(kw_only=True)
class Trainer:
    """Everything a run needs, built by its stage; `fit` runs it."""

    folder: Path
    layout: Layout
    model: nn.Module
    """As spread over the processes."""
    batches: BatchSource
    objective: Objective
    optimizer: torch.optim.Optimizer
    learning_rate: Callable[[int], float]
    """Of a step, from 0."""
    steps: int
    seed: int
    tracker: Tracker
    checkpoint: CheckpointConfig
    eval: EvalConfig
    tracking: TrackerConfig
    write_extra: Callable[[Path, int], None]
    """Adds to the checkpoint of a step what its weights need to be read alone, and what was drawn from the data."""
    mirror: Mirror | None = None
    resume_from: checkpoints.Checkpoint | None = None
    """The checkpoint to go on from. None: begin."""
    evaluators: Sequence[Evaluator] = ()
    parts: Mapping[str, nn.Module] = dataclasses.field(default_factory=dict)
    """Modules whose buffers adapt during the run and belong to its state."""
    autocast: Callable[[], torch.autocast]
    """The precision of matrix products."""
    micro_batch_rows: int | None = None
    max_grad_norm: float | None = 1.0
    ema_decay: float | None = None
    """Of averages of the weights, which are then measured and handed on."""
    compile: bool = False
    after_update: Callable[[], Metrics] = dict
    """What goes by an update that has been made, such as the balance of experts; its metrics."""
    fixed_shapes: bool = False
    """Whether batches have a few shapes only: each is compiled for itself then, none for shapes in general."""
    speed: Speed
    health: HealthConfig = dataclasses.field(default_factory=HealthConfig)

    def __post_init__(self) -> None:
        keep = self.checkpoint
        self.monitor = Health(
            self.folder, self.health, best_metric=keep.best_metric, best_mode=keep.best_mode,
            is_main=self.layout.is_main,
        )  # fmt: skip
        self.averages = WeightAverages(self.model, self.ema_decay)
        self.saver = Saver(
            folder=self.folder, layout=self.layout, config=keep, steps=self.steps, state=self._state,
            write_extra=self.write_extra, say=self.tracker.say, mirror=self.mirror,
        )  # fmt: skip

    def fit(self) -> int:
        """Train from the checkpoint, or from the start, to the last step; the step whose weights the model ends with.

        Raises UserError when the loss is no number any more, and for a warning that `health.stop_on` names.
        """
        step = self._resume()
        loss_of: LossFunction = self.objective
        if self.compile:
            loss_of = torch.compile(self.objective, dynamic=False if self.fixed_shapes else None)
        if step == 0:
            self._record(0, {}, self._evaluate())
        with self.saver:
            self._train(step, loss_of)
        step = self.saver.take_best() if self.checkpoint.final == "best" else self.steps
        self.averages.hand_over()
        return step

    def _train(self, step: int, loss_of: LossFunction) -> None:
        """The steps from `step` on; each ends with a row of metrics and, where it is due, a checkpoint."""
        while step < self.steps:
            self.speed.start_step()
            learning_rate = self.learning_rate(step)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate * group.get("lr_scale", 1.0)
            metrics, tokens = self._step(step, loss_of)
            step += 1
            self.averages.update()
            self.speed.end_step(tokens)
            values = {}
            if step % self.tracking.every_steps == 0 or step == self.steps:
                values = self._values(metrics, step) | {"train/learning_rate": learning_rate}
            measured = self._evaluate() if self._is_due(step, self.eval.every_steps) else {}
            self._record(step, values, measured)
            ill = self._ill()
            self.saver.after_step(step, measured, now=ill is not None)
            self._stop_if(ill, step)

    def _step(self, step: int, loss_of: LossFunction) -> tuple[Metrics, int]:
        """One step: every update that the step's batch is good for, each over all its micro-batches."""
        batch = self.batches(step).to(self.layout.device)
        self._show(step + 1, batch.samples)
        metrics, tokens = Totals(batch.metrics()), 0
        for number, update in enumerate(batch.updates()):
            # where nothing counts, the loss is 0 and so shall be the gradient, not 0 / 0
            weight = total(self.objective.weight(update), self.layout).clamp(min=NO_WEIGHT)
            micro_batches = list(update.micro_batches(self.micro_batch_rows))
            for index, micro in enumerate(micro_batches):
                torch.manual_seed(derive_seed(self.seed, "dropout", step, number, self.layout.rank, index))
                with gradient_sync(self.model, now=index == len(micro_batches) - 1):
                    with self.autocast():
                        loss, parts = loss_of(self.model, micro)
                    # the processes' gradients are averaged, so each counts its share `world` times
                    (loss * (self.layout.world / weight)).sum().backward()
                metrics.add(parts)
            metrics.add({"train/grad_norm": (self._clip(), torch.ones(()))})
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            metrics.add(self.after_update())
            tokens += update.num_tokens()
        return metrics.sums, tokens * self.layout.world

    def _show(self, step: int, samples: Samples | None) -> None:
        """Keep what people are shown of the step's batch, at some steps, in the order of its rows."""
        every = self.tracking.samples_every_steps or math.ceil(self.steps / SHOWN_TIMES)
        if samples is not None and (step == 1 or self._is_due(step, every)):
            of_all = gathered(samples, self.layout)
            self.tracker.log_samples(step, sorted(of_all, key=lambda sample: sample["row"]))

    def _clip(self) -> Tensor:
        limit = self.max_grad_norm if self.max_grad_norm is not None else math.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def _values(self, metrics: Metrics, step: int) -> dict[str, float]:
        """The step's metrics as numbers, over all processes; a loss that is no number ends the run here."""
        names = sorted(name for name in metrics if name[-4:] not in EXTREMES)
        pairs = torch.tensor([[float(part) for part in metrics[name]] for name in names], dtype=torch.float64)
        sums = total(pairs.to(self.layout.device), self.layout).tolist()
        values = {_in_group(name): value / weight for name, (value, weight) in zip(names, sums, strict=True) if weight}
        values |= self._extremes(metrics)
        wrong = [name for name in ("train/loss", "train/grad_norm") if not math.isfinite(values.get(name, 0.0))]
        if wrong:
            raise UserError(
                f"step {step}: {' and '.join(wrong)} became {values[wrong[0]]}; stopped before it could be saved. "
                "Lower optimizer.lr or train.max_grad_norm, or lengthen schedule.warmup_steps."
            )
        return values | self.batches.counts(step)

    def _extremes(self, metrics: Metrics) -> dict[str, float]:
        """The step's largest and smallest values, over all processes."""
        signs = {name: 1.0 if name.endswith("_max") else -1.0 for name in sorted(metrics) if name[-4:] in EXTREMES}
        if not signs:
            return {}
        own = torch.tensor([sign * float(metrics[name][0]) for name, sign in signs.items()], dtype=torch.float64)
        found = largest(own.to(self.layout.device), self.layout).tolist()
        return {_in_group(name): sign * value for (name, sign), value in zip(signs.items(), found, strict=True)}

    def _evaluate(self) -> dict[str, float]:
        """Every evaluator's numbers; the model is in evaluation mode meanwhile."""
        self.model.eval()
        values: dict[str, float] = {}
        with torch.no_grad(), self.autocast(), self.averages.in_place():
            for evaluator in self.evaluators:
                values |= evaluator()
        self.model.train()
        wanted = {
            "checkpoint.best_metric": self.checkpoint.best_metric,
            "health.held_out_metric": self.health.held_out_metric,
        }
        for key, name in wanted.items():
            if name is not None and name not in values:
                raise UserError(f"{key}={name} is not measured in this run; it measures {', '.join(sorted(values))}")
        return values

    def _record(self, step: int, values: dict[str, float], measured: dict[str, float]) -> None:
        row = values | measured | (self.speed.values() | self.saver.values() if values else {})
        if row:
            self.tracker.log(step, row)
            for warning in self.monitor.row(step, row):
                self.tracker.say(f"warning at step {step} (health.{warning.rule}): {warning.text}")

    def _ill(self) -> HealthWarning | None:
        """The warning that the run is to stop for, on every process."""
        return agree(self.monitor.reason_to_stop(), self.layout) if self.health.stop_on else None

    def _stop_if(self, ill: HealthWarning | None, step: int) -> None:
        if ill:
            raise UserError(
                f"stopped after step {step} of {self.steps}, as health.stop_on says, for what was noticed at step "
                f"{ill.step}: {ill.text} The checkpoint of step {step} is complete; the same command without "
                f"{ill.rule} in health.stop_on goes on from it."
            )

    def _is_due(self, step: int, every: int | None) -> bool:
        return step == self.steps or (every is not None and step % every == 0)

    def _resume(self) -> int:
        """Fill the state from the checkpoint; the step to go on with."""
        found = self.resume_from
        self.model.train()
        if found is None:
            self.tracker.start(0)
            self.monitor.start()
            return 0
        self.saver.resume(found)
        self.tracker.start(found.step)
        self.monitor.start()
        self.tracker.say(f"resuming {self.folder} at step {found.step} of {self.steps}")
        self._stop_if(self._ill(), found.step)
        return found.step

    def _state(self) -> dict[str, Tensor]:
        return checkpoints.training_state(self.model, self.optimizer, dict(self.parts), self.averages.state())


def _in_group(name: str) -> str:
    """Metrics without a group of their own are the training's."""
    return name if "/" in name else f"train/{name}"


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
