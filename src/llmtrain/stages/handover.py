"""What one stage hands to the next: finished runs, their models, and who their parents were.

`lineage.json` in a run folder says how its model came to be: the stage, the parents with the digests of their
weights, the data with its digests, the code and library versions, and whether the run has finished.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from llmtrain import __version__
from llmtrain.config.compose import differences, read_yaml, to_dict, to_yaml
from llmtrain.config.errors import ConfigError, UserError
from llmtrain.config.json_files import read_object
from llmtrain.config.schema import (
    AlignConfig,
    CheckpointConfig,
    LoraConfig,
    PretrainConfig,
    SamplingMethod,
    StageConfig,
)
from llmtrain.config.validate import filled

Config = TypeVar("Config", bound=StageConfig)

# The stages whose newest finished run a stage starts from when it is told no folder; the first that has one is taken.
STAGE_BEFORE = {"sft": ("pretrain",), "reward": ("sft", "pretrain"), "align": ("sft", "pretrain")}

# A run may go on with other values here: they change how it runs or what is kept, not what it computes.
MAY_DIFFER = (
    "run", "runs_dir", "data.sources.", "data.phases", "data.temperature", "data.when_exhausted", "data.on_error",
    "engine.processes", "engine.threads", "engine.sharding", "engine.shard_processes", "engine.tensor_parallel",
    "engine.expert_parallel", "engine.context_parallel", "engine.pipeline_parallel", "engine.pipeline_schedule",
    "engine.activation_checkpointing", "engine.cpu_offload", "engine.hang_minutes", "engine.profile",
    "train.micro_batch_rows", "train.stop_after", "tracker.", "checkpoint.", "eval.", "health.",
    "rollout.gpu_memory_utilization", "rollout.enforce_eager", "rollout.sleep",
)  # fmt: skip


def parent(config: StageConfig) -> str:
    """The folder that a stage starts from; `start` has filled it in where the config named none."""
    assert config.model.init_from is not None
    return config.model.init_from


def stage_name(config: StageConfig) -> str:
    """The command of a config: pretrain, sft, reward or align."""
    return type(config).__name__.removesuffix("Config").lower()


def run_folder(config: StageConfig) -> Path:
    """The folder of a run."""
    return Path(config.runs_dir) / config.run


def checkpoint_config(config: StageConfig, score: str | None) -> CheckpointConfig:
    """`config.checkpoint` with what null stands for in `final`: which weights the run hands on.

    `score`: of a policy whose reward can be exploited, the metric that tells, higher is better; null for other runs.
    """
    keep, every = config.checkpoint, config.eval.every_steps
    if keep.final is not None:
        return keep
    is_measured = every is not None and keep.every_steps is not None and keep.every_steps % every == 0
    if score is None or not is_measured:
        return dataclasses.replace(keep, final="last")
    if keep.best_metric is not None:
        return dataclasses.replace(keep, final="best")
    return dataclasses.replace(keep, final="best", best_metric=score, best_mode="max")


def model_folder(path: str | Path) -> Path:
    """The Transformers folder meant by `path`: a run (its finished model), a checkpoint, or such a folder itself.

    A name that is no folder here is returned as it is: it may be a hub id.
    """
    folder = Path(path)
    if (folder / "model" / "config.json").is_file():
        return folder / "model"
    if (folder / "checkpoints").is_dir():
        raise ConfigError(
            f"{folder} is a run that has not finished: it has no model/ yet. "
            "Run its command again, or name one of its checkpoints."
        )
    return folder


def newest_finished(runs_dir: str | Path, stages: tuple[str, ...]) -> Path | None:
    """The run of one of `stages` that finished last."""
    found = []
    for path in Path(runs_dir).glob("**/lineage.json"):
        try:
            lineage = read_lineage(path.parent)
        except UserError as error:
            print(f"passed over: {error}", file=sys.stderr)
            continue
        if lineage.get("finished") and lineage.get("stage") in stages:
            found.append((lineage["finished"], str(path.parent)))
    return Path(max(found)[1]) if found else None


def stage_of(folder: str | Path) -> str | None:
    """The stage whose run `folder` is, or is the model/ or a checkpoint of; None for another folder."""
    path = Path(folder)
    for place in (path, path.parent, path.parent.parent):
        if stage := read_lineage(place).get("stage"):
            return str(stage)
    return None


def resolve_parents(config: Config) -> Config:
    """The config with `model.init_from` (and `reward_model`, where answers are sampled and no `rewards` judge them)
    filled in.

    A run that has begun keeps the parents it started with; else the newest finished run of the stage before is taken.
    Raises ConfigError when there is none.
    """
    before = _saved_config(config) if has_begun(run_folder(config)) else {}
    if not isinstance(config, PretrainConfig) and config.model.init_from is None:
        folder = (before.get("model") or {}).get("init_from") or _newest(
            config, STAGE_BEFORE[stage_name(config)], "model.init_from"
        )
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, init_from=str(folder)))
    if (
        isinstance(config, AlignConfig) and isinstance(config.method, SamplingMethod)
        and config.reward_model is None and not config.rewards
    ):  # fmt: skip
        folder = before.get("reward_model") or _newest(config, ("reward",), "reward_model")
        config = dataclasses.replace(config, reward_model=str(folder))
    return config


def check_start(config: StageConfig) -> None:
    """Raises ConfigError for what folders tell: parents (of a resolved config) that are none, another run in place."""
    for role, folder in _named(config).items():
        inside, stage = model_folder(folder), stage_of(folder)
        if role == "adapter":
            if not (Path(folder) / "adapter_config.json").is_file():
                raise ConfigError(f"model.adapter_from: {folder} holds no LoRA weights: it has no adapter_config.json")
            continue
        if inside.is_dir() and not (inside / "config.json").is_file():
            key = "model.init_from" if role == "model" else role
            raise ConfigError(f"{key}: {folder} is neither a run nor a model folder: it has no config.json")
        if role == "model" and stage == "reward":
            raise ConfigError(f"model.init_from: {folder} is a reward model, which writes no text. Name another run.")
        if role == "reward_model" and stage not in (None, "reward"):
            raise ConfigError(f"reward_model: {folder} is a run of {stage}. Name one of llmtrain reward.")
    _changes(config)


def _named(config: StageConfig) -> dict[str, str]:
    """Role → folder of the models that a run starts from."""
    named = {
        "model": config.model.init_from, "adapter": config.model.adapter_from,
        "reward_model": getattr(config, "reward_model", None),
    }  # fmt: skip
    return {role: folder for role, folder in named.items() if folder}


def parents(config: StageConfig) -> dict[str, dict[str, str]]:
    """The models that a run starts from: role → folder and digest of the weights."""
    return {
        role: {"folder": folder, "sha256": weights_digest(folder)} for role, folder in _named(config).items()
    }  # fmt: skip


def weights_digest(folder: str | Path) -> str:
    """One digest over the weight files of a model folder."""
    digest = hashlib.sha256()
    inside = model_folder(folder)
    for path in sorted([*inside.glob("*.safetensors"), *inside.glob("state/*.safetensors")]):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


class Start(NamedTuple):
    """What a run with adapters started from: its checkpoints hold only what it has trained."""

    init_from: str
    adapter_from: str | None
    adapter: LoraConfig


def write_start(folder: Path, config: StageConfig) -> None:
    """Say in a checkpoint's folder what the weights belong to, where they are not all of them."""
    if isinstance(config.adapter, LoraConfig):
        said = {"parents": read_lineage(run_folder(config))["parents"], "adapter": to_dict(config)["adapter"]}
        _write(folder / "start.json", json.dumps(said, indent=1))


