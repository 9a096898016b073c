"""The one training loop, for every stage.

The state of a run is its weights, its optimizer moments and its step number; everything else is a pure function of the
config and the step: the batch, the learning rate and the random draws. So resuming is: load a checkpoint, go on.

What happens inside a step is in `steps.py`.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from llmtrain.config.errors import UserError
from llmtrain.config.schema import CheckpointConfig, EvalConfig, HealthConfig, TrackerConfig
from llmtrain.engine import checkpoints
from llmtrain.engine.distributed import Layout, agree, gathered
from llmtrain.engine.health import Health, HealthWarning
from llmtrain.engine.speed import Speed
from llmtrain.engine.steps import BatchSource, LossFunction, Metrics, Objective, Samples, Updates, as_numbers
from llmtrain.engine.tracking import Tracker

# How often in a run people are shown samples, the first step not counted, where the config does not say.
SHOWN_TIMES = 10

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
    resume_from: checkpoints.Checkpoint | None = None
    """The checkpoint to go on from. None: begin."""
    evaluators: Sequence[Evaluator] = ()
    parts: Mapping[str, nn.Module] = dataclasses.field(default_factory=dict)
    """Modules whose buffers adapt during the run and belong to its state."""
    autocast: Callable[[], torch.autocast]
    """The precision of matrix products."""
    micro_batch_rows: int | None = None
    max_grad_norm: float | None = 1.0
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

    def fit(self) -> int:
        """Train from the checkpoint, or from the start, to the last step; the step whose weights the model ends with.

        Raises UserError when the loss is no number any more, and for a warning that `health.stop_on` names.
        """
        step = self._resume()
        make_updates = self.updates()
        if step == 0:
            self._record(0, {}, self._evaluate())
        last_saved = time.monotonic()
        while step < self.steps:
            self.speed.start_step()
            learning_rate = self.learning_rate(step)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate * group.get("lr_scale", 1.0)
            batch = self.batches(step).to(self.layout.device)
            self._show(step + 1, batch.samples)
            metrics, tokens = make_updates(step, batch)
            step += 1
            self.speed.end_step(tokens)
            values = {}
            if step % self.tracking.every_steps == 0 or step == self.steps:
                values = self._values(metrics, step) | {"train/learning_rate": learning_rate}
            measured = self._evaluate() if self._is_due(step, self.eval.every_steps) else {}
            self._record(step, values, measured)
            ill = self._ill()
            if ill or self._is_due(step, self.checkpoint.every_steps) or self._minutes_passed(last_saved):
                self._save(step, measured)
                last_saved = time.monotonic()
            self._stop_if(ill, step)
        return self._take_best() if self.checkpoint.final == "best" else step

    def updates(self) -> Updates:
        """What makes the updates of a step."""
        loss_of: LossFunction = self.objective
        if self.compile:
            loss_of = torch.compile(self.objective, dynamic=False if self.fixed_shapes else None)
        return Updates(
            layout=self.layout, model=self.model, objective=self.objective, loss_of=loss_of, optimizer=self.optimizer,
            seed=self.seed, autocast=self.autocast, micro_batch_rows=self.micro_batch_rows,
            max_grad_norm=self.max_grad_norm, after_update=self.after_update,
        )  # fmt: skip

    def _show(self, step: int, samples: Samples | None) -> None:
        """Keep what people are shown of the step's batch, at some steps, in the order of its rows."""
        every = self.tracking.samples_every_steps or math.ceil(self.steps / SHOWN_TIMES)
        if samples is not None and (step == 1 or self._is_due(step, every)):
            of_all = gathered(samples, self.layout)
            self.tracker.log_samples(step, sorted(of_all, key=lambda sample: sample["row"]))

    def _values(self, metrics: Metrics, step: int) -> dict[str, float]:
        """The step's metrics as numbers, over all processes; a loss that is no number ends the run here."""
        values = as_numbers(metrics, self.layout)
        wrong = [name for name in ("train/loss", "train/grad_norm") if not math.isfinite(values.get(name, 0.0))]
        if wrong:
            raise UserError(
                f"step {step}: {' and '.join(wrong)} became {values[wrong[0]]}; stopped before it could be saved. "
                "Lower optimizer.lr or train.max_grad_norm, or lengthen schedule.warmup_steps."
            )
        return values | self.batches.counts(step)

    def _evaluate(self) -> dict[str, float]:
        """Every evaluator's numbers; the model is in evaluation mode meanwhile."""
        self.model.eval()
        values: dict[str, float] = {}
        with torch.no_grad(), self.autocast():
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
        row = values | measured
        if row:
            self.tracker.log(step, row | (self.speed.values() if values else {}))
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

    def _minutes_passed(self, since: float) -> bool:
        minutes = self.checkpoint.every_minutes
        return minutes is not None and agree(time.monotonic() - since >= 60 * minutes, self.layout)

    def _resume(self) -> int:
        """Fill the state from the checkpoint; the step to go on with."""
        found = self.resume_from
        self.model.train()
        if found is None:
            self.tracker.start(0)
            self.monitor.start()
            return 0
        checkpoints.load(found, self._state(), self.layout)
        self.tracker.start(found.step)
        self.monitor.start()
        self.tracker.say(f"resuming {self.folder} at step {found.step} of {self.steps}")
        self._stop_if(self._ill(), found.step)
        return found.step

    def _save(self, step: int, measured: dict[str, float]) -> None:
        root = self.folder / "checkpoints"
        checkpoints.save(
            root, step, self._state(), self.layout, metrics=measured,
            write_extra=lambda folder: self.write_extra(folder, step),
        )  # fmt: skip
        if self.layout.is_main:
            keep = self.checkpoint
            checkpoints.prune(
                root,
                newest=step,
                keep_last=keep.keep_last,
                keep_best=max(keep.keep_best, int(keep.final == "best")),
                best_metric=keep.best_metric,
                best_mode=keep.best_mode,
            )

    def _take_best(self) -> int:
        """Fill the model from the checkpoint that is best by `checkpoint.best_metric`; its step."""
        metric, mode = self.checkpoint.best_metric, self.checkpoint.best_mode
        assert metric is not None
        root = self.folder / "checkpoints"
        best = checkpoints.best_good(root, self.layout, self.tracker.say, metric=metric, mode=mode, newest=self.steps)
        if best is None:
            raise UserError(
                f"checkpoint.final=best: no checkpoint in {root} was saved with {metric}. "
                "Set checkpoint.final=last to finish with the last weights."
            )
        weights = {name: value for name, value in self._state().items() if name.startswith("model.")}
        checkpoints.load(best, weights, self.layout)
        self.tracker.say(f"best by {metric}: step {best.step} ({best.metrics[metric]:.4g})")
        return best.step

    def _state(self) -> dict[str, Tensor]:
        return checkpoints.training_state(self.model, self.optimizer, dict(self.parts))
