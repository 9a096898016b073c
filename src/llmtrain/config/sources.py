"""Where YAML is looked for, and in which file and line (or override) a key was set."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import yaml
from hydra import initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.default_element import ResultDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode

from llmtrain.config.fields import parts
from llmtrain.config.folders import packaged_configs
from llmtrain.config.overrides import KeyOverride, Overrides

COMMAND_LINE = 1_000_000  # the rank of the command line: above every file of a defaults list


class UserFolders(SearchPathPlugin):
    """Puts the user's own folders before the packaged one, so that a file of the same name is the user's."""

    folders: ClassVar[tuple[str, ...]] = ()

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called by Hydra for each command."""
        for folder in self.folders:
            search_path.prepend("user", f"file://{folder}", SearchPathQuery(provider="main"))


def search_in(folders: Sequence[str]) -> None:
    """Make every Hydra search path from here on begin with these folders."""
    UserFolders.folders = tuple(folders)
    Plugins.instance().register(UserFolders)


@contextmanager
def hydra_session(folders: Sequence[str]) -> Iterator[ConfigLoader]:
    """Hydra over the user's folders and the packaged one; an outer Hydra (a sweep) is put back afterwards."""
    search_in(folders)
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(packaged_configs()), job_name="llmtrain", version_base="1.3"):
            yield GlobalHydra.instance().config_loader()
    finally:
        GlobalHydra.instance().hydra = outer


class Place(NamedTuple):
    """What set a key; a higher rank wins over a lower one."""

    text: str
    rank: int


class Layers:
    """The layers of one composed config, lowest first: the files of the defaults list, then the command line."""

    def __init__(self, loader: ConfigLoader, config_name: str, groups: list[str], overrides: Overrides) -> None:
        self._loader = loader
        self._keys = overrides.keys
        self._chosen = overrides.groups
        self._config_name, self._groups = config_name, groups
        self._trees: dict[str, yaml.Node | None] = {}

    @cached_property
    def _defaults(self) -> list[ResultDefault]:
        # As slow as composing, so only where a fault is to be told or two layers say the same thing.
        found = self._loader.compute_defaults_list(self._config_name, self._groups, RunMode.RUN)
        return [item for item in found.defaults if not str(item.config_path).startswith("hydra")]

    def place(self, path: tuple[str, ...]) -> Place | None:
        """What set this key last, or None where it has its default."""
        for override in reversed(self._keys):
            if _touches(override, path):
                return Place(f"the override {override.text}", COMMAND_LINE)
        for rank, item in reversed(list(enumerate(self._defaults))):
            file = self._file(str(item.config_path))
            line = _line(self._tree(file), parts(item.package or ""), path) if file else None
            if file and line:
                chosen = self._chosen.get(item.override_key or "")
                text = f"{_shown(file)}:{line}"
                return Place(f"{text} ({chosen[1]})" if chosen else text, COMMAND_LINE if chosen else rank)
        return None

    def origin(self, path: tuple[str, ...]) -> str:
        """What set this key last, as text; for a key that nothing set, what set the block around it."""
        for length in range(len(path), 0, -1):
            place = self.place(path[:length])
            if place:
                return place.text
        return ""

    def _tree(self, file: str) -> yaml.Node | None:
        if file not in self._trees:
            with open(file, encoding="utf-8") as stream:
                try:
                    self._trees[file] = yaml.compose(stream, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
                except yaml.YAMLError:  # `{a:{b: 1}}` is YAML to the Python loader, which Hydra uses, not to the C one
                    self._trees[file] = yaml.compose(Path(file).read_text(encoding="utf-8"), yaml.SafeLoader)
        return self._trees[file]

    def _file(self, config_path: str) -> str | None:
        for source in self._loader.get_sources():
            if source.scheme() == "file" and source.is_config(config_path):
                return os.path.join(source.path, config_path + ("" if config_path.endswith(".yaml") else ".yaml"))
        return None


def _touches(override: KeyOverride, path: tuple[str, ...]) -> bool:
    shared = min(len(override.path), len(path))
    if override.path[:shared] != path[:shared] or override.delete:
        return False
    value: Any = override.value
    for part in path[shared:]:
        if not isinstance(value, dict) or part not in value:
            return False
        value = value[part]
    return True


def _line(tree: yaml.Node | None, package: tuple[str, ...], path: tuple[str, ...]) -> int | None:
    """The line of `path` in a file whose content lies at `package`; None if the file does not set it."""
    shared = min(len(package), len(path))
    node = tree
    if node is None or package[:shared] != path[:shared]:
        return None
    line = int(node.start_mark.line)
    for part in path[shared:]:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        found = next(((key, value) for key, value in pairs if key.value == part), None)
        if found is None:
            return None
        line, node = int(found[0].start_mark.line), found[1]
    return line + 1


def _shown(file: str) -> str:
    relative = os.path.relpath(file)
    return file if relative.startswith("..") else relative
