"""`llmtrain verify run=NAME step=N`: the steps before a checkpoint trained once more, and the bits compared.

The run's own folder is only read. Its stage runs in a folder of its own that looks as the run's did after the
checkpoint before (same config, same cache, that checkpoint), stops after the step, and what it has saved is compared.
"""

import contextlib
import dataclasses
import importlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from llmtrain.commands.rows import config_of, run_folder
from llmtrain.commands.seen import as_if_here
from llmtrain.config.compose import to_yaml
from llmtrain.config.errors import ConfigError, Stopped, UserError
from llmtrain.config.folders import CACHE
from llmtrain.config.schema import StageConfig, TrackerConfig
from llmtrain.engine import checkpoints, launching
from llmtrain.engine.checkpoints import GROUPS, Checkpoint
from llmtrain.stages import handover

# What a run goes on from besides its checkpoint, and what it would otherwise make anew.
NEEDED = ("tokenizer", "micro_batches.json", "metrics.jsonl")


def verify_run(run: str, runs_dir: str, step: int | None, processes: int | None) -> None:
    """Print what was compared. Raises UserError where training again gives other bits."""
    if launching.launched_by_others():
        raise ConfigError("run: start it alone; it starts as many processes as the run had (processes=N)")
    folder = run_folder(run, runs_dir)
    saved = _saved(folder)
    if not saved or (step is not None and step not in saved):
        known = ", ".join(map(str, sorted(saved))) or "none"
        raise ConfigError(f"step: {folder} has no checkpoint of step {step}; it has {known}")
    step = step or max(saved)
    before = max((each for each in saved if each < step), default=0)
    for each in (saved[step], *([saved[before]] if before else [])):
        if fault := checkpoints.inspect(each.folder):
            raise UserError(f"checkpoint {each.folder}: {fault}. Name another step.")
    print(f"{folder}: training steps {before + 1} to {step} again")
    _say_what_differs(folder)
    with tempfile.TemporaryDirectory() as aside:
        config = _config(folder, Path(aside), step, processes)
        again = _copy(folder, config, saved.get(before))
        _train(config)
        _compare(saved[step].folder, again / "checkpoints" / saved[step].folder.name, f"{folder}, step {step}")


def _saved(folder: Path) -> dict[int, Checkpoint]:
    """The checkpoints of a run, by step; what is none is named and passed over."""
    saved = {}
    for path in sorted((folder / "checkpoints").glob("step-*")):
        if checkpoint := checkpoints.readable(path):
            saved[checkpoint.step] = checkpoint
        else:
            print(f"passed over: {path} has no manifest that can be read", file=sys.stderr)
    return saved


def _config(folder: Path, aside: Path, step: int, processes: int | None) -> StageConfig:
    """The run's config, but for where it writes, whom it tells, and when it stops."""
    config: StageConfig = as_if_here(config_of(folder), folder)
    engine = config.engine if processes is None else dataclasses.replace(config.engine, processes=processes)
    (aside / CACHE).symlink_to((Path(config.runs_dir) / CACHE).absolute(), target_is_directory=True)
    return dataclasses.replace(
        config, runs_dir=str(aside), engine=engine, tracker=TrackerConfig(samples=config.tracker.samples),
        train=dataclasses.replace(config.train, stop_after=step),
        checkpoint=dataclasses.replace(config.checkpoint, keep_last=sys.maxsize, mirror=None),
        eval=dataclasses.replace(config.eval, every_steps=None),
    )  # fmt: skip


def _copy(folder: Path, config: StageConfig, before: Checkpoint | None) -> Path:
    """A folder like the run's after the checkpoint; that one is only pointed to."""
    again = handover.run_folder(config)
    (again / "checkpoints").mkdir(parents=True)
    if before:
        (again / "checkpoints" / before.folder.name).symlink_to(before.folder.absolute(), target_is_directory=True)
    (again / "config.yaml").write_text(to_yaml(config))
    handover.write_lineage(again, handover.read_lineage(folder) | {"finished": None})
    for path in (folder / name for name in NEEDED):
        if path.is_dir():
            shutil.copytree(path, again / path.name)
        elif path.is_file():
            shutil.copy(path, again)
    return again


def _train(config: StageConfig) -> None:
    with contextlib.suppress(Stopped):
        importlib.import_module(f"llmtrain.stages.{handover.stage_name(config)}").run(config)


def _say_what_differs(folder: Path) -> None:
    """Other code or libraries than those that trained may well give other bits."""
    then, now = handover.read_lineage(folder).get("code", {}), handover.code()
    for name in sorted({*then, *now}):
        if then.get(name) != now.get(name):
            print(f"note: {name} was {then.get(name)} then and is {now.get(name)} now", file=sys.stderr)


def _compare(then: Path, now: Path, what: str) -> None:
    """A line for each kind of tensors. Raises UserError where any differs."""
    states = [checkpoints.read_state(each) for each in (then, now)]
    wrong = []
    for part, title in GROUPS.items():
        one, other = ({name: each for name, each in state.items() if name.startswith(part)} for state in states)
        if not one and not other:
            continue
        found = dict(differences(one, other))
        verdict = "the same bits"
        if found:
            name = max(found, key=lambda each: found[each])
            verdict = f"FAILED: {len(found)} differ, most by {found[name]:.3g} ({name})"
            wrong.append(title)
        print(f"{title:<10}{f'{len(one)} tensors, {sum(map(Tensor.numel, one.values())):,} values':<42}{verdict}")
    if wrong:
        raise UserError(f"{what}: trained again, it has other bits ({', '.join(wrong)}).")


def differences(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Iterator[tuple[str, float]]:
    """The tensors that are not the same to the bit, each with its largest difference; infinite where one is missing."""
    for name in sorted({*one, *other}):
        if name not in one or name not in other or one[name].shape != other[name].shape:
            yield name, float("inf")
            continue
        pair = [each[name].contiguous().flatten() for each in (one, other)]
        if not torch.equal(*(each.view(torch.uint8) for each in pair)):
            apart = (pair[0].double() - pair[1].double()).abs()
            yield name, float(apart.nan_to_num(float("inf")).max())
