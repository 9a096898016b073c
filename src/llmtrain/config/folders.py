"""The folders that YAML is looked for in. Imports no Hydra: `--help` lists options without it."""

from collections.abc import Sequence
from pathlib import Path

# Below `runs_dir`: what is prepared from data, for all runs.
CACHE = "cache"


def packaged_configs() -> Path:
    """The folder of the shipped YAML: inside the package when installed, at the root of a checkout otherwise."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parents[1] / "configs"


def user_folders(config_dirs: Sequence[str] = ()) -> list[str]:
    """The user's own folders, those searched first before the others: `--config-dir`, then ./configs."""
    here = Path("configs").resolve()
    own = [str(here)] if here.is_dir() and here != packaged_configs() else []
    return [*(str(Path(folder).resolve()) for folder in config_dirs), *own]


def options(group: str, folders: Sequence[str]) -> list[str]:
    """The options of a group: the YAML files of that folder in any of the folders."""
    searched = [*map(Path, folders), packaged_configs()]
    files = [file for folder in searched for file in (folder / group).glob("*.yaml")]
    return sorted({file.stem for file in files})
