"""Checkpoints at a URL: what is there is complete, kept by the same rules, and gives a run back."""

import json
import shutil
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from tests.tiny import COMMANDS

from llmtrain import cli
from llmtrain.config.errors import ConfigError
from llmtrain.config.schema import CheckpointConfig
from llmtrain.engine import checkpoints
from llmtrain.engine.distributed import Layout
from llmtrain.engine.mirror import Mirror
from llmtrain.engine.saving import Saver

ALONE = Layout(rank=0, world=1, device=torch.device("cpu"))


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place."""
    return f"memory://{uuid.uuid4().hex}" if request.param == "memory" else f"file://{tmp_path / 'far'}"


def train(
    folder: Path, url: str, steps: int, *, at_step: Callable[[int, Mirror], None] = lambda step, mirror: None,
    **config: Any,
) -> list[str]:  # fmt: skip
    """A run that saves at every step; what it said."""
    weight, said = torch.zeros(2), []
    keep = CheckpointConfig(**{"every_steps": 1} | config)
    mirror = Mirror(folder, url, keep)
    saver = Saver(
        folder=folder, layout=ALONE, config=keep, steps=steps, state=lambda: {"model.weight": weight},
        extra=lambda step: lambda folder: None, say=said.append, mirror=mirror,
    )  # fmt: skip
    (folder).mkdir(exist_ok=True)
    with saver:
        for step in range(1, steps + 1):
            weight += 1
            (folder / "metrics.jsonl").write_text(f"up to {step}")
            at_step(step, mirror)
            saver.after_step(step, {})
            saver.wait()
            if mirror._pushing:
                mirror._pushing.join()
    return said


def there(url: str) -> dict[str, bool]:
    """The checkpoints at the URL, and whether each is complete."""
    files, root = fsspec.core.url_to_fs(f"{url}/checkpoints")
    names = [str(path).rpartition("/")[2] for path in files.ls(root, detail=False)]
    return {name[-2:]: files.exists(f"{root}/{name}/manifest.json") for name in names}


def test_what_is_kept_there_is_what_is_kept_here(tmp_path: Path, url: str) -> None:
    train(tmp_path / "run", url, 7, keep_last=2, keep_every_steps=3)
    assert there(url) == {"03": True, "06": True, "07": True}


def test_an_empty_folder_gets_the_run_back(tmp_path: Path, url: str) -> None:
    train(tmp_path / "run", url, 3)
    said: list[str] = []
    again = tmp_path / "again"
    Mirror(again, url, CheckpointConfig()).restore(said.append)
    assert sorted(path.name for path in (again / "checkpoints").iterdir()) == ["step-00000003"]
    assert said == [f"{again} begins with step-00000003 of {url}"]
    assert (again / "metrics.jsonl").read_text() == "up to 3"
    assert checkpoints.read_model(again / "checkpoints" / "step-00000003")["weight"].tolist() == [3.0, 3.0]


def test_what_is_damaged_or_not_complete_there_is_passed_over(tmp_path: Path, url: str) -> None:
    train(tmp_path / "run", url, 4, keep_last=9)
    files, root = fsspec.core.url_to_fs(f"{url}/checkpoints")
    files.rm(f"{root}/step-00000004/manifest.json")
    files.pipe_file(f"{root}/step-00000003/state/shard-00001-of-00001.safetensors", b"torn")
    said: list[str] = []
    Mirror(tmp_path / "again", url, CheckpointConfig()).restore(said.append)
    assert "step-00000003 is passed over: state/shard-00001-of-00001.safetensors does not match" in said[0]
    assert [path.name for path in (tmp_path / "again" / "checkpoints").iterdir()] == ["step-00000002"]


def test_nothing_there_is_nothing_to_begin_with(tmp_path: Path, url: str) -> None:
    Mirror(tmp_path / "run", url, CheckpointConfig()).restore(pytest.fail)
    assert not (tmp_path / "run").exists()


def test_a_network_that_is_away_is_told_and_what_is_missing_is_pushed_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, put = f"memory://{uuid.uuid4().hex}", Mirror._put

    def away(step: int, mirror: Mirror) -> None:
        def fail(path: Path, name: str) -> None:
            raise ConnectionError("no route to host")

        mirror._put = fail if step in (2, 3) else put.__get__(mirror)  # type: ignore[method-assign]

    said = train(tmp_path / "run", url, 5, at_step=away, keep_last=9)
    assert said == [
        f"warning: checkpoint.mirror={url}: no route to host. What is missing there is pushed with the next checkpoint."
    ] * 2  # fmt: skip
    assert there(url) == dict.fromkeys(("01", "02", "03", "04", "05"), True)


def test_training_does_not_wait_for_a_slow_network_but_the_end_of_it_does(tmp_path: Path) -> None:
    url, may_go = f"memory://{uuid.uuid4().hex}", threading.Event()
    keep = CheckpointConfig(every_steps=1, keep_last=9)
    mirror = Mirror(tmp_path / "run", url, keep)
    put = mirror._put
    mirror._put = lambda path, name: (may_go.wait(10), put(path, name))[1]  # type: ignore[method-assign]
    weight = torch.zeros(2)
    saver = Saver(
        folder=tmp_path / "run", layout=ALONE, config=keep, steps=4, state=lambda: {"model.weight": weight},
        extra=lambda step: lambda folder: None, say=print, mirror=mirror,
    )  # fmt: skip
    with saver:
        for step in range(1, 5):
            saver.after_step(step, {})
        assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 4
        may_go.set()
    assert there(url) == dict.fromkeys(("01", "02", "03", "04"), True)


def test_a_url_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint.mirror=nosuch://x: .*nosuch"):
        Mirror(tmp_path, "nosuch://x", CheckpointConfig())


@pytest.mark.slow
def test_a_run_goes_on_from_its_mirror_with_the_same_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(root: str, steps: int, *more: str) -> Path:
        where = [f"runs_dir={tmp_path / root}", f"train.steps={steps}", "schedule.name=constant"]
        assert cli.main([*COMMANDS["pretrain"], "schedule.warmup_steps=0", *where, *more]) == 0
        return tmp_path / root / "pretrain"

    mirrored = ["checkpoint.every_steps=2", f"checkpoint.mirror=file://{tmp_path / 'far'}"]
    first = run("first", 4, *mirrored)
    far = tmp_path / "far" / "pretrain"
    # as if it had been ended after step 2, and its machine were gone
    shutil.rmtree(far / "checkpoints" / "step-00000004")
    capsys.readouterr()
    second = run("second", 4, *mirrored)
    errors = capsys.readouterr().err
    assert f"{second} begins with step-00000002 of file://{far}" in errors
    assert f"resuming {second} at step 2 of 4" in errors
    assert [json.loads(line)["step"] for line in (second / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2, 3, 4]
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (first, second)]
    assert weights[0] == weights[1]
