"""Checkpoints that can be trusted: sharded safetensors, written aside, digested, renamed when complete.

    checkpoints/step-00001000/
        state/*.safetensors    model.*, average.*, optimizer.*, state.* tensors, of each process its own; nothing frozen
        manifest.json          step, time, metrics of the step, sha256 of every file
        (and what `write_extra` adds, such as the model's config and the tokenizer)

Nothing is pickled in or out. `torch.distributed.checkpoint` reads them into any other layout. A folder without a
manifest that matches is not a checkpoint.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from llmtrain.config.errors import UserError
from llmtrain.config.schema import CheckpointConfig
from llmtrain.engine import snapshots
from llmtrain.engine.distributed import Layout, agree, bare
from llmtrain.engine.row_files import NO_ROOM
from llmtrain.engine.snapshots import Piece, all_finite

Say = Callable[[str], None]
# What the tensors that make up a model are called.
WEIGHTS = ("model.", "average.")
# What the tensors of a checkpoint are, by the first part of their name.
GROUPS = {"model": "weights", "optimizer": "moments", "average": "averages", "state": "state"}
# How often the main process looks whether the others have written their parts.
POLL_SECONDS = 0.02


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    step: int
    metrics: dict[str, float]
    time: float = dataclasses.field(default=0.0, compare=False)
    """When it was saved, in seconds since the epoch."""


def training_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, parts: dict[str, nn.Module],
    averages: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Every tensor that a run's state consists of, by name; the tensors are the live ones, so loading fills them.

    Frozen weights are no part of it: they are those that the run starts from, whenever it does.

    `parts` are modules whose buffers adapt during the run (a KL coefficient, say); `averages` those of weights.
    """
    frozen = {name for name, each in bare(model).named_parameters() if not each.requires_grad}
    weights = bare(model).state_dict().items()
    state = {f"model.{name}": value for name, value in weights if name not in frozen}
    # asking for the optimizer's state also makes it create its moments, so that there is something to load into
    moments: Any = get_optimizer_state_dict(bare(model), optimizer)["state"]
    for name, values in moments.items():
        state |= {f"optimizer.{name}.{key}": value for key, value in values.items() if isinstance(value, Tensor)}
    state |= {f"average.{name}": value for name, value in (averages or {}).items()}
    for part, module in parts.items():
        state |= {f"state.{part}.{name}": value for name, value in module.state_dict().items()}
    # the storage wants at least one dimension; a view keeps the memory shared
    return {name: value.detach().view(1) if value.dim() == 0 else value.detach() for name, value in state.items()}


class NotSaved(UserError):
    """A checkpoint could not be written; `no_room`: for want of room on the disk, which may be there later."""

    def __init__(self, what: str, no_room: bool = False) -> None:
        super().__init__(
            f"{what}. Earlier checkpoints are untouched; make room (or set runs_dir= to another disk) and run the same "
            "command again."
        )
        self.what, self.no_room = what, no_room

    def __reduce__(self) -> tuple[Any, ...]:
        return NotSaved, (self.what, self.no_room)


@contextlib.contextmanager
def writing(root: Path, step: int) -> Iterator[None]:
    """Within, what goes wrong with the disk is told as NotSaved."""
    try:
        yield
    # those of libraries in Rust have no number: what they say ends in (os error 28)
    except (OSError, SafetensorError, RuntimeError) as error:
        no_room = getattr(error, "errno", None) in NO_ROOM or any(
            f"(os error {code})" in str(error) for code in NO_ROOM
        )
        said = str(error) or type(error).__name__
        raise NotSaved(f"could not save step {step} to {root / name_of(step)}: {said}", no_room) from error


def name_of(step: int) -> str:
    """The name of the folder of a step's checkpoint."""
    return f"step-{step:08d}"


def aside(root: Path, step: int) -> Path:
    """The folder that a checkpoint is written in, made where it is not there; what else belongs to it is put there."""
    folder = root / f".{name_of(step)}.partial"
    (folder / "state").mkdir(parents=True, exist_ok=True)
    return folder


