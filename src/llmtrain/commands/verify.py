"""`llmtrain verify`: check that a checkpoint or a model is whole: digests, shapes, finiteness; or that a run can be
repeated (`retraining.py`).

The exit code says it too: 0 where it is fit to go on from, 1 where it is not.
"""

import collections
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError

from llmtrain.commands.retraining import verify_run
from llmtrain.config.errors import ConfigError, UserError
from llmtrain.config.schema import VerifyConfig
from llmtrain.engine import checkpoints
from llmtrain.engine.snapshots import all_finite
from llmtrain.models.formats import load_language_model, load_scalar_model, read_config
from llmtrain.stages import starts


class Line(NamedTuple):
    """One line of the table."""

    what: str
    found: str
    fault: str | None = None


def run(config: VerifyConfig) -> None:
    """Print what was checked. Raises UserError where something is wrong."""
    if config.run is not None:
        verify_run(config.run, config.runs_dir, config.step, config.processes)
        return
    folder = Path(config.checkpoint) if config.checkpoint else newest(config.runs_dir)
    if (folder / "checkpoints").is_dir():
        folder = max((folder / "checkpoints").glob("step-*"), default=folder)
    print(folder)
    failed = []
    for line in verify_folder(folder):
        verdict = f"FAILED: {' '.join(line.fault.split())}" if line.fault else "pass"
        print(f"{line.what:<10}{line.found:<58}{verdict}", flush=True)
        failed += [line.what] * (line.fault is not None)
    if failed:
        raise UserError(f"{folder} is damaged ({', '.join(failed)}). Go on from another one, or train it again.")


def newest(runs_dir: str) -> Path:
    """The checkpoint that was saved last. Raises ConfigError where there is none."""
    found = list(Path(runs_dir).glob("**/checkpoints/step-*"))
    if not found:
        raise ConfigError(f"checkpoint: no checkpoint in {runs_dir}. Name a folder: checkpoint=FOLDER.")
    last = max(found, key=lambda folder: folder.stat().st_mtime)
    print(f"checkpoint: taking the newest, {last}", file=sys.stderr)
    return last


def verify_folder(folder: Path) -> Iterator[Line]:
    """The lines of the table; each check is made, whatever the one before has found."""
    if (folder / "manifest.json").is_file() or folder.name.startswith("step-"):
        yield files(folder)
    try:
        yield from tensors(folder)
    except (OSError, SafetensorError) as error:
        yield Line("tensors", "", f"cannot be read: {error}")
    yield shapes(folder)


def files(folder: Path) -> Line:
    """Whether every file is there and matches its digest."""
    there = [path for path in folder.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in there) / 1e6
    return Line("files", f"{len(there)}, {size:,.1f} MB, by their digests", checkpoints.damaged_file(folder))


def tensors(folder: Path) -> Iterator[Line]:
    """What kinds of tensors there are, of which types, and whether their values are finite."""
    parts: dict[str, int] = collections.Counter()
    values: dict[str, int] = collections.Counter()
    types: dict[str, set[str]] = collections.defaultdict(set)
    wrong: dict[str, list[str]] = collections.defaultdict(list)
    within = folder / "state" if (folder / "state").is_dir() else folder
    for name, tensor in checkpoints.saved_tensors(within):
        group = checkpoints.GROUPS.get(name.partition(".")[0], "weights") if within != folder else "weights"
        parts[group] += 1
        values[group] += tensor.numel()
        types[group].add(str(tensor.dtype).removeprefix("torch."))
        if not all_finite([tensor]):
            wrong[group].append(name)
    for group in parts:
        found = f"{parts[group]} tensors, {values[group]:,} values, {', '.join(sorted(types[group]))}"
        yield Line(group, found, f"not finite: {', '.join(wrong[group][:3])}" if wrong[group] else None)
    if not parts:
        yield Line("tensors", "none", "there are no safetensors")


def shapes(folder: Path) -> Line:
    """Whether the weights are those of the architecture in config.json."""
    found = ""
    try:
        config, vocab_size = read_config(folder)
        found = f"{config.architecture}, {config.num_layers} x {config.hidden_size}, vocabulary {vocab_size:,}"
        state = starts.checkpoint_weights(folder) if (folder / "state").is_dir() else None
        names = state or dict(checkpoints.saved_tensors(folder))
        load = load_scalar_model if "score.weight" in names else load_language_model
        load(folder, state=state)
    except Exception as error:  # whatever a damaged file makes of it is a result
        return Line("shapes", found, str(error))
    return Line("shapes", found)
