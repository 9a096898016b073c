"""Checkpoints that can be trusted: sharded safetensors, written aside, digested, renamed when complete.

    checkpoints/step-00001000/
        state/*.safetensors    model.*, optimizer.*, state.* tensors, each process its own shards; no frozen weights
        manifest.json          step, metrics of the step, sha256 of every file
        (and what `write_extra` adds, such as the model's config and the tokenizer)

`torch.distributed.checkpoint` does the sharding and loads into any other layout; its safetensors storage means that
nothing is pickled in or out. A folder without a manifest that matches is not a checkpoint.
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from llmtrain.config.errors import UserError
from llmtrain.engine.distributed import Layout, agree, bare, barrier
from llmtrain.engine.row_orders import in_whole_order, put_back, row_orders

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    step: int
    metrics: dict[str, float]


def training_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, parts: dict[str, nn.Module]
) -> dict[str, Tensor]:
    """Every tensor that a run's state consists of, by name; the tensors are the live ones, so loading fills them.

    Frozen weights are no part of it: they are those that the run starts from, whenever it does.

    `parts` are modules whose buffers adapt during the run (a KL coefficient, say).
    """
    frozen = {name for name, each in bare(model).named_parameters() if not each.requires_grad}
    weights = bare(model).state_dict().items()
    state = {f"model.{name}": value for name, value in weights if name not in frozen}
    # asking for the optimizer's state also makes it create its moments, so that there is something to load into
    moments: Any = get_optimizer_state_dict(bare(model), optimizer)["state"]
    for name, values in moments.items():
        state |= {f"optimizer.{name}.{key}": value for key, value in values.items() if isinstance(value, Tensor)}
    for part, module in parts.items():
        state |= {f"state.{part}.{name}": value for name, value in module.state_dict().items()}
    # the storage wants at least one dimension; a view keeps the memory shared
    state = {name: value.detach().view(1) if value.dim() == 0 else value.detach() for name, value in state.items()}
    return state | in_whole_order(state, row_orders(bare(model)))


def save(
    root: Path, step: int, state: dict[str, Tensor], layout: Layout, *,
    metrics: dict[str, float], write_extra: Callable[[Path], None],
) -> Checkpoint:  # fmt: skip
    """Write `root/step-NNNNNNNN`; it has its name only once every file is complete and on disk.

    Raises UserError when it cannot be written (a full disk, say) or holds a value that is not finite; what was saved
    before stays as it is.
    """
    final, aside = root / f"step-{step:08d}", root / f".step-{step:08d}.partial"
    bad = [name for name, value in state.items() if name.startswith("model.") and not _finite(value)]
    if any(agree_any(bool(bad), layout)):
        raise UserError(f"step {step}: the weights are not finite any more ({', '.join(bad[:3])}); not saved.")
    try:
        if layout.is_main:
            shutil.rmtree(aside, ignore_errors=True)
            (aside / "state").mkdir(parents=True)
        barrier(layout)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of running alone, which is what was asked for
            writer = HuggingFaceStorageWriter(str(aside / "state"), save_distributed=True)
            dcp.save(dict(state), storage_writer=writer, no_dist=layout.world == 1)
        if layout.is_main:
            write_extra(aside)
            digests = {str(path.relative_to(aside)): _sha256(path) for path in _files(aside)}
            manifest = {"step": step, "metrics": metrics, "sha256": digests}
            (aside / "manifest.json").write_text(json.dumps(manifest, indent=1))
            _to_disk(aside)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(aside, final)
            _fsync(root)
    except (OSError, CheckpointException, SafetensorError, RuntimeError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(
            f"could not save step {step} to {final}: {_cause(error)}. Earlier checkpoints are untouched; "
            "make room (or set runs_dir= to another disk) and run the same command again."
        ) from error
    barrier(layout)
    return Checkpoint(final, step, metrics)


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
    manifest = json.loads((folder / "manifest.json").read_text())
    return Checkpoint(folder, int(manifest["step"]), dict(manifest["metrics"]))


def inspect(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, in words, or None."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        digests, step = dict(manifest["sha256"]), int(manifest["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its manifest cannot be read ({type(error).__name__})"
    if folder.name != f"step-{step:08d}":
        return f"its manifest says step {step}"
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if _sha256(path) != digest:
            return f"{name} does not match its digest"
    for name, value in _saved_tensors(folder / "state"):
        if name.startswith("model.") and not _finite(value):
            return f"{name} holds a value that is not finite"
    return None


def load(checkpoint: Checkpoint, state: dict[str, Tensor], layout: Layout) -> None:
    """Fill the tensors of `state` from the checkpoint, whatever layout it was saved from."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader = HuggingFaceStorageReader(str(checkpoint.folder / "state"))
        dcp.load(state, storage_reader=reader, no_dist=layout.world == 1)
    put_back(state)


def read_model(folder: Path) -> dict[str, Tensor]:
    """The whole weights in a checkpoint by name, put together from all shards."""
    reader = HuggingFaceStorageReader(str(folder / "state"))
    state = {
        name: torch.empty(item.size, dtype=item.properties.dtype)
        for name, item in reader.read_metadata().state_dict_metadata.items()
        if name.startswith("model.") and isinstance(item, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, storage_reader=reader, no_dist=True)
    return {name.removeprefix("model."): value for name, value in state.items()}


def prune(root: Path, *, newest: int, keep_last: int, keep_best: int, best_metric: str | None, best_mode: str) -> None:
    """Remove checkpoints beyond the last `keep_last` and the best `keep_best`, and what a kill left behind.

    `newest` is the step just saved. What lies beyond it was passed over when the run went on from before it, so it
    must not count among the last.
    """
    for partial in root.glob(".step-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)
    saved = [checkpoint for folder in sorted(root.glob("step-*")) if (checkpoint := _readable(folder))]
    until_now = [checkpoint for checkpoint in saved if checkpoint.step <= newest]
    keep = {checkpoint.step for checkpoint in until_now[-keep_last:]}
    if best_metric:
        keep |= {checkpoint.step for checkpoint in _ranked(until_now, best_metric, best_mode)[:keep_best]}
    for checkpoint in saved:
        if checkpoint.step not in keep:
            # first out of sight, so that a kill in the middle leaves no half checkpoint under its name
            doomed = root / f".{checkpoint.folder.name}.partial"
            os.replace(checkpoint.folder, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


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


def agree_any(value: bool, layout: Layout) -> list[bool]:
    """Every process's `value`."""
    if layout.world == 1:
        return [value]
    values: list[Any] = [None] * layout.world
    torch.distributed.all_gather_object(values, value)
    return values


def _saved_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                yield name, file.get_tensor(name)


def _finite(value: Tensor) -> bool:
    local = value.to_local() if hasattr(value, "to_local") else value
    return not local.is_floating_point() or bool(torch.isfinite(local).all())


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(folder: Path) -> None:
    for path in [*_files(folder), *(path for path in folder.rglob("*") if path.is_dir()), folder]:
        _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cause(error: BaseException) -> str:
    """The plain reason inside what torch wraps around it."""
    if isinstance(error, CheckpointException) and error.failures:
        return str(next(iter(error.failures.values()))[0])
    return str(error) or type(error).__name__
