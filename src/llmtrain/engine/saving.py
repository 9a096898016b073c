"""When a run is saved, what is kept, and what it goes on from or ends with.

The training loop calls a `Saver` in one place; how a checkpoint is written and read is in `checkpoints.py`.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from llmtrain.config.errors import UserError
from llmtrain.config.schema import CheckpointConfig
from llmtrain.engine import checkpoints
from llmtrain.engine.checkpoints import Checkpoint
from llmtrain.engine.distributed import Layout, agree


@dataclasses.dataclass(kw_only=True)
class Saver:
    """The checkpoints of one run; every process calls it at the same steps."""

    folder: Path
    """The run's."""
    layout: Layout
    config: CheckpointConfig
    steps: int
    state: Callable[[], dict[str, Tensor]]
    """The live tensors of the run's state, by name."""
    write_extra: Callable[[Path, int], None]
    """Adds to the checkpoint of a step what its weights need to be read alone, and what was drawn from the data."""
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        self.root = self.folder / "checkpoints"
        self._last = time.monotonic()

    def resume(self, found: Checkpoint) -> None:
        """Fill the state from a checkpoint."""
        checkpoints.load(found, self.state(), self.layout)

    def start(self) -> None:
        """Training begins now; minutes count from here."""
        self._last = time.monotonic()

    def after_step(self, step: int, measured: dict[str, float], *, now: bool = False) -> None:
        """Save the state after `step` steps where it is due, or `now`; `measured` is what ranks checkpoints."""
        if now or self._is_due(step) or self._minutes_passed():
            self._save(step, measured)
            self._last = time.monotonic()

    def take_best(self) -> int:
        """Fill the model from the checkpoint that is best by `checkpoint.best_metric`; its step."""
        metric, mode = self.config.best_metric, self.config.best_mode
        assert metric is not None
        best = checkpoints.best_good(self.root, self.layout, self.say, metric=metric, mode=mode, newest=self.steps)
        if best is None:
            raise UserError(
                f"checkpoint.final=best: no checkpoint in {self.root} was saved with {metric}. "
                "Set checkpoint.final=last to finish with the last weights."
            )
        weights = {name: value for name, value in self.state().items() if name.startswith("model.")}
        checkpoints.load(best, weights, self.layout)
        self.say(f"best by {metric}: step {best.step} ({best.metrics[metric]:.4g})")
        return best.step

    def _is_due(self, step: int) -> bool:
        every = self.config.every_steps
        return step == self.steps or (every is not None and step % every == 0)

    def _minutes_passed(self) -> bool:
        minutes = self.config.every_minutes
        return minutes is not None and agree(time.monotonic() - self._last >= 60 * minutes, self.layout)

    def _save(self, step: int, measured: dict[str, float]) -> None:
        checkpoints.save(
            self.root, step, self.state(), self.layout, metrics=measured,
            write_extra=lambda folder: self.write_extra(folder, step),
        )  # fmt: skip
        if self.layout.is_main:
            keep = self.config
            checkpoints.prune(
                self.root,
                newest=step,
                keep_last=keep.keep_last,
                keep_best=max(keep.keep_best, int(keep.final == "best")),
                best_metric=keep.best_metric,
                best_mode=keep.best_mode,
            )
