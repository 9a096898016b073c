"""argv → frozen config: Hydra composes, a plain container is checked against the schema, all faults come at once.

Below `load_config` nobody has heard of Hydra. Nothing here imports torch.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import yaml
from hydra import compose
from hydra.core.config_loader import ConfigLoader
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter

from llmtrain.config import commands, faults, schema
from llmtrain.config.checks import LENGTHS, run_checks
from llmtrain.config.errors import ConfigError
from llmtrain.config.faults import Fault
from llmtrain.config.fields import Path, parts
from llmtrain.config.folders import user_folders
from llmtrain.config.overrides import Overrides, for_hydra, read
from llmtrain.config.plain import Finding, apply, plain
from llmtrain.config.schema import PipelineConfig, SamplingMethod
from llmtrain.config.sources import Layers, hydra_session
from llmtrain.config.validate import filled, validate
from llmtrain.config.view import View

COMMANDS: dict[str, type] = {name: getattr(schema, command.schema) for name, command in commands.COMMANDS.items()}

# A key that stands for others: said in a higher layer than they are, it replaces them.
REPLACES = {
    "model.init_from": ("model",),
    "tokenizer.path": ("tokenizer.vocab_size", "tokenizer.train_bytes", "tokenizer.special_tokens_for"),
}


PROBLEMS = "embedded:arithmetic"  # held-out rows of the data of the same name


class Loaded(NamedTuple):
    """What one command's config came to: an object, or None and faults."""

    config: Any
    faults: list[Fault]


def load_config(
    command: str,
    overrides: Sequence[str] = (),
    *,
    config_dirs: Sequence[str] = (),
    config_name: str | None = None,
    later: Collection[str] = (),
) -> Any:
    """The frozen config of a command, all of it checked.

    `config_dirs` are searched before `./configs` and the packaged YAML; `config_name` is the root file (default: the
    command's own). `later` names keys whose folders need not exist yet, such as "model.init_from".
    Raises ConfigError with every fault in one message. The configs of a pipeline's stages are checked as well.
    """
    with hydra_session(user_folders(config_dirs)) as loader:
        config, found = _load(loader, command, overrides, config_name or command, later)
        if isinstance(config, PipelineConfig) and not found:
            found = _stage_faults(loader, config)
    if found:
        raise faults.error(command, found)
    return config


def check_jobs(
    command: str, jobs: Sequence[Sequence[str]], *, config_dirs: Sequence[str] = (), config_name: str | None = None
) -> None:
    """Check the configs of several jobs, each a list of overrides. Raises ConfigError with the faults of all."""
    found: list[Fault] = []
    with hydra_session(user_folders(config_dirs)) as loader:
        for overrides in jobs:
            found += _load(loader, command, overrides, config_name or command, ()).faults
    if found:
        raise faults.error(command, found)


def _stage_faults(loader: ConfigLoader, pipeline: PipelineConfig) -> list[Fault]:
    found = []
    for name, stage in pipeline.stages.items():
        later = ("model.init_from", "reward_model")
        loaded = _load(loader, stage.command, stage_overrides(pipeline, name), stage.command, later)
        found += [Fault(f"{name}: {fault.key}", fault.problem, fault.origin) for fault in loaded.faults]
        samples = isinstance(getattr(loaded.config, "method", None), SamplingMethod)
        if samples and stage.reward_model is None and not loaded.config.rewards:
            problem = "needs a value: the earlier stage that trains it, or rewards=... among the overrides"
            found.append(Fault(f"stages.{name}.reward_model", problem))
    return found


def _load(loader: ConfigLoader, command: str, texts: Sequence[str], config_name: str, later: Collection[str]) -> Loaded:
    kind = COMMANDS[command]
    try:
        overrides = read(texts, kind, loader)
        groups = for_hydra(overrides, command, kind, loader, config_name)
        config = compose(config_name, overrides=groups)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as reason:
        return Loaded(None, [*overrides.faults, not_composed(reason)])
    found = [*overrides.faults, *apply(overrides.keys, config)]
    layers = Layers(loader, config_name, groups, overrides)
    checked, findings = _check(command, kind, config, layers, overrides, later)
    found += [_fault(finding, layers) for finding in findings]
    return Loaded(None if found else checked, found)


def _check(
    command: str, kind: type, config: DictConfig, layers: Layers, overrides: Overrides, later: Collection[str]
) -> tuple[Any, list[Finding]]:
    values, missing = plain(config)
    values = superseded(values, lambda path: place.rank if (place := layers.place(path)) else -1)
    values = with_problems(values)
    checked, findings = validate(kind, values)
    told = [finding.path for finding in missing] + [(group,) for group in overrides.faulty_groups]
    findings = missing + [finding for finding in findings if not any(_inside(finding.path, path) for path in told)]
    faulty = [*told, *(finding.path for finding in findings)]
    view = View(
        command,
        kind,
        filled(kind, values),
        faulty,
        lambda path: place.rank if (place := layers.place(path)) else -1,
    )
    return checked, findings + run_checks(view, later)


