"""llmtrain verify: what is whole passes, what is damaged is named, and the exit code says which."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import COMMANDS

from llmtrain import cli


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run."""
    folder = tmp_path_factory.mktemp("runs")
    assert cli.main([*COMMANDS["pretrain"], "train.steps=2", "schedule.warmup_steps=0", f"runs_dir={folder}"]) == 0
    return folder / "pretrain"


@pytest.fixture
def checkpoint(run: Path, tmp_path: Path) -> Path:
    """A copy of its checkpoint."""
    return Path(shutil.copytree(run / "checkpoints" / "step-00000002", tmp_path / "step-00000002"))


def ask(capsys: pytest.CaptureFixture[str], *overrides: str) -> tuple[int, list[str], str]:
    """Exit code, lines of output, errors."""
    capsys.readouterr()
    code = cli.main(["verify", *overrides])
    output, errors = capsys.readouterr()
    return code, output.splitlines(), errors


def damaged(capsys: pytest.CaptureFixture[str], folder: Path, *what: str) -> dict[str, str]:
    """The lines that failed, which must be these, by their first word."""
    code, lines, errors = ask(capsys, f"checkpoint={folder}")
    assert code == 1
    assert errors.startswith(f"error: {folder} is damaged ({', '.join(what)}). Go on from another one")
    failed = {line.split()[0]: line for line in lines if "FAILED" in line}
    assert tuple(failed) == what
    return failed


def seal(checkpoint: Path) -> None:
    """Let the manifest say that its files are as they should be."""
    from llmtrain.engine import checkpoints

    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["sha256"] = {name: checkpoints._sha256(checkpoint / name) for name in manifest["sha256"]}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def shard(checkpoint: Path) -> Path:
    [path] = (checkpoint / "state").iterdir()
    return path


@pytest.mark.parametrize("which", ["checkpoint", "run", "newest", "model"])
def test_what_is_whole_passes(which: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = {"checkpoint": run / "checkpoints" / "step-00000002", "run": run, "model": run / "model"}
    code, lines, errors = ask(
        capsys, f"checkpoint={named[which]}" if which in named else f"runs_dir={run.parent}"
    )  # fmt: skip
    assert code == 0
    assert all(line.endswith(" pass") for line in lines[1:])
    words = [line.split()[0] for line in lines[1:]]
    if which == "model":
        assert words == ["weights", "shapes"]
    else:
        assert lines[0] == str(named["checkpoint"])
        assert words == ["files", "weights", "moments", "shapes"]
    assert "float32" in lines[-2]
    assert "decoder, 2 x 32, vocabulary 300" in lines[-1]
    assert ("taking the newest" in errors) == (which == "newest")


def test_a_flipped_bit_is_named(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray(shard(checkpoint).read_bytes())
    data[-3] ^= 1
    shard(checkpoint).write_bytes(data)
    assert "does not match its digest" in damaged(capsys, checkpoint, "files")["files"]


def test_a_value_that_is_not_finite_is_named(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = load_file(shard(checkpoint))
    name = next(name for name in state if name.endswith("exp_avg"))
    state[name].view(-1)[0] = math.nan
    save_file(state, shard(checkpoint))
    seal(checkpoint)
    assert f"not finite: {name}" in damaged(capsys, checkpoint, "moments")["moments"]


def test_another_shape_is_named(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = load_file(shard(checkpoint))
    name = next(name for name in state if name.startswith("model.") and state[name].dim() == 2)
    state[name] = torch.zeros(3, 5)
    save_file(state, shard(checkpoint))
    seal(checkpoint)
    assert "is [3, 5], expected" in damaged(capsys, checkpoint, "shapes")["shapes"]


def test_a_file_that_is_cut_off_is_named_by_all_who_read_it(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard(checkpoint).write_bytes(shard(checkpoint).read_bytes()[:-100])
    damaged(capsys, checkpoint, "files", "tensors", "shapes")


def test_where_there_is_none_it_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, errors = ask(capsys, f"runs_dir={tmp_path}")
    assert (code, errors) == (2, f"error: checkpoint: no checkpoint in {tmp_path}. Name a folder: checkpoint=FOLDER.\n")
    code, _, errors = ask(capsys, f"checkpoint={tmp_path / 'gone'}")
    assert code == 2
    assert "checkpoint: no such file or folder" in errors
