"""Real data through the command line, where LLMTRAIN_DATA names a folder with it: each format, each stage."""

import gzip
import importlib
import json
import lzma
import os
from itertools import islice
from pathlib import Path

import datasets
import pytest
import yaml
from tests.tiny import COMMANDS, ENVIRONMENT, finish, starting_from

from llmtrain.config.folders import packaged_configs

DATA = Path(os.environ.get("LLMTRAIN_DATA", "no such folder"))
LENGTH = 1024
SHORT = ["train.steps=2", "schedule.warmup_steps=0", "train.batch_rows=4", "eval.max_rows=2"]
PAIRS = ["preference/dpo_demo", "preference/dpo_mix", "preference/stackexchange", "preference/taskmaster_reward"]
LABELLED = ["preference/kto_demo", "preference/taskmaster_reward"]
TALKS = [
    "sft/dolly_hhrlhf_small", "sft/gsm8k", "sft/p3_t0", "sft/sgd_multiturn", "sft/snli_templates", "sft/topical_chat",
]  # fmt: skip

MIXED = yaml.safe_load((packaged_configs() / "data" / "pile_like.yaml").read_text())["sources"]

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


def converted(folder: Path, kind: str) -> str:
    """Some real text in another format; its path."""
    with gzip.open(DATA / "pretrain/wikipedia_en/train.jsonl.gz", "rb") as lines:
        data = b"".join(islice(lines, 300))
    rows = [json.loads(line) for line in data.splitlines()]
    file = folder / f"text.{kind}"
    match kind:
        case "parquet":
            importlib.import_module("pyarrow.parquet").write_table(
                importlib.import_module("pyarrow").table({"text": [row["text"] for row in rows]}), file
            )
        case "arrow":
            datasets.Dataset.from_list([{"text": row["text"]} for row in rows]).save_to_disk(str(file))
        case "json":
            file.write_text(json.dumps(rows))
        case "txt":
            file.write_text("\n\n".join(row["text"] for row in rows))
        case "jsonl.xz":
            file.write_bytes(lzma.compress(data))
        case "jsonl":
            file.write_bytes(data)
    return str(file)


@pytest.mark.parametrize("kind", ["parquet", "arrow", "json", "txt", "jsonl.xz", "jsonl"])
def test_pretraining_on_each_format(parents: Path, tmp_path: Path, kind: str) -> None:
    arguments = [
        *(text for text in COMMANDS["pretrain"] if "max_documents" not in text and "validation_every" not in text),
        "train.steps=2", "schedule.warmup_steps=0", "data=files",
        f"data.sources.files.path={converted(tmp_path, kind)}",
        f"runs_dir={tmp_path}", "run=one",
    ]  # fmt: skip
    finish(arguments)
    lineage = json.loads((tmp_path / "one" / "lineage.json").read_text())
    assert lineage["data"]["files"]["tokens"] > 100_000
    assert finish(["show", "run=one", f"runs_dir={tmp_path}", "step=2"]) is not None


@pytest.mark.parametrize(
    "options",
    [
        ["data.sequences=documents", "data.attend_across_documents=false"],
        ["data.streaming=true", "tokenizer.path={parents}/pretrain/model"],
        ["train.length_warmup.start_length=8", "train.length_warmup.steps=2"],
        ["data.temperature=2", "engine.processes=2"],
    ],
    ids=["packed", "streamed", "length warm-up", "temperature"],
)
def test_pretraining_on_a_real_mixture(parents: Path, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENVIRONMENT, "LLMTRAIN_DATA", str(DATA))
    left_out = ("data.", "eval.") if options[0] != "data.streaming=true" else ("data.", "eval.", "tokenizer.")
    command = [text for text in COMMANDS["pretrain"] if not text.startswith(left_out)]
    weights = []
    if options[0].startswith("data.temperature"):
        names = sorted(path.name for path in (DATA / "pretrain").iterdir() if (path / "train.jsonl.gz").is_file())
        weights = [f"~data.sources.{name}.weight" for name in names if name in MIXED]
    run = options[0].split("=")[0]
    options = [option.format(parents=parents) for option in options]
    finish([
        *command, "data=pile_like", "train.steps=3", "schedule.warmup_steps=0", "eval.max_rows=2", *weights, *options,
        f"runs_dir={parents}", f"run={run}",
    ])  # fmt: skip
    lineage = json.loads((parents / run / "lineage.json").read_text())
    assert lineage["finished"]
    assert len(lineage["data"]) == len(MIXED)


@pytest.mark.parametrize("name", [*TALKS, *LABELLED])
def test_fine_tuning(parents: Path, name: str) -> None:
    assert "read as" in train(parents, "sft", name)


def test_long_conversations_are_divided(parents: Path) -> None:
    said = train(parents, "sft", "sft/topical_chat", too_long="split")
    assert "divided into" in said


def test_cleaned_web_text(parents: Path) -> None:
    command = [text for text in COMMANDS["pretrain"] if not text.startswith("data.")]
    said = finish([
        *command, "data=files", f"data.sources.files.path={DATA / 'pretrain/web/train.jsonl.gz'}", "cleaning=web",
        "train.steps=2", "schedule.warmup_steps=0", f"runs_dir={parents}", "run=cleaned",
    ])  # fmt: skip
    assert " x gopher: " in said
    assert json.loads((parents / "cleaned" / "lineage.json").read_text())["finished"]


def test_packed_conversations(parents: Path) -> None:
    command = [text for text in longer(COMMANDS["sft"]) if not text.startswith(("data.", "eval."))]
    sources = {
        name.split("/")[1]: {"path": str(DATA / name / "train.jsonl.gz"), "max_rows": 200, "weight": 1.0}
        for name in ("sft/gsm8k", "sft/dolly_hhrlhf_small")
    }  # fmt: skip
    (parents / "configs" / "data").mkdir(parents=True, exist_ok=True)
    (parents / "configs" / "data" / "two.yaml").write_text(json.dumps({"sources": sources}))
    finish([
        *command, "--config-dir", str(parents / "configs"), "data=two", "data.packing=true", "data.too_long=cut",
        "train.steps=2", "schedule.warmup_steps=0", "train.batch_rows=2", "eval.max_rows=2", "eval.problems=null",
        *starting_from(parents, "sft"), f"runs_dir={parents}", "run=packed",
    ])  # fmt: skip
    assert json.loads((parents / "packed" / "lineage.json").read_text())["finished"]


@pytest.mark.parametrize("stage", ["reward", "dpo"])
@pytest.mark.parametrize("name", PAIRS)
def test_pairs(parents: Path, stage: str, name: str) -> None:
    rows = 4000 if name in LABELLED else 400  # few prompts have two answers
    assert "read as" in train(parents, stage, name, rows)


@pytest.mark.parametrize("name", ["preference/stackexchange", "sft/gsm8k"])
def test_prompts(parents: Path, name: str) -> None:
    assert "read as prompts" in train(parents, "ppo", name)
