"""When a run is saved, what is kept, and what it goes on from or ends with.

The training loop calls a `Saver` in one place. Training goes on while files are written: the state is copied at its
step, and a thread writes the copy. How a checkpoint is written and read is in `checkpoints.py`, what it consists of in
`snapshots.py`.
"""

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.config.errors import Preempted, UserError
from llmtrain.config.schema import CheckpointConfig
from llmtrain.engine import checkpoints, retention, tracking
from llmtrain.engine.checkpoints import Checkpoint, NotSaved
from llmtrain.engine.distributed import Layout, group_beside, of_every
from llmtrain.engine.mirror import Mirror
from llmtrain.engine.signals import Signals
from llmtrain.engine.snapshots import Snapshots, all_finite

# How long a process that fails lets the others write their parts of a checkpoint to their end.
LEAVE_SECONDS = 20.0
# The writer is to use what training leaves of the processors.
NICENESS = 10


@dataclasses.dataclass(kw_only=True)
class Saver:
    """The checkpoints of one run; every process calls it at the same steps.

    A context: signals are heeded within, and a checkpoint that is being written is complete at its end.
    """

    folder: Path
    """The run's."""
    layout: Layout
    config: CheckpointConfig
    steps: int
    state: Callable[[], dict[str, Tensor]]
    """The live tensors of the run's state, by name."""
    extra: Callable[[int], Callable[[Path], None]]
    """At a step, what will write into its checkpoint's folder all but tensors: what was drawn from the data until then,
    and what the weights need to be read alone. That is called in a thread, when training has gone on."""
    say: Callable[[str], None]
    phase: Callable[[str], contextlib.AbstractContextManager[None]] = lambda name: contextlib.nullcontext()
    """Within, time is that of a phase."""
    mirror: Mirror | None = None
    """Of the main process: where checkpoints are kept a second time."""

    def __post_init__(self) -> None:
        self.root = self.folder / "checkpoints"
        self.failed_saves = 0
        """How many in a row could not be written for want of room."""
        self._snapshots = Snapshots(self.layout, aside=self.config.asynchronous)
        self._signals = Signals()
        self._writing: Writing | None = None
        self._complete = 0
        """The step of the newest checkpoint that is known to be complete."""
        self._last = time.monotonic()
        self._group = group_beside() if self.layout.world > 1 else None

    def __enter__(self) -> Self:
        """Training begins now; minutes count from here."""
        if self.layout.is_main:
            retention.remove_litter(self.root)
        self._signals.__enter__()
        self._last = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """However training ends, what is being written is written to its end."""
        self._signals.__exit__()
        if self._writing is not None:
            self._writing.leave(0.0 if self._signals.stop else LEAVE_SECONDS)
        if kind is None or issubclass(kind, Preempted):
            if self.mirror is not None:
                self.mirror.finish()
                self._say_of_mirror()
            self._anywhere(False)  # the first process to leave may take the others with it

    def resume(self, found: Checkpoint, *, may_lack: str) -> None:
        """Fill the state from a checkpoint: tensors whose name begins with `may_lack` as far as it has the like."""
        saved, state = checkpoints.sizes(found), self.state()
        there = {name: each for name, each in state.items() if saved.get(name) == each.shape}
        others = {name: each for name, each in state.items() if not name.startswith(may_lack)}
        checkpoints.load(found, there | others, self.layout)
        self._complete = found.step

    def before_counting(self, step: int) -> None:
        """Before the run counts `step` steps: wait where a kill would cost more of them than it may.

        One step is computed beside the file in any case. Raises UserError as `wait` does.
        """
        most = self.config.max_lost_steps or self.config.every_steps
        if most is not None and self._writing is not None and step - self._complete > most:
            with self.phase("saving"):
                self.wait()

    def after_step(self, step: int, measured: dict[str, float], *, now: bool = False) -> None:
        """Save the state after `step` steps where it is due; `measured` is what ranks checkpoints.

        `now`: save in any case, and come back when the checkpoint is complete. Raises UserError where the checkpoint
        before could not be written, unless there is no room: training goes on then, and the next one may be written.
        Raises Preempted, when the checkpoint is complete, after SIGTERM.
        """
        stop, asked, minutes, failed = self._anywhere(
            self._signals.stop, self._signals.save, self._minutes_passed(time.monotonic()), self._has_failed()
        )
        if failed:
            self.wait()
        if now or stop or asked or minutes or self._is_due(step):
            self._signals.save = False
            with self.phase("saving"):
                self._save(step, measured)
                if now or stop or step == self.steps or not self.config.asynchronous:
                    self.wait(goes_on=step < self.steps and not now and not stop)
            self._last = time.monotonic()
        if stop and step < self.steps:
            raise Preempted(
                f"stopped by SIGTERM after step {step} of {self.steps}; its checkpoint is complete. The same command "
                "goes on from it."
            )

    def wait(self, *, goes_on: bool = True) -> None:
        """Wait until no checkpoint is being written; all processes call this together.

        Raises UserError where it could not be written. Where that is for want of room and training `goes_on`, it is
        said and counted instead.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        is_main = self.layout.is_main
        if not is_main:
            writing.join()
        # the main process waits for the parts of the others: it has to know that one will not come
        if any(self._anywhere(not is_main and writing.error is not None)):
            writing.give_up.set()
        writing.join()
        if writing.error is not None:
            if is_main:
                retention.remove_litter(self.root)
            if not isinstance(writing.error, NotSaved):
                raise writing.error
        errors = [error for error in of_every(writing.error, self.layout) if error]
        if not errors:
            self.failed_saves, self._complete = 0, writing.step
            return
        # a main process that has given up tells of another's failure
        error = errors[-1]
        self.failed_saves += 1
        if not (error.no_room and goes_on):
            raise error
        self.say(
            f"warning: {error.what}. Earlier checkpoints are untouched and training goes on: the next save that is due "
            "tries again. Make room."
        )

    def values(self) -> dict[str, float]:
        """For the next row of metrics: how many saves in a row have failed, if any."""
        return {"perf/failed_saves": float(self.failed_saves)} if self.failed_saves else {}

    def take_best(self) -> int:
        """Fill the model from the checkpoint that is best by `checkpoint.best_metric`; its step."""
        metric, mode = self.config.best_metric, self.config.best_mode
        assert metric is not None
        best = retention.best_good(self.root, self.layout, self.say, metric=metric, mode=mode, newest=self.steps)
        if best is None:
            raise UserError(
                f"checkpoint.final=best: no checkpoint in {self.root} was saved with {metric}. "
                "Set checkpoint.final=last to finish with the last weights."
            )
        weights = {name: value for name, value in self.state().items() if name.startswith(checkpoints.WEIGHTS)}
        checkpoints.load(best, weights, self.layout)
        why = ", the same at every measurement: it tells none apart, so the latest is taken" * self._is_flat(metric)
        self.say(f"best by {metric}: step {best.step} ({best.metrics[metric]:.4g}){why}")
        return best.step

    def _is_flat(self, metric: str) -> bool:
        """Whether a metric was the same at all measurements after the start; checkpoints that are gone count too."""
        rows = tracking.read_metrics(self.folder)
        found = [row[metric] for row in rows if metric in row and 0 < row["step"] <= self.steps]
        return len(found) > 1 and len(set(found)) == 1

    def _say_of_mirror(self) -> None:
        if self.mirror is not None and self.mirror.fault:
            self.say(
                f"warning: checkpoint.mirror={self.mirror.url}: {self.mirror.fault}. What is missing there is pushed "
                "with the next checkpoint."
            )
            self.mirror.fault = None

    def _is_due(self, step: int) -> bool:
        every = self.config.every_steps
        return step == self.steps or (every is not None and step % every == 0)

    def _minutes_passed(self, now: float) -> bool:
        minutes = self.config.every_minutes
        return minutes is not None and now - self._last >= 60 * minutes

    def _has_failed(self) -> bool:
        return self._writing is not None and self._writing.error is not None

    def _anywhere(self, *told: bool) -> list[bool]:
        """What any process tells, on every one of them."""
        if self._group is None:
            return list(told)
        flags = torch.tensor(told, dtype=torch.uint8)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group)
        return [bool(flag) for flag in flags.tolist()]

    def _save(self, step: int, measured: dict[str, float]) -> None:
        """Copy the state, and begin to write it."""
        self.wait()
        state = self.state()
        weights = {name: value for name, value in state.items() if name.startswith(checkpoints.WEIGHTS)}
        bad = [] if all_finite(list(weights.values())) else [n for n, each in weights.items() if not all_finite([each])]
        if any(self._anywhere(bool(bad))):
            raise UserError(f"step {step}: the weights are not finite any more ({', '.join(bad[:3])}); not saved.")
        self._say_of_mirror()
        pieces = self._snapshots.take(state)
        write_extra = self.extra(step) if self.layout.is_main else None

        def write(give_up: threading.Event) -> None:
            if write_extra is not None:
                with checkpoints.writing(self.root, step):
                    write_extra(checkpoints.aside(self.root, step))
            checkpoints.save(self.root, step, pieces, self.layout, metrics=measured, give_up=give_up)
            if self.layout.is_main:
                retention.prune(self.root, newest=step, keep=self.config)
            if self.mirror is not None:
                self.mirror.push_later(step)

        self._writing = Writing(step, write)
        self._writing.start()


class Writing(threading.Thread):
    """A checkpoint that is being written."""

    def __init__(self, step: int, write: Callable[[threading.Event], None]) -> None:
        super().__init__(name="checkpoint")
        self.step, self.write = step, write
        self.give_up = threading.Event()
        """Set: do not wait for other processes any longer."""
        self.error: Exception | None = None

    def run(self) -> None:
        """Called by `start`."""
        with contextlib.suppress(OSError, AttributeError):  # Linux gives each thread a priority
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        try:
            self.write(self.give_up)
        except Exception as error:
            self.error = error

    def leave(self, seconds: float) -> None:
        """Let it come to its end; after `seconds` it does not wait for other processes any more."""
        self.join(seconds)
        self.give_up.set()
        self.join()
