"""Who may write a run's folder: the first, its successor when it is gone, nobody else."""

import errno
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llmtrain.config.errors import UserError
from llmtrain.engine import lock
from llmtrain.engine.lock import RunLock


def owned(folder: Path, silence: float = 0.0, **owner: Any) -> None:
    """A lock that somebody has left or holds, `silence` seconds after the last sign of life."""
    path = folder / ".lock"
    path.write_text(json.dumps(RunLock(folder).owner | owner))
    os.utime(path, (time.time() - silence, time.time() - silence))


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_held_and_given_back(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with RunLock(folder):
        assert left(folder) == [".lock"]
        with pytest.raises(UserError, match=rf"run is in use by .* \(process {os.getpid()}, started 20.*\), last sign"):
            RunLock(folder).__enter__()
        assert left(folder) == [".lock"]
    assert left(folder) == []
    with RunLock(folder):
        pass


def test_file_systems_without_links_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: Path) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    with RunLock(tmp_path), pytest.raises(UserError, match="in use by"):
        RunLock(tmp_path).__enter__()
    owned(tmp_path, pid=os.getpid(), born="1")
    with RunLock(tmp_path):
        pass
    assert left(tmp_path) == []


def test_whoever_was_killed_on_this_machine_is_succeeded_at_once(tmp_path: Path) -> None:
    code = (
        "import os; from pathlib import Path; from llmtrain.engine.lock import RunLock;"
        f"RunLock(Path({str(tmp_path)!r})).__enter__(); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert left(tmp_path) == [".lock"]
    with RunLock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_a_number_that_another_process_has_now_is_not_the_owner(tmp_path: Path) -> None:
    owned(tmp_path, pid=os.getpid(), born="1")
    with RunLock(tmp_path):
        pass


@pytest.mark.parametrize("elsewhere", [{"host": "node7"}, {"processes": "pid:[1]"}])
def test_an_owner_on_another_machine_is_gone_when_it_has_been_silent(tmp_path: Path, elsewhere: dict[str, str]) -> None:
    owned(tmp_path, silence=lock.SILENCE_SECONDS - 30, user="ada", pid=1, **elsewhere)
    with pytest.raises(UserError, match=r"by ada on .*last sign of life 2[67]\d s ago.*free when 300 s have passed"):
        RunLock(tmp_path).__enter__()
    owned(tmp_path, silence=lock.SILENCE_SECONDS + 1, pid=1, **elsewhere)
    with RunLock(tmp_path):
        pass


def test_a_process_that_is_stopped_on_this_machine_is_not_gone(tmp_path: Path) -> None:
    owned(tmp_path, silence=lock.SILENCE_SECONDS + 1)
    with pytest.raises(UserError, match="in use by"):
        RunLock(tmp_path).__enter__()


def test_a_lock_that_cannot_be_read_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("torn")
    with RunLock(tmp_path):
        pass
    assert left(tmp_path) == []


def test_the_owner_shows_that_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.01)
    with RunLock(tmp_path):
        os.utime(tmp_path / ".lock", (0, 0))
        deadline = time.monotonic() + 10
        while (tmp_path / ".lock").stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_who_was_taken_over_ends_at_once(tmp_path: Path) -> None:
    code = (
        "import time; from pathlib import Path; from llmtrain.engine import lock; lock.BEAT_SECONDS = 0.05;"
        f"lock.RunLock(Path({str(tmp_path)!r})).__enter__(); print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    before = json.loads((tmp_path / ".lock").read_text())
    (tmp_path / "theirs").write_text(json.dumps(before | {"token": "theirs", "user": "ada"}))
    os.replace(tmp_path / "theirs", tmp_path / ".lock")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "has been taken over by ada" in errors
    assert json.loads((tmp_path / ".lock").read_text())["token"] == "theirs"


def attempt(folder: Path, ready: Any, results: Any) -> None:
    ready.wait()
    try:
        with RunLock(folder):
            results.put("held")
            time.sleep(0.5)
    except UserError:
        results.put("refused")


def test_of_many_successors_one_gets_it(tmp_path: Path) -> None:
    owned(tmp_path, pid=os.getpid(), born="1")
    context = multiprocessing.get_context("fork")
    ready, results = context.Barrier(6), context.SimpleQueue()
    racing = [context.Process(target=attempt, args=(tmp_path, ready, results)) for _ in range(6)]
    for each in racing:
        each.start()
    for each in racing:
        each.join()
    assert sorted(results.get() for _ in racing) == ["held"] + ["refused"] * 5
    assert left(tmp_path) == []
