"""Checkpoints that can be trusted: sharded safetensors, written aside, digested, renamed when complete.

    checkpoints/step-00001000/
        state/*.safetensors    model.*, average.*, optimizer.*, state.* tensors, of each process its own; nothing frozen
        manifest.json          step, time, metrics of the step, sha256 of every file
        (and what the saver's `extra` adds, such as the model's config and the tokenizer)

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
from collections.abc import Callable, Iterator, Mapping
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
from llmtrain.config.json_files import read_object
from llmtrain.engine import snapshots
from llmtrain.engine.distributed import Layout, agree, bare
from llmtrain.engine.row_files import NO_ROOM
from llmtrain.engine.row_orders import in_whole_order, put_back, row_orders
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
    state = {name: value.detach().view(1) if value.dim() == 0 else value.detach() for name, value in state.items()}
    return state | in_whole_order(state, row_orders(bare(model)))


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
    return from_manifest(folder, read_object(folder / "manifest.json"))


def readable(folder: Path) -> Checkpoint | None:
    """`read`, but None where there is no manifest, or a damaged one."""
    try:
        return read(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def from_manifest(folder: Path, manifest: Mapping[str, Any]) -> Checkpoint:
    """What a manifest says. Raises KeyError, TypeError or ValueError for one that is damaged."""
    metrics = {name: float(value) for name, value in dict(manifest["metrics"]).items()}
    return Checkpoint(folder, int(manifest["step"]), metrics, float(manifest.get("time", 0.0)))


def inspect(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, in words, or None."""
    if fault := damaged_file(folder):
        return fault
    try:
        for name, value in saved_tensors(folder / "state"):
            if name.startswith(WEIGHTS) and not all_finite([value]):
                return f"{name} holds a value that is not finite"
    except (SafetensorError, RuntimeError) as error:  # a header that is none, a type that is no number's
        return f"its shards cannot be read: {error}"
    return None


def damaged_file(folder: Path) -> str | None:
    """Which file of a checkpoint is missing or does not match its digest, in words, or None."""
    try:
        step, digests = read(folder).step, dict(read_object(folder / "manifest.json")["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        return f"its manifest cannot be read ({type(error).__name__})"
    if folder.name != name_of(step):
        return f"its manifest says step {step}"
    unknown = [path.name for path in (folder / "state").glob("*.safetensors") if f"state/{path.name}" not in digests]
    if unknown:
        return f"state/{unknown[0]} is not in its manifest"
    for name, digest in digests.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            return f"its manifest names {name!r}, which is outside"
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of running alone, which is what was asked for
        with _readable_shards(checkpoint.folder):
            _whole_tensors(reader)
        try:
            dcp.load(state, storage_reader=reader, no_dist=layout.world == 1)
        except CheckpointException as error:
            raise UserError(
                f"{checkpoint.folder} does not fit this run: {_cause(error)} A run can begin with its weights alone, "
                f"with fresh moments of the optimizer: model.init_from={checkpoint.folder} and another run= name."
            ) from error
    put_back(state)


def sizes(checkpoint: Checkpoint) -> dict[str, torch.Size]:
    """The sizes of a checkpoint's tensors, by name."""
    known = HuggingFaceStorageReader(str(checkpoint.folder / "state")).read_metadata().state_dict_metadata
    return {name: item.size for name, item in known.items() if isinstance(item, TensorStorageMetadata)}


def read_model(folder: Path) -> dict[str, Tensor]:
    """The whole weights in a checkpoint by name, put together from all shards; averaged, where there are averages.

    Raises UserError for shards that do not make them up.
    """
    state = read_state(folder, WEIGHTS)
    of_last_step, averaged = (
        {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        for prefix in WEIGHTS
    )
    return of_last_step | averaged


def read_state(folder: Path, prefixes: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
    """The whole tensors in a checkpoint whose names have one of the prefixes, put together from all shards.

    Raises UserError for shards that do not make them up.
    """
    reader = HuggingFaceStorageReader(str(folder / "state"))
    with warnings.catch_warnings(), _readable_shards(folder):
        warnings.simplefilter("ignore")
        state = {
            name: torch.empty(item.size, dtype=item.properties.dtype)
            for name, item in _whole_tensors(reader).items()
            if name.startswith(prefixes)
        }
        dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def _whole_tensors(reader: HuggingFaceStorageReader) -> dict[str, TensorStorageMetadata]:
    """The tensors in a checkpoint. Raises ValueError for one of whose elements some are in no shard, or in several."""
    found = {
        name: item
        for name, item in reader.read_metadata().state_dict_metadata.items()
        if isinstance(item, TensorStorageMetadata)
    }
    for name, item in found.items():
        in_shards = sum(math.prod(chunk.sizes) for chunk in item.chunks)
        if in_shards != math.prod(item.size) or any(place < 0 for chunk in item.chunks for place in chunk.offsets):
            raise ValueError(f"{name} is of shape {list(item.size)}, and of that {in_shards:,} elements are there")
    return found


@contextlib.contextmanager
def _readable_shards(folder: Path) -> Iterator[None]:
    """Within, what is wrong with a checkpoint's shards becomes a UserError; what they hold may be anybody's."""
    faults = (
        CheckpointException, SafetensorError, OSError, RuntimeError, ValueError, LookupError, TypeError, AssertionError,
    )  # fmt: skip
    try:
        yield
    except faults as error:
        raise UserError(f"checkpoint {folder}: its shards do not fit together: {_cause(error)}") from error


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


def _cause(error: BaseException) -> str:
    """The plain reason inside what torch wraps around it."""
    if isinstance(error, CheckpointException) and error.failures:
        return str(next(iter(error.failures.values()))[0])
    return str(error) or type(error).__name__