def _inside(path: Path, other: Path) -> bool:
    return path[: len(other)] == other


def _fault(finding: Finding, layers: Layers) -> Fault:
    places = [layers.origin(finding.path)]
    places += [place.text for path in finding.also if (place := layers.place(path))]
    return Fault(".".join(finding.path), finding.problem, " and ".join(dict.fromkeys(filter(None, places))))


def not_composed(reason: Exception) -> Fault:
    """Hydra's own words for what it cannot compose, in one line."""
    if isinstance(reason, yaml.MarkedYAMLError) and reason.problem_mark:
        mark = reason.problem_mark
        return Fault("", f"not valid YAML: {reason.problem}", f"{mark.name}:{mark.line + 1}")
    options = list(getattr(reason, "options", None) or ())
    missing = str(getattr(reason, "missing_cfg_file", "") or "")
    text = str(reason) if str(reason) else str(reason.__cause__ or type(reason).__name__)
    first = text.split("\nConfig search path")[0].split("\nAvailable options")[0].strip().replace("\n", " ")
    if options:
        word = missing.rsplit("/", 1)[-1]
        first += faults.choices(word, options)
    return Fault("", first)


def superseded(values: dict[str, Any], rank: Callable[[Path], int]) -> dict[str, Any]:
    """Values without those that a higher layer has replaced by saying the same thing in another way.

    A root file says `train.steps`; `train.tokens=...` on the command line then stands in its place.
    """
    dropped: set[str] = set()
    lengths = [key for key in LENGTHS if _get(values, key) is not None]
    if len(lengths) > 1:
        highest = max(rank(parts(key)) for key in lengths)
        dropped |= {key for key in lengths if rank(parts(key)) < highest}
    for key, others in REPLACES.items():
        if _get(values, key) is not None:
            own = rank(parts(key))
            keys = [name for other in others for name in _leaves(values, other) if name != key]
            dropped |= {name for name in keys if rank(parts(name)) < own}
    return _without(values, dropped)


def with_problems(values: dict[str, Any]) -> dict[str, Any]:
    """Values with what `eval.problems=auto` stands for: the sums where the data are sums, null for any other data.

    A score of sums says nothing of a policy that learns to talk, and must not choose its checkpoint.
    """
    if _get(values, "eval.problems") != "auto":
        return values
    sources = _get(values, "data.sources")
    paths = [_get(source, "path") for source in sources.values()] if isinstance(sources, Mapping) else []
    problems = PROBLEMS if paths and all(path == PROBLEMS for path in paths) else None
    return values | {"eval": values["eval"] | {"problems": problems}}


def _get(values: Any, key: str) -> Any:
    for part in parts(key):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def _leaves(values: Any, key: str) -> list[str]:
    block = _get(values, key)
    return [f"{key}.{name}" for name in block] if isinstance(block, Mapping) else [key] * (block is not None)


def _without(values: dict[str, Any], dropped: Collection[str], prefix: str = "") -> dict[str, Any]:
    return {
        key: _without(value, dropped, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in values.items()
        if f"{prefix}{key}" not in dropped
    }


def stage_overrides(pipeline: PipelineConfig, name: str) -> list[str]:
    """The overrides that make a stage's own config from the pipeline's: `load_config(stage.command, these)`."""
    stage = pipeline.stages[name]
    root = f"{pipeline.runs_dir}/{pipeline.run}"
    fixed = [f"run={pipeline.run}/{name}", f"runs_dir={pipeline.runs_dir}", f"seed={pipeline.seed}"]
    if stage.model is not None:
        fixed.append(f"model.init_from={root}/{stage.model}")
    if stage.reward_model is not None:
        fixed.append(f"reward_model={root}/{stage.reward_model}")
    return [*pipeline.overrides, *stage.overrides, *fixed]


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain dicts, lists and values, complete with all defaults, under the names used in YAML."""
    values: dict[str, Any] = TypeAdapter(type(config)).dump_python(config, mode="json", by_alias=True)
    return values


def to_yaml(config: Any, key: str | None = None) -> str:
    """A config, or what lies at `key`, as YAML, complete with all defaults; composed again it gives the same config."""
    values: Any = to_dict(config)
    if key is not None and (values := _get(values, key)) is None:
        raise ConfigError(f"the config has no key {key}, or null there")
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(values))) if isinstance(values, dict | list) else f"{values}\n"


def _escaped(value: Any) -> Any:
    """Text that holds `${` is text, not an interpolation."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def read_yaml(path: str) -> dict[str, Any]:
    """What `to_yaml` wrote, as `to_dict` gives it. Raises ConfigError for a file that is not there or not YAML."""
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, yaml.YAMLError, OmegaConfBaseException) as reason:
        raise ConfigError(f"{path}: not a config: {reason}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: not a config: it holds no keys")
    return {str(key): value for key, value in values.items()}


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One line for each key that differs: `optimizer.lr: 0.001 -> 0.0003`."""
    lines = []
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key, "(not set)"), new.get(key, "(not set)")
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before} -> {after}")
    return lines
