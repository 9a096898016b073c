"""Real instruction and preference data through the command line, where LLMTRAIN_DATA names a folder with them."""

import json
import os
from pathlib import Path

import pytest
from tests.tiny import COMMANDS, finish, starting_from

DATA = Path(os.environ.get("LLMTRAIN_DATA", "no such folder"))
LENGTH = 1024
SHORT = ["train.steps=2", "schedule.warmup_steps=0", "train.batch_rows=4", "eval.max_rows=2"]
PAIRS = ["preference/dpo_demo", "preference/dpo_mix", "preference/stackexchange", "preference/taskmaster_reward"]
LABELLED = ["preference/kto_demo", "preference/taskmaster_reward"]
TALKS = [
    "sft/dolly_hhrlhf_small", "sft/gsm8k", "sft/p3_t0", "sft/sgd_multiturn", "sft/snli_templates", "sft/topical_chat",
]  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason="LLMTRAIN_DATA names no folder"),
]


def longer(command: list[str]) -> list[str]:
    """The command for models that read rows of real data."""
    return [
        text.replace("max_sequence_length=128", f"max_sequence_length={LENGTH}").replace(
            "train.sequence_length=128", f"train.sequence_length={LENGTH}"
        )
        for text in command
    ]


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name in ("pretrain", "sft", "reward"):
        where = [*starting_from(folder, name), f"runs_dir={folder}", f"run={name}"]
        finish([*longer(COMMANDS[name]), "train.steps=1", "schedule.warmup_steps=0", *where])
    return folder


def train(parents: Path, stage: str, name: str, rows: int = 400, too_long: str = "cut") -> str:
    """Train two tiny steps of a stage on a set; what the run says."""
    source = f"data.sources.files.path={DATA / name / 'train.jsonl.gz'}"
    command = [text for text in longer(COMMANDS[stage]) if not text.startswith(("data.", "train.batch_rows", "eval."))]
    run = f"{stage}-{name.replace('/', '-')}-{too_long}"
    arguments = [
        *command, *SHORT, *([] if stage == "reward" else ["eval.problems=null"]), "data=files", source,
        f"data.sources.files.max_rows={rows}", "data.validation_every=8", f"data.too_long={too_long}",
        *starting_from(parents, stage),
    ]  # fmt: skip
    said = finish([*arguments, f"runs_dir={parents}", f"run={run}"])
    lineage = json.loads((parents / run / "lineage.json").read_text())
    assert lineage["finished"]
    assert lineage["data"]["files"]["rows"] > 0
    return said


@pytest.mark.parametrize("name", [*TALKS, *LABELLED])
def test_fine_tuning(parents: Path, name: str) -> None:
    assert "read as" in train(parents, "sft", name)


def test_long_conversations_are_divided(parents: Path) -> None:
    said = train(parents, "sft", "sft/topical_chat", too_long="split")
    assert "divided into" in said


@pytest.mark.parametrize("stage", ["reward", "dpo"])
@pytest.mark.parametrize("name", PAIRS)
def test_pairs(parents: Path, stage: str, name: str) -> None:
    rows = 4000 if name in LABELLED else 400  # few prompts have two answers
    assert "read as" in train(parents, stage, name, rows)


@pytest.mark.parametrize("name", ["preference/stackexchange", "sft/gsm8k"])
def test_prompts(parents: Path, name: str) -> None:
    assert "read as prompts" in train(parents, "ppo", name)