def save(
    root: Path, step: int, pieces: list[Piece], layout: Layout, *, metrics: dict[str, float],
    give_up: threading.Event | None = None,
) -> Checkpoint:  # fmt: skip
    """Write this process's pieces; the main process then completes `root/step-NNNNNNNN` when all have written theirs.

    It has its name only once every file is complete and on disk. Nothing is sent between processes: each leaves the
    digest of its file beside it, so this may run in a thread while training goes on. `give_up` ends the waiting.
    Raises NotSaved when it cannot be written; what was saved before stays as it is.
    """
    final = root / name_of(step)
    with writing(root, step):
        folder = aside(root, step)
        shard = f"state/shard-{layout.rank + 1:05d}-of-{layout.world:05d}.safetensors"
        _write_aside(_receipt(folder, layout.rank), json.dumps({shard: snapshots.write(folder / shard, pieces)}))
        if layout.is_main:
            digests = _shards_of_all(folder, layout, give_up or threading.Event())
            others = [path for path in _files(folder) if str(path.relative_to(folder)) not in digests]
            digests |= {str(path.relative_to(folder)): _sha256(path) for path in others}
            manifest = {"step": step, "time": time.time(), "metrics": metrics, "sha256": dict(sorted(digests.items()))}
            (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
            for path in [*others, folder / "manifest.json", folder / "state", folder]:
                _fsync(path)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(folder, final)
            _fsync(root)
    return Checkpoint(final, step, metrics)


def _shards_of_all(folder: Path, layout: Layout, give_up: threading.Event) -> dict[str, str]:
    """The files of all processes with their digests, when all are written."""
    digests: dict[str, str] = {}
    for rank in range(layout.world):
        receipt = _receipt(folder, rank)
        while not receipt.is_file():
            if give_up.wait(POLL_SECONDS):
                raise OSError(f"process {rank} has not written its part")
        digests |= json.loads(receipt.read_text())
        receipt.unlink()
    return digests


def _receipt(folder: Path, rank: int) -> Path:
    """Where a process says that its part is written."""
    return folder / f".written-{rank}.json"


def _write_aside(path: Path, text: str) -> None:
    before = path.with_name(f"{path.name}.partial")
    before.write_text(text)
    os.replace(before, path)


def newest_good(root: Path, layout: Layout, say: Say) -> Checkpoint | None:
    """The newest checkpoint whose files match their digests and whose weights are finite.

    Others are named and passed over.
    """
    found = None
    if layout.is_main:
        for folder in sorted(root.glob("step-*"), reverse=True):
            fault = inspect(folder)
            if fault is None:
                found = read(folder)
                break
            say(f"checkpoint {folder} is passed over: {fault}")
    return agree(found, layout)


def read(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, by its manifest."""
    return from_manifest(folder, json.loads((folder / "manifest.json").read_text()))


def from_manifest(folder: Path, manifest: Mapping[str, Any]) -> Checkpoint:
    """What a manifest says. Raises KeyError, TypeError or ValueError for one that is damaged."""
    return Checkpoint(folder, int(manifest["step"]), dict(manifest["metrics"]), float(manifest.get("time", 0.0)))


def inspect(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, in words, or None."""
    if fault := damaged_file(folder):
        return fault
    for name, value in saved_tensors(folder / "state"):
        if name.startswith(WEIGHTS) and not all_finite([value]):
            return f"{name} holds a value that is not finite"
    return None


def damaged_file(folder: Path) -> str | None:
    """Which file of a checkpoint is missing or does not match its digest, in words, or None."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        digests, step = dict(manifest["sha256"]), int(manifest["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its manifest cannot be read ({type(error).__name__})"
    if folder.name != name_of(step):
        return f"its manifest says step {step}"
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if _sha256(path) != digest:
            return f"{name} does not match its digest"
    return None


def load(checkpoint: Checkpoint, state: dict[str, Tensor], layout: Layout) -> None:
    """Fill the tensors of `state` from the checkpoint, whatever layout it was saved from.

    Raises UserError where it does not hold one of them, or one of another shape.
    """
    reader = HuggingFaceStorageReader(str(checkpoint.folder / "state"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of running alone, which is what was asked for
            dcp.load(state, storage_reader=reader, no_dist=layout.world == 1)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0] if error.failures else error
        raise UserError(
            f"{checkpoint.folder} does not fit this run: {cause} A run can begin with its weights alone, with fresh "
            f"moments of the optimizer: model.init_from={checkpoint.folder} and another run= name."
        ) from error


def sizes(checkpoint: Checkpoint) -> dict[str, torch.Size]:
    """The sizes of a checkpoint's tensors, by name."""
    known = HuggingFaceStorageReader(str(checkpoint.folder / "state")).read_metadata().state_dict_metadata
    return {name: item.size for name, item in known.items() if isinstance(item, TensorStorageMetadata)}


def read_model(folder: Path) -> dict[str, Tensor]:
    """The whole weights in a checkpoint by name, put together from all shards; averaged, where there are averages."""
    state = read_state(folder, WEIGHTS)
    of_last_step, averaged = (
        {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        for prefix in WEIGHTS
    )
    return of_last_step | averaged


def read_state(folder: Path, prefixes: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
    """The whole tensors in a checkpoint whose names have one of the prefixes, put together from all shards."""
    reader = HuggingFaceStorageReader(str(folder / "state"))
    state = {
        name: torch.empty(item.size, dtype=item.properties.dtype)
        for name, item in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(prefixes) and isinstance(item, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, storage_reader=reader, no_dist=True)
    return state


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
    saved = [checkpoint for folder in sorted(root.glob("step-*")) if (checkpoint := _readable(folder))]
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
    """The checkpoint best by `metric`, up to the step `newest`; of equal ones the earliest.

    Those that are damaged are named and passed over. None where no checkpoint was saved with the metric.
    """
    found = None
    if layout.is_main:
        saved = [checkpoint for folder in sorted(root.glob("step-*")) if (checkpoint := _readable(folder))]
        for checkpoint in _ranked([each for each in saved if each.step <= newest], metric, mode):
            fault = inspect(checkpoint.folder)
            if fault is None:
                found = checkpoint
                break
            say(f"checkpoint {checkpoint.folder} is passed over: {fault}")
    return agree(found, layout)


def _ranked(saved: list[Checkpoint], metric: str, mode: str) -> list[Checkpoint]:
    """Those that were measured, the best first; of equal ones the earliest."""
    measured = [checkpoint for checkpoint in saved if math.isfinite(checkpoint.metrics.get(metric, math.nan))]
    return sorted(measured, key=lambda checkpoint: checkpoint.metrics[metric], reverse=mode == "max")


def _readable(folder: Path) -> Checkpoint | None:
    """The checkpoint in a folder; None where its manifest is damaged."""
    try:
        return read(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def saved_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors in the safetensors files of a folder by name; of a tensor in several pieces, each of them."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                yield name, file.get_tensor(name)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
