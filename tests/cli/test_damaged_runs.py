"""A run folder in which something was lost or written over: said in one message, or passed over, never a traceback."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.tiny import COMMANDS

from llmtrain import cli

PRETRAIN = [
    *COMMANDS["pretrain"], "train.steps=4", "schedule.warmup_steps=0", "checkpoint.every_steps=1",
    "train.micro_batch_rows=auto",
]  # fmt: skip


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs with one that has been stopped after step 2 of 4."""
    folder = tmp_path_factory.mktemp("stopped")
    assert cli.main([*PRETRAIN, "train.stop_after=2", f"runs_dir={folder}", "run=a"]) == 1
    return folder


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    """A copy of that run, to be damaged."""
    shutil.copytree(stopped / "cache", tmp_path / "cache")
    return Path(shutil.copytree(stopped / "a", tmp_path / "a"))


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda run: print(text, file=(run / name).open("w"))


def changed(name: str, **values: object) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        (run / name).write_text(json.dumps(json.loads((run / name).read_text()) | values))

    return change


def folder_for_file(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()


REFUSED: dict[str, tuple[Callable[[Path], None], int, str]] = {
    "no config": (lambda run: (run / "config.yaml").unlink(), 2, "its config.yaml is gone"),
    "an empty config": (write("config.yaml", ""), 2, "its config.yaml is gone"),
    "no lineage": (lambda run: (run / "lineage.json").unlink(), 2, "its lineage.json is gone"),
    "an empty lineage": (write("lineage.json", "{}"), 2, "its lineage.json is gone"),
    "a parent without digest": (
        changed("lineage.json", parents={"model": {"folder": "runs/x"}}), 1,
        "lineage.json: parents.model: expected a folder and its sha256, found {'folder': 'runs/x'}",
    ),
    "micro-batches": (write("micro_batches.json", "xx"), 1, "micro_batches.json cannot be read. Restore it, or remove"),
    "other micro-batches": (write("micro_batches.json", '[{"a": 1}]'), 1, "micro_batches.json cannot be read"),
    "samples": (write("samples.json", "{"), 1, "samples.json: not valid JSON"),
    "a folder for a file": (folder_for_file, 1, "metrics.jsonl: Is a directory"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_run_cannot_go_on_from_is_named_and_left_alone(
    name: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, code, says = REFUSED[name]
    damage(run)
    before = contents(run / "checkpoints")
    assert cli.main([*PRETRAIN, f"runs_dir={run.parent}", "run=a"]) == code
    errors = capsys.readouterr().err
    message = errors[errors.index("error: ") :]
    assert says in message
    assert len(message.splitlines()) == 1
    assert contents(run / "checkpoints") == before
    assert not (run / "model").exists()


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


HARMLESS: dict[str, Callable[[Path], None]] = {
    "a lock without a number": write(".lock", '{"pid": "abc", "host": "here", "started": 0}'),
    "a metric that is no number": write("metrics.jsonl", '{"step": 1, "train/loss": "low"}'),
    "warnings": write("warnings.jsonl", '{"step": 1}\n{"a": "}'),
    "faults": write("faults.jsonl", '{"step": 1}'),
    "a file among checkpoints": write("checkpoints/step-final", "x"),
    "a checkpoint without manifest": lambda run: (run / "checkpoints" / "step-00000003").mkdir(),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_a_run_can_do_without_does_not_end_it(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    HARMLESS[name](run)
    assert cli.main([*PRETRAIN, f"runs_dir={run.parent}", "run=a"]) == 0
    errors = capsys.readouterr().err
    assert "resuming" in errors
    assert "finished: model in" in errors
    assert ("report not written (KeyError" in errors) == (name == "faults")


def test_a_run_is_verified_beside_what_is_no_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints" / "step-final").write_text("x")
    (run / "checkpoints" / "step-00000001" / "manifest.json").write_text("{}")
    capsys.readouterr()
    assert cli.main(["verify", f"run={run}", "step=2"]) == 0
    output, errors = capsys.readouterr()
    assert output.count("the same bits") == 3
    assert errors.count("passed over: ") == 2
    assert cli.main(["verify", f"run={run}", "step=1"]) == 2
    assert "has no checkpoint of step 1; it has 2" in capsys.readouterr().err


def test_a_lineage_of_no_stage_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed("lineage.json", stage="nosuch")(run)
    capsys.readouterr()
    for arguments in (["show", "step=1"], ["verify"]):
        assert cli.main([*arguments, f"run={run}"]) == 2
        assert "lineage.json: stage: expected one of pretrain, sft, reward, align, found 'nosuch'" in (
            capsys.readouterr().err
        )


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("x" * 201, "run: a name of 201 letters: file systems take some 200"),
        ("cache", "run: 'cache' is where the prepared data of all runs is kept"),
        ("cache/a", "run: 'cache/a' is where the prepared data"),
    ],
)
def test_names_that_no_run_may_have(
    name: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    assert cli.main([*PRETRAIN, f"runs_dir={tmp_path}", f"run={name}"]) == 2
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
