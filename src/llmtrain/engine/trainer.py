"""The one training loop, for every stage.

The state of a run is its weights, its optimizer moments and its step number; everything else is a pure function of the
config and the step: the batch, the learning rate and the random draws. So resuming is: load a checkpoint, go on.

What happens inside a step is in `steps.py`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from llmtrain.config.errors import Stopped, UserError
from llmtrain.config.schema import CheckpointConfig, EvalConfig, HealthConfig, TrackerConfig
from llmtrain.engine import checkpoints
from llmtrain.engine.averages import WeightAverages
from llmtrain.engine.distributed import Layout, agree, gathered
from llmtrain.engine.faults import PART, TOO_OFTEN, Fault, Guard, as_row, in_words
from llmtrain.engine.health import Health, HealthWarning
from llmtrain.engine.loss_scale import PART as SCALE_PART
from llmtrain.engine.loss_scale import LossScale
from llmtrain.engine.micro_batches import FoundRows
from llmtrain.engine.mirror import Mirror
from llmtrain.engine.saving import Saver
from llmtrain.engine.speed import Speed
from llmtrain.engine.steps import (
    BatchSource,
    LossFunction,
    Metrics,
    Objective,
    Samples,
    Updates,
    as_numbers,
    nothing_adapts,
)
from llmtrain.engine.tracking import FAULTS_FILE, Tracker
from llmtrain.engine.watchdog import nothing_watches

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
    stop_after: int | None = None
    """Save and stop after this step."""
    seed: int
    tracker: Tracker
    checkpoint: CheckpointConfig
    eval: EvalConfig
    tracking: TrackerConfig
    extra: Callable[[int], Callable[[Path], None]]
    """At a step, what writes into its checkpoint what the weights need to be read alone, and what was drawn so far."""
    mirror: Mirror | None = None
    resume_from: checkpoints.Checkpoint | None = None
    """The checkpoint to go on from. None: begin."""
    evaluators: Sequence[Evaluator] = ()
    parts: Mapping[str, nn.Module] = dataclasses.field(default_factory=dict)
    """Modules whose buffers adapt during the run and belong to its state."""
    autocast: Callable[[], torch.autocast]
    """The precision of matrix products."""
    micro_batch_rows: int | FoundRows | None = None
    max_grad_norm: float | None = 1.0
    ema_decay: float | None = None
    """Of averages of the weights, which are then measured and handed on."""
    compile: bool = False
    after_update: Callable[[bool], Metrics] = nothing_adapts
    """What goes by an update, such as the balance of experts; told whether it was made. Its metrics."""
    rows_of: Callable[[int], Mapping[str, Sequence[int]]] = lambda step: {}
    """The numbers of the rows that all processes train on at a step (from 0), by source, as far as they are known."""
    scale_loss: bool = False
    """Scale the loss, as float16 needs it."""
    fixed_shapes: bool = False
    """Whether batches have a few shapes only: each is compiled for itself then, none for shapes in general."""
    progress: Callable[[str], None] = nothing_watches
    """Told what is begun, so that somebody notices when nothing is any more."""
    speed: Speed
    profile: Callable[[int], AbstractContextManager[None]] = lambda step: nullcontext()
    """Around each step, from 1: what records some of them."""
    health: HealthConfig = dataclasses.field(default_factory=HealthConfig)

    def __post_init__(self) -> None:
        self.guard = Guard(self.health, steps=self.steps)
        self.loss_scale = LossScale() if self.scale_loss else None
        keep = self.checkpoint
        self.monitor = Health(
            self.folder, self.health, best_metric=keep.best_metric, best_mode=keep.best_mode,
            is_main=self.layout.is_main,
        )  # fmt: skip
        self.averages = WeightAverages(self.model, self.ema_decay)
        self.saver = Saver(
            folder=self.folder, layout=self.layout, config=keep, steps=self.steps, state=self._state,
            extra=self.extra, say=self.tracker.say, phase=self.speed.phase,
            mirror=self.mirror,
        )  # fmt: skip

    def fit(self) -> int:
        """Train from the checkpoint, or from the start, to the last step; the step whose weights the model ends with.

        Raises UserError when no update can be made any more, and for a warning that `health.stop_on` names.
        """
        step = self._resume()
        if step == 0:
            self._record(0, {}, self._evaluate())
        with self.saver:
            self._train(step)
        step = self.saver.take_best() if self.checkpoint.final == "best" else self.steps
        self.averages.hand_over()
        return step

    def _train(self, step: int) -> None:
        """The steps from `step` on; each ends with a row of metrics and, where it is due, a checkpoint."""
        make_updates = self.updates()
        while step < self.steps:
            self.progress(f"step {step + 1}")
            self.speed.start_step()
            learning_rate = self.learning_rate(step)
            for group in self.optimizer.param_groups:
                is_trained = step >= group.get("first_step", 0)
                group["lr"] = learning_rate * group.get("lr_scale", 1.0) if is_trained else 0.0
            with self.profile(step + 1):
                with self.speed.phase(getattr(self.batches, "phase", "data")):
                    batch = self.batches(step).to(self.layout.device)
                self._show(step + 1, batch.samples)
                metrics, tokens, faults = make_updates(step, batch)
            step += 1
            self.averages.update()
            self.saver.before_counting(step)
            self.speed.end_step(tokens)
            self._remedy(step, faults)
            values = {}
            if step % self.tracking.every_steps == 0 or step == self.steps:
                values = self._values(metrics, step, faults) | {"train/learning_rate": learning_rate}
            measured = self._evaluate() if self._is_due(step, self.eval.every_steps) else {}
            self._record(step, values, measured)
            ill = self._ill()
            self.saver.after_step(step, measured, now=ill is not None or step == self.stop_after)
            self._stop_if(ill, step)

    def updates(self) -> Updates:
        """What makes the updates of a step."""
        loss_of: LossFunction = self.objective
        if self.compile:
            loss_of = torch.compile(self.objective, dynamic=False if self.fixed_shapes else None)
        return Updates(
            layout=self.layout, model=self.model, objective=self.objective, loss_of=loss_of, optimizer=self.optimizer,
            seed=self.seed, autocast=self.autocast, micro_batch_rows=self.micro_batch_rows,
            max_grad_norm=self.max_grad_norm, after_update=self.after_update, guard=self.guard,
            loss_scale=self.loss_scale, progress=self.progress, speed=self.speed,
        )  # fmt: skip

    def _show(self, step: int, samples: Samples | None) -> None:
        """Keep what people are shown of the step's batch, at some steps, in the order of its rows."""
        every = self.tracking.samples_every_steps or math.ceil(self.steps / SHOWN_TIMES)
        if samples is not None and (step == 1 or self._is_due(step, every)):
            of_all = gathered(samples, self.layout)
            self.tracker.log_samples(step, sorted(of_all, key=lambda sample: sample["row"]))

    def _values(self, metrics: Metrics, step: int, faults: Sequence[Fault]) -> dict[str, float]:
        """The step's metrics as numbers, over all processes, without those that a fault has made no number."""
        values = as_numbers(metrics, self.layout)
        if faults:
            values = {name: value for name, value in values.items() if math.isfinite(value)}
        scale = self.loss_scale.values() if self.loss_scale else {}
        return values | self.guard.values() | scale | self.batches.counts(step)

    def _remedy(self, step: int, faults: Sequence[Fault]) -> None:
        """Say what was wrong with a step's updates, and do what is to be done besides leaving them out."""
        for fault in faults:
            back_to = self._go_back(step) if fault.remedy == "rollback" else None
            self.tracker.log_fault(step, as_row(fault, back_to, self.rows_of(step - 1)))
            text = f"step {step}: {fault.text}; {in_words(fault.remedy, back_to)}"
            if fault.remedy in ("stop", "give_up"):
                raise UserError(text)
            self.tracker.say(f"{text} Its rows are in {FAULTS_FILE}: llmtrain show run={self.tracker.run} step={step}.")

    def _go_back(self, step: int) -> int | None:
        """Take the state of the newest checkpoint; its step, or None where there is none yet."""
        self.saver.wait()
        found = checkpoints.newest_good(self.folder / "checkpoints", self.layout, self.tracker.say)
        if found is not None:
            counted = {name: value.clone() for name, value in self.guard.state_dict().items()}
            self._load(found)
            if not self.guard.went_back(found.step, step, counted):
                raise UserError(f"step {step}: {found.folder} {TOO_OFTEN}")
        return found.step if found else None

    def _evaluate(self) -> dict[str, float]:
        """Every evaluator's numbers; the model is in evaluation mode meanwhile."""
        self.model.eval()
        values: dict[str, float] = {}
        with self.speed.phase("evaluation"), torch.no_grad(), self.autocast(), self.averages.in_place():
            for evaluator in self.evaluators:
                self.progress("evaluating")
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
        """Raises Stopped, or UserError, where the run is to end at a step that has been saved."""
        if self.stop_after is not None and step >= self.stop_after:
            raise Stopped(
                f"stopped after step {step} of {self.steps}, as train.stop_after says; its checkpoint is complete. "
                "The same command without it goes on."
            )
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
        self._load(found)
        self.tracker.start(found.step)
        self.monitor.start()
        self.tracker.say(f"resuming {self.folder} at step {found.step} of {self.steps}")
        self._stop_if(self._ill(), found.step)
        return found.step

    def _load(self, found: checkpoints.Checkpoint) -> None:
        """Fill the state; of the guard's what the checkpoint has: older runs, or other limits, have other tensors."""
        self.guard.reset()
        self.saver.resume(found, may_lack=f"state.{PART}.")

    def _state(self) -> dict[str, Tensor]:
        parts = {**self.parts, PART: self.guard, **({SCALE_PART: self.loss_scale} if self.loss_scale else {})}
        return checkpoints.training_state(self.model, self.optimizer, parts, self.averages.state())
