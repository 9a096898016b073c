"""The rest of Hydra's command line: sweeps with launchers and sweepers, `--cfg hydra`, `--info`.

A single run does not come here. `hydra.main` is applied at run time with an absolute folder; in each job the config
comes through `load_config`, as in a single run.
"""

import itertools
import os
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import hydra
from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from llmtrain.config import faults
from llmtrain.config.compose import COMMANDS, check_jobs, load_config, not_composed
from llmtrain.config.faults import Fault
from llmtrain.config.fields import fields_of
from llmtrain.config.folders import packaged_configs, user_folders
from llmtrain.config.overrides import KeyOverride, Overrides, for_hydra, is_group, read, wrong_option
from llmtrain.config.sources import hydra_session, search_in

# Jobs of a sweep that are checked before the first one starts: about 0.1 s each.
CHECKED_JOBS = 100

Execute = Callable[[str, Any], Any]


class Job:
    """One job of Hydra's: makes the config and hands it to `execute(command, config)`. Can be pickled by launchers."""

    def __init__(self, command: str, execute: Execute, flags: Namespace, fixed: Sequence[str], own: list[str]) -> None:
        self.command = command
        self.execute = execute
        self.config_dirs = list(flags.config_dir)
        self.config_name = flags.config_name
        self.fixed = set(fixed)
        self.own = own

    def __call__(self, composed: DictConfig) -> Any:
        """Called by Hydra; what the command returns is what a sweeper optimises."""
        job = HydraConfig.get()
        texts = [*job.overrides.task, *self.own]
        if not OmegaConf.is_missing(job.job, "num") and "run" in fields_of(COMMANDS[self.command]):
            run = f"{composed.run}{self._suffix(job.job.num, list(job.overrides.task))}"
            print(f"job {job.job.num}: run={run}", file=sys.stderr)
            texts.append(f"run={run}")
        config = load_config(self.command, texts, config_dirs=self.config_dirs, config_name=self.config_name)
        return self.execute(self.command, config)

    def _suffix(self, number: int, texts: Sequence[str]) -> str:
        """`/3-optimizer.lr=0.001`: no two jobs of a sweep share a folder, and a repeated sweep finds its own again."""
        swept = [text.lstrip("+") for text in texts if _key(text) not in self.fixed]
        others = [text for text in swept if _key(text) != "run"]
        if swept and not others:
            return ""
        words = [re.sub(r"[^A-Za-z0-9._=-]+", "-", text) for text in others]
        return "/" + "-".join([str(number), *words])[:120]


def _key(text: str) -> str:
    return text.lstrip("+~").partition("=")[0]


def run(command: str, flags: Namespace, texts: Sequence[str], execute: Execute) -> None:
    """Give the command line to `hydra.main`. Raises ConfigError for a fault in it or in any job of a sweep."""
    kind, config_name = COMMANDS[command], flags.config_name or command
    folders = user_folders(flags.config_dir)
    with hydra_session(folders) as loader:
        overrides = read(texts, kind, loader, sweep=flags.multirun)
        arguments, own = _arguments(overrides, command, kind, loader, config_name)
    if overrides.faults:
        raise faults.error(command, overrides.faults)
    if flags.multirun:
        jobs = _jobs(overrides, [text for text in texts if not _is_sweep(text, overrides)])
        check_jobs(command, jobs, config_dirs=flags.config_dir, config_name=flags.config_name)
    job = Job(command, execute, flags, [_key(text) for text in arguments if not _is_sweep(text, overrides)], own)
    search_in(folders)
    with _hydra_process(["llmtrain", *flags.hydra, *arguments]):
        try:
            hydra.main(config_path=str(packaged_configs()), config_name=config_name, version_base="1.3")(job)()
        except HydraException as reason:
            raise faults.error(command, [not_composed(reason)]) from reason


def _arguments(
    overrides: Overrides, command: str, kind: type, loader: ConfigLoader, config_name: str
) -> tuple[list[str], list[str]]:
    """The overrides as Hydra takes them, and those that it would mistake for a group's option (generate model=...)."""
    own = [override.text for override in overrides.keys if loader.get_group_options(override.key)]
    keys = [_as_force_add(override) for override in overrides.keys if override.text not in own]
    for sweep in overrides.sweeps:
        group = is_group(sweep.key_or_group, kind, loader)
        if group:
            wrong = (wrong_option(sweep.key_or_group, option, loader) for option in sweep.sweep_iterator())
            for problem in filter(None, wrong):
                overrides.faults.append(Fault(sweep.key_or_group, problem, f"the override {sweep.input_line}"))
        keys.append(str(sweep.input_line) if group else f"++{str(sweep.input_line).lstrip('+')}")
    return [*for_hydra(overrides, command, kind, loader, config_name), *keys], own


def _as_force_add(override: KeyOverride) -> str:
    """`++key=value`: the schema knows keys that no file names, Hydra does not."""
    if override.delete:
        return override.text
    if isinstance(override.value, str) and override.text.lstrip("+") == f"{override.key}={override.value}":
        return f"++{override.key}={_quoted(override.value)}"
    if isinstance(override.value, list) and all(isinstance(item, str) for item in override.value):
        return f"++{override.key}=[{','.join(map(_quoted, override.value))}]"
    return f"++{override.text.lstrip('+')}"


def _quoted(text: str) -> str:
    return str(QuotedString(text, Quote.single).with_quotes())


def _is_sweep(text: str, overrides: Overrides) -> bool:
    return any(_key(text) == sweep.key_or_group for sweep in overrides.sweeps)


def _jobs(overrides: Overrides, fixed: list[str]) -> list[list[str]]:
    """The overrides of the jobs of a grid, as far as they are checked beforehand."""
    texts = [text for text in fixed if text not in overrides.hydra]
    grids = [list(_values(sweep)) for sweep in overrides.sweeps if sweep.is_discrete_sweep()]
    return [[*texts, *choice] for choice in itertools.islice(itertools.product(*grids), CHECKED_JOBS)]


def _values(sweep: Override) -> Iterator[str]:
    return (f"{sweep.key_or_group}={value}" for value in sweep.sweep_string_iterator())


@contextmanager
def _hydra_process(arguments: list[str]) -> Iterator[None]:
    """hydra.main reads sys.argv, and hands errors on only when it is told to."""
    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = arguments, "1"
    try:
        yield
    finally:
        sys.argv = argv
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error