def read_start(folder: Path) -> Start | None:
    """What `write_start` wrote. Raises UserError where the weights are not there any more, or are not the same."""
    path = folder / "start.json"
    if not path.is_file():
        return None
    try:
        said = read_object(path)
        known = {role: said["parents"].get(role) for role in ("model", "adapter")}
        adapter = known["adapter"] and str(known["adapter"]["folder"])
        start = Start(str(known["model"]["folder"]), adapter, LoraConfig(**said["adapter"]))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} does not say what the adapters belong to: {error}") from None
    for parent in filter(None, known.values()):
        if not Path(parent["folder"]).is_dir() or weights_digest(parent["folder"]) != parent.get("sha256"):
            raise UserError(
                f"{folder} holds adapters alone, and the weights in {parent['folder']} that they belong to "
                "are not there, or have changed since."
            )
    return start


def open_run(config: StageConfig) -> dict[str, Any]:
    """Make the run's folder, or open it again; returns its lineage.

    Raises ConfigError when the folder belongs to a run whose config differs where it matters, or whose parents'
    weights have changed since.
    """
    folder = run_folder(config)
    if _changes(config):
        for name in ("samples.json", "tokenizer", "micro_batches.json"):
            _remove(folder / name)
    lineage, now = check_parents(config)
    _write(folder / "config.yaml", to_yaml(config))
    if not lineage:
        lineage = {
            "stage": stage_name(config),
            "run": config.run,
            "seed": config.seed,
            "parents": now,
            "code": code(),
            "finished": None,
        }
        write_lineage(folder, lineage)
    return lineage


