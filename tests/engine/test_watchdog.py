"""Processes that wait for one that does not come: the run ends, and says who waits and who does not."""

import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest
import torch

from llmtrain.config.errors import UserError
from llmtrain.engine.distributed import Layout, join, leave, total
from llmtrain.engine.launching import launch
from llmtrain.engine.watchdog import Report, Watchdog, in_words, place


def hang(folder: Path, how: str) -> None:
    """Process 1 does not come to the second collective."""
    layout = join("cpu", threads=1)
    with Watchdog(folder, layout, 1.5 / 60) as watchdog:
        watchdog.beat("step 1")
        total(torch.ones(1), layout)
        watchdog.beat("step 2")
        if layout.rank == 1 and how == "sleep":
            time.sleep(1000)
        if layout.rank == 1 and how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        total(torch.ones(1), layout)
    leave()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("sleep", r"process 1: not waiting, but at engine/test_watchdog\.py:\d+ in hang \(step 2\)"),
        ("stop", r"process 1: silent: stopped, or its machine is gone"),
    ],
)
def test_a_process_that_does_not_come_ends_the_run_within_seconds(tmp_path: Path, how: str, said: str) -> None:
    waits = r"process 0: waiting for the others in all_reduce, called at engine/distributed\.py:\d+ in total \(step 2\)"
    with pytest.raises(UserError, match=rf"nothing has happened for 0\.025 minutes.*\n  {waits}\n  {said}\n"):
        launch(hang, (tmp_path, how), 2)
    stacks = (tmp_path / "hang" / "rank-00000.txt").read_text()
    assert "all_reduce" in stacks
    assert "watchdog" in stacks, "all threads"
    assert (tmp_path / "hang" / "rank-00001.txt").is_file() == (how == "sleep")
    assert "process 1" in (tmp_path / "hang" / "summary.txt").read_text()


def test_alone_or_without_a_limit_nothing_is_watched(tmp_path: Path) -> None:
    before = threading.active_count()
    for world, minutes in ((1, 1e-9), (2, None)):
        with Watchdog(tmp_path, Layout(0, world, torch.device("cpu")), minutes):
            assert threading.active_count() == before
            time.sleep(0.01)
    assert not (tmp_path / "hang").exists()


def test_those_that_do_the_same_are_named_together() -> None:
    reports = [Report(0, "step 3", "barrier", True), Report(2, "step 3", "barrier", True), Report(1, "a", "b", False)]
    text = in_words(reports, 5, 600.0, Path("runs/x/hang"))
    assert "for 10 minutes" in text
    lines = [line.strip() for line in text.split("\n")[1:4]]
    assert lines == [
        "processes 0, 2: waiting for the others in barrier (step 3)", "process 1: not waiting, but at b (a)",
        "processes 3, 4: silent: stopped, or its machine is gone",
    ]  # fmt: skip


def test_a_place_is_that_of_our_own_code() -> None:
    where, waits = place(sys._getframe())
    assert where.startswith("engine/test_watchdog.py:")
    assert where.endswith(" in test_a_place_is_that_of_our_own_code")
    assert not waits


def test_who_waits_is_told_by_the_innermost_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    def at(*innermost: tuple[str, str]) -> tuple[str, bool]:
        frames = [("/src/llmtrain/engine/steps.py", "_add_gradient"), *innermost]
        stack = [traceback.FrameSummary(file, 7, name) for file, name in frames]
        monkeypatch.setattr(traceback, "extract_stack", lambda frame: stack)
        return place(sys._getframe())

    torch_at = "/env/site-packages/torch"
    logged = (f"{torch_at}/distributed/c10d_logger.py", "wrapper")
    collective = (f"{torch_at}/distributed/distributed_c10d.py", "all_reduce")
    backward = (f"{torch_at}/autograd/graph.py", "_engine_run_backward")
    assert at(logged, collective) == ("all_reduce, called at engine/steps.py:7 in _add_gradient", True)
    assert at(backward) == ("the backward pass, called at engine/steps.py:7 in _add_gradient", True)
    assert at(backward, ("/src/llmtrain/kernels/elementwise.py", "backward")) == (
        "kernels/elementwise.py:7 in backward",
        False,
    )
    assert at() == ("engine/steps.py:7 in _add_gradient", False)
