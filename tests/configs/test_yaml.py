"""Every shipped YAML file is composed and validated in a root that has its group."""

from pathlib import Path

import pytest
import yaml

from llmtrain.config.commands import COMMANDS
from llmtrain.config.compose import load_config
from llmtrain.config.folders import packaged_configs
from llmtrain.config.objective_checks import ARCHITECTURES

ROOT = packaged_configs()
FILES = sorted(str(file.relative_to(ROOT).with_suffix("")) for file in ROOT.glob("*/*.yaml"))
GROUPS = [name for name in FILES if not name.startswith("hydra/")]
LOCAL = {"data/pile_like": "pretrain", "data/instructions": "sft", "data/preferences": "reward"}  # in LLMTRAIN_DATA
STAGES = ("pretrain", "sft", "reward", "align")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_roots_are_the_commands() -> None:
    assert {file.stem for file in ROOT.glob("*.yaml")} == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs_without_arguments(command: str) -> None:
    assert load_config(command) is not None


def _arguments(name: str, tmp_path: Path) -> tuple[str, list[str]]:
    group, option = name.split("/")
    texts = [f"{group}={option}"]
    if name == "data/files":
        (tmp_path / "a.jsonl").write_text("{}\n")
        texts.append("data.sources.files.path=a.jsonl")
    if name == "data/arithmetic":
        return "sft", texts
    if group == "adapter":
        return "sft", texts
    if group == "objective" and option != "auto":
        texts.append(f"model.architecture={ARCHITECTURES[option]}")
    if group in ("rewards", "rollout"):
        return "align", [*texts, "method=ppo"]
    return ("align" if group == "method" else "pretrain"), texts


@pytest.mark.parametrize("name", [name for name in GROUPS if name not in LOCAL])
def test_option(name: str, tmp_path: Path) -> None:
    command, texts = _arguments(name, tmp_path)
    assert load_config(command, texts) is not None


@pytest.mark.parametrize("command", STAGES)
@pytest.mark.parametrize("experiment", [name.split("/")[1] for name in GROUPS if name.startswith("experiment/")])
def test_experiment(command: str, experiment: str) -> None:
    assert load_config(command, [f"experiment={experiment}"]) is not None


@pytest.mark.parametrize("name", LOCAL)
def test_mixtures_of_local_folders_find_them(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMTRAIN_DATA", str(tmp_path))
    said = yaml.safe_load((ROOT / f"{name}.yaml").read_text())["sources"]
    for source in said.values():
        for key in ("path", "validation_path"):
            file = Path(source[key].replace("${oc.env:LLMTRAIN_DATA}", str(tmp_path)))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    (tmp_path / "model").mkdir()
    config = load_config(LOCAL[name], [f"data={name.split('/')[1]}"])
    assert set(config.data.sources) == set(said)
