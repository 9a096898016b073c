"""llmtrain verify: what is whole passes, what is damaged is named, and the exit code says which."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
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
        assert words == ["files", "weights", "moments", "state", "shapes"]
    assert "float32" in lines[1 + words.index("weights")]
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


# --- a run trained again ---


@pytest.fixture(scope="module")
def repeatable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run with two checkpoints, dropout, and as many rows at once as memory suffices for."""
    folder = tmp_path_factory.mktemp("repeatable")
    more = ["model.dropout=0.1", "checkpoint.every_steps=2", "train.micro_batch_rows=auto", "health.on_spike=skip"]
    command = [*COMMANDS["pretrain"], *more, "train.steps=4", "schedule.warmup_steps=0", f"runs_dir={folder}"]
    assert cli.main(command) == 0
    return folder / "pretrain"


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*") if path.is_file()
    }  # fmt: skip


def test_steps_that_are_trained_again_give_the_same_bits_and_touch_nothing(
    repeatable: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(repeatable)
    assert json.loads((repeatable / "micro_batches.json").read_text())[0]["step"] == 0
    code, lines, _ = ask(capsys, "run=pretrain", f"runs_dir={repeatable.parent}")
    assert code == 0
    assert lines[0] == f"{repeatable}: training steps 3 to 4 again"
    assert [line.split()[0] for line in lines[1:]] == ["weights", "moments", "state"]
    assert all(line.endswith("the same bits") for line in lines[1:])
    assert contents(repeatable) == before


def test_a_step_without_a_checkpoint_before_is_trained_again_from_the_start(
    repeatable: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines, _ = ask(capsys, f"run={repeatable}", "step=2")
    assert (code, lines[0]) == (0, f"{repeatable}: training steps 1 to 2 again")


def test_a_bit_that_is_not_the_same_is_named_with_its_size(
    repeatable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "pretrain"
    shutil.copytree(repeatable, copy)
    shutil.copytree(repeatable.parent / "cache", tmp_path / "cache")
    newest = copy / "checkpoints" / "step-00000004"
    state = load_file(shard(newest))
    metadata = safe_open(shard(newest), framework="pt").metadata()
    name = next(name for name in state if name.startswith("model.") and name.endswith("weight"))
    value = state[name].flatten()[0].item()
    state[name].view(-1)[0] = torch.nextafter(torch.tensor(value), torch.tensor(math.inf))
    save_file(state, shard(newest), metadata=metadata)
    seal(newest)
    code, lines, errors = ask(capsys, f"run={copy}", "step=4")
    assert code == 1
    [failed] = [line for line in lines if "FAILED" in line]
    apart = abs(state[name].view(-1)[0].double().item() - value)
    assert failed.startswith("weights")
    assert failed.endswith(f"FAILED: 1 differ, most by {apart:.3g} ({name})")
    assert f"{copy}, step 4: trained again, it has other bits (weights)." in errors


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["run=REPEATABLE", "step=3"], "step: REPEATABLE has no checkpoint of step 3; it has 2, 4"),
        (["run=nowhere"], "run=nowhere: no run in nowhere or runs/nowhere"),
        (["step=3"], "step: has no effect: name the run that is meant: run=NAME"),
        (["run=REPEATABLE", "checkpoint=REPEATABLE"], "checkpoint: has no effect: a run is verified"),
    ],
)
def test_what_cannot_be_trained_again_is_refused(
    repeatable: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], says: str
) -> None:
    code, _, errors = ask(capsys, *(each.replace("REPEATABLE", str(repeatable)) for each in overrides))
    assert code == 2
    assert says.replace("REPEATABLE", str(repeatable)) in errors


def test_a_run_stops_where_it_is_told_to_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*COMMANDS["pretrain"], "train.steps=4", "schedule.warmup_steps=0", f"runs_dir={tmp_path}"]
    assert cli.main([*command, "train.stop_after=3"]) == 1
    assert "error: stopped after step 3 of 4, as train.stop_after says; its checkpoint" in capsys.readouterr().err
    assert cli.main([*command, "train.stop_after=2"]) == 1
    assert "stopped after step 3" in capsys.readouterr().err, "it is beyond that already"
    assert cli.main(command) == 0
    assert "resuming" in capsys.readouterr().err