def check_parents(config: StageConfig) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    """The lineage of a run that has begun, else nothing, and its parents now.

    Raises ConfigError where the parents' weights have changed since.
    """
    folder = run_folder(config)
    lineage = read_lineage(folder) if has_begun(folder) else {}
    if not lineage and has_begun(folder):
        raise ConfigError(_lacks(folder, "lineage.json"))
    now = parents(config)
    for role, parent in (lineage.get("parents") or {}).items():
        if role in now and parent["sha256"] != now[role]["sha256"]:
            raise ConfigError(
                f"{folder}: the weights in {parent['folder']} ({role}) have changed since the run began. "
                "Choose another run= name."
            )
    return lineage, now


def _changes(config: StageConfig) -> list[str]:
    """Where the config differs from the run's own in what matters. Raises ConfigError if that run has begun."""
    folder = run_folder(config)
    before = _saved_config(config)
    if not before and has_begun(folder):
        raise ConfigError(_lacks(folder, "config.yaml"))
    # keys that are newer than the run have their defaults in it
    lines = differences(filled(type(config), before), to_dict(config)) if before else []
    changed = [line for line in lines if not line.startswith(MAY_DIFFER)]
    if changed and has_begun(folder):
        raise ConfigError(
            f"{folder} holds a run with another config:\n  " + "\n  ".join(changed)
            + "\nChoose another run= name, or go back to that config to resume it."
        )  # fmt: skip
    return changed


def _lacks(folder: Path, name: str) -> str:
    return (
        f"{folder} holds a run that has begun, but its {name} is gone: whether this is the same run cannot be told. "
        "Restore the file, or choose another run= name."
    )


def has_begun(folder: Path) -> bool:
    """Whether a run's folder holds more than an attempt that failed before its first measurement."""
    metrics = folder / "metrics.jsonl"
    saved = any((folder / "checkpoints").glob("step-*")) or (folder / "model").is_dir()
    return saved or (metrics.is_file() and metrics.stat().st_size > 0)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_lineage(folder: Path) -> dict[str, Any]:
    """What `lineage.json` says; empty when there is none. Raises UserError where it cannot be read."""
    path = folder / "lineage.json"
    cure = "Restore it, or name another folder."
    try:
        lineage = read_object(path) if path.is_file() else {}
    except UserError as error:
        raise UserError(f"{error}. {cure}") from None
    parents = lineage.get("parents") or {}
    for role, parent in parents.items() if isinstance(parents, dict) else [("", parents)]:
        if not (isinstance(parent, dict) and all(isinstance(parent.get(key), str) for key in ("folder", "sha256"))):
            raise UserError(f"{path}: parents.{role}: expected a folder and its sha256, found {parent!r}. {cure}")
    return lineage


def write_lineage(folder: Path, lineage: dict[str, Any]) -> None:
    """Replace `lineage.json`."""
    _write(folder / "lineage.json", json.dumps(lineage, indent=1))


def code() -> dict[str, Any]:
    """Which code ran: our version and commit, Python, the libraries that decide the numbers, the processor."""
    libraries = ("torch", "tokenizers", "datasets", "safetensors", "accelerate", "numpy")
    here = Path(__file__).parent
    commit = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    inside = subprocess.run(
        ["git", "-C", here, "ls-files", "--error-unmatch", __file__], capture_output=True, check=False
    )
    return {
        "llmtrain": __version__,
        "commit": commit.stdout.strip() if commit.returncode == inside.returncode == 0 else None,
        "python": sys.version.split()[0],
        "machine": platform.machine(),
        "libraries": {name: importlib.metadata.version(name) for name in libraries},
    }


def _newest(config: StageConfig, stages: tuple[str, ...], key: str) -> Path:
    found = newest_finished(config.runs_dir, stages)
    if found is None:
        raise ConfigError(
            f"{key}: no finished {' or '.join(stages)} run in {config.runs_dir}. "
            f"Run `llmtrain {stages[0]}` first, or name a folder: {key}=FOLDER."
        )
    print(f"{key}: taking the newest finished {' or '.join(stages)} run, {found}", file=sys.stderr)
    return found


def _saved_config(config: StageConfig) -> dict[str, Any]:
    path = run_folder(config) / "config.yaml"
    return read_yaml(str(path)) if path.is_file() else {}


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.partial")
        aside.write_text(text)
        os.replace(aside, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}. Set runs_dir= to a folder that can be written and has room."
        ) from error
