"""Which checkpoints are kept: the newest, the best, those that stay for ever."""

import contextlib
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from llmtrain.config.schema import CheckpointConfig
from llmtrain.engine import checkpoints
from llmtrain.engine.checkpoints import Checkpoint, Say
from llmtrain.engine.distributed import Layout, agree


def remove_litter(root: Path) -> None:
    """Remove what a kill, or a save that failed, has left behind."""
    for partial in root.glob(".step-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def prune(root: Path, *, newest: int, keep: CheckpointConfig) -> None:
    """Remove the checkpoints that `keep` does not name, and what a kill left behind.

    `newest` is the step just saved. What lies beyond it was passed over when the run went on from before it, so it
    must not count among the last.
    """
    remove_litter(root)
    saved = [checkpoint for folder in sorted(root.glob("step-*")) if (checkpoint := checkpoints.readable(folder))]
    kept = kept_steps(saved, newest, keep)
    for checkpoint in saved:
        if checkpoint.step not in kept:
            # first out of sight, so that a kill in the middle leaves no half checkpoint under its name
            doomed = root / f".{checkpoint.folder.name}.partial"
            with contextlib.suppress(OSError):  # what cannot be removed now is the next save's to remove
                os.replace(checkpoint.folder, doomed)
                shutil.rmtree(doomed)


def kept_steps(saved: Sequence[Checkpoint], newest: int, keep: CheckpointConfig) -> set[int]:
    """The steps of the checkpoints that `keep` names: the last, the best, and those that stay for ever."""
    until_now = sorted((each for each in saved if each.step <= newest), key=lambda each: each.step)
    kept = {checkpoint.step for checkpoint in until_now[-keep.keep_last :]}
    if keep.best_metric:
        best = _ranked(until_now, keep.best_metric, keep.best_mode)
        kept |= {checkpoint.step for checkpoint in best[: max(keep.keep_best, int(keep.final == "best"))]}
    return kept | _for_ever(until_now, keep)


def _for_ever(saved: list[Checkpoint], keep: CheckpointConfig) -> set[int]:
    """The steps that stay however many come after; those of each time span are told by what has stayed so far."""
    every, hours = keep.keep_every_steps, keep.keep_every_hours
    kept = {checkpoint.step for checkpoint in saved if every is not None and checkpoint.step % every == 0}
    last = -math.inf
    for checkpoint in saved:
        if hours is not None and checkpoint.time - last >= 3600 * hours:
            kept.add(checkpoint.step)
            last = checkpoint.time
    return kept


def best_good(root: Path, layout: Layout, say: Say, *, metric: str, mode: str, newest: int) -> Checkpoint | None:
    """The checkpoint best by `metric`, up to the step `newest`; of equal ones the latest.

    Those that are damaged are named and passed over. None where no checkpoint was saved with the metric.
    """
    found = None
    if layout.is_main:
        saved = [checkpoint for folder in sorted(root.glob("step-*")) if (checkpoint := checkpoints.readable(folder))]
        for checkpoint in _ranked([each for each in saved if each.step <= newest], metric, mode):
            fault = checkpoints.inspect(checkpoint.folder)
            if fault is None:
                found = checkpoint
                break
            say(f"checkpoint {checkpoint.folder} is passed over: {fault}")
    return agree(found, layout)


def _ranked(saved: list[Checkpoint], metric: str, mode: str) -> list[Checkpoint]:
    """Those that were measured, the best first; of equal ones the latest, which has learned most."""
    measured = [checkpoint for checkpoint in saved if math.isfinite(checkpoint.metrics.get(metric, math.nan))]
    sign = 1 if mode == "max" else -1
    return sorted(measured, key=lambda checkpoint: (sign * checkpoint.metrics[metric], checkpoint.step), reverse=True)
