"""Saving while training goes on: the bits of the step, what happens when it fails, and what a scheduler asks for."""

import contextlib
import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.config.errors import Preempted, UserError
from llmtrain.config.schema import CheckpointConfig
from llmtrain.engine import checkpoints, distributed, launching, snapshots
from llmtrain.engine.distributed import Layout
from llmtrain.engine.saving import Saver

ALONE = Layout(rank=0, world=1, device=torch.device("cpu"))


class Run:
    """A run whose only weight is its step number."""

    def __init__(self, folder: Path, *, steps: int = 6, layout: Layout = ALONE, **config: Any) -> None:
        self.weight, self.said, self.seconds = torch.zeros(2), [], 0.0
        self.saver = Saver(
            folder=folder, layout=layout, config=CheckpointConfig(**{"keep_last": 99} | config), steps=steps,
            state=lambda: {"model.weight": self.weight}, extra=lambda step: lambda folder: None, say=self.said.append,
            phase=self.timed,
        )  # fmt: skip

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds up the time for saving."""
        assert phase == "saving"
        began = time.monotonic()
        yield
        self.seconds += time.monotonic() - began

    def train(self, at_step: Callable[[int], None] = lambda step: None) -> None:
        """Train to the end; `at_step` is called when a step counts."""
        with self.saver:
            for step in range(1, self.saver.steps + 1):
                self.weight += 1
                self.saver.before_counting(step)
                at_step(step)
                self.saver.after_step(step, {})


def saved(folder: Path) -> dict[int, float]:
    """The weight in each checkpoint, by step; each of them is good."""
    found = {}
    for path in sorted((folder / "checkpoints").glob("step-*")):
        assert checkpoints.inspect(path) is None
        weight = checkpoints.read_model(path)["weight"]
        assert weight[0] == weight[1]
        found[int(path.name[5:])] = float(weight[0])
    return found


def failing(monkeypatch: pytest.MonkeyPatch, *faults: OSError | None) -> None:
    """The n-th file that is written fails with the n-th fault, if there is one."""
    write, left = snapshots.write, list(faults)

    def attempt(path: Path, pieces: list[snapshots.Piece]) -> str:
        if left and (fault := left.pop(0)):
            path.write_bytes(b"half of")
            raise fault
        return write(path, pieces)

    monkeypatch.setattr(snapshots, "write", attempt)


FULL = OSError(errno.ENOSPC, "No space left on device")
READ_ONLY = OSError(errno.EROFS, "Read-only file system")


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_is_saved_is_the_state_of_the_step(tmp_path: Path, asynchronous: bool) -> None:
    Run(tmp_path, every_steps=2, asynchronous=asynchronous).train()
    assert saved(tmp_path) == {2: 2.0, 4: 4.0, 6: 6.0}


def test_training_goes_on_while_a_checkpoint_is_written_and_the_next_one_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, may_write, seen = snapshots.write, threading.Event(), []

    def slow(path: Path, pieces: list[snapshots.Piece]) -> str:
        assert may_write.wait(10)
        return write(path, pieces)

    def at_step(step: int) -> None:
        seen.append((step, sorted(saved(tmp_path))))
        if step == 4:
            threading.Timer(0.1, may_write.set).start()

    monkeypatch.setattr(snapshots, "write", slow)
    run = Run(tmp_path, every_steps=2, max_lost_steps=4, steps=5)
    run.train(at_step)
    assert seen == [(1, []), (2, []), (3, []), (4, []), (5, seen[-1][1])]
    assert 2 in seen[-1][1], "the save at step 4 has waited for that at step 2"
    assert run.seconds >= 0.05
    assert saved(tmp_path) == {2: 2.0, 4: 4.0, 5: 5.0}


@pytest.mark.parametrize("most", [2, 3, None])
def test_no_more_steps_are_at_risk_than_may_be_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int | None
) -> None:
    write, at_risk = snapshots.write, []

    def slow(path: Path, pieces: list[snapshots.Piece]) -> str:
        time.sleep(0.1)
        return write(path, pieces)

    monkeypatch.setattr(snapshots, "write", slow)
    run = Run(tmp_path, every_steps=2, max_lost_steps=most)
    run.train(lambda step: at_risk.append(step - max(saved(tmp_path), default=0)))
    assert max(at_risk) == (most or 2), "training goes on beside the file as long as it may"
    assert saved(tmp_path) == {2: 2.0, 4: 4.0, 6: 6.0}


def test_a_full_disk_makes_nobody_wait_for_what_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, None, FULL)
    run = Run(tmp_path, every_steps=2)
    run.train()
    assert saved(tmp_path) == {2: 2.0, 6: 6.0}
    assert len(run.said) == 1


def test_a_failure_is_told_at_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, None, READ_ONLY)
    run, reached = Run(tmp_path, every_steps=2, max_lost_steps=4), []

    def at_step(step: int) -> None:
        reached.append(step)
        if run.saver._writing is not None:
            run.saver._writing.join()

    with pytest.raises(UserError, match=r"could not save step 4 to .*step-00000004: .*Read-only.*same command again"):
        run.train(at_step)
    assert reached == [1, 2, 3, 4, 5]
    assert saved(tmp_path) == {2: 2.0}
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_full_disk_pauses_saving_and_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, None, FULL, FULL)
    run, counts = Run(tmp_path, every_steps=1, steps=5), []
    run.train(lambda step: counts.append(run.saver.values().get("perf/failed_saves")))
    assert saved(tmp_path) == {1: 1.0, 4: 4.0, 5: 5.0}
    assert len(run.said) == 2
    assert "could not save step 2" in run.said[0]
    assert "training goes on" in run.said[0]
    assert 2.0 in counts
    assert run.saver.failed_saves == 0


def test_what_cannot_be_saved_at_the_end_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, None, FULL)
    with pytest.raises(UserError, match=r"could not save step 4.*No space left.*make room .*same command again"):
        Run(tmp_path, every_steps=2, steps=4).train()
    assert saved(tmp_path) == {2: 2.0}


def test_what_belongs_to_a_checkpoint_is_part_of_its_success(tmp_path: Path) -> None:
    run = Run(tmp_path, steps=2)
    run.saver.extra = lambda step: lambda folder: (_ for _ in ()).throw(FULL)
    with pytest.raises(UserError, match="could not save step 2"):
        run.train()
    run.saver.extra = lambda step: lambda folder: (folder / "extra.json").write_text(str(step)) and None
    run.train()
    assert "extra.json" in (tmp_path / "checkpoints" / "step-00000002" / "manifest.json").read_text()


def test_weights_that_are_not_finite_are_not_saved_and_evict_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path, every_steps=1, keep_last=1)
    with pytest.raises(UserError, match=r"step 3: the weights are not finite any more \(model.weight\)"):
        run.train(lambda step: run.weight.fill_(float("nan")) if step == 3 else None)
    assert list(saved(tmp_path)) == [2]


def test_a_checkpoint_is_completed_however_training_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = snapshots.write
    monkeypatch.setattr(snapshots, "write", lambda path, pieces: (time.sleep(0.1), write(path, pieces))[1])
    for number, ending in enumerate((KeyboardInterrupt, ZeroDivisionError)):

        def end(step: int, ending: type[BaseException] = ending) -> None:
            if step == 3:
                raise ending

        with pytest.raises(ending):
            Run(tmp_path / str(number), every_steps=2).train(end)
        assert saved(tmp_path / str(number)) == {2: 2.0}


# --- signals ---


def test_sigterm_saves_after_the_step_and_ends_the_run(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match=r"stopped by SIGTERM after step 3 of 6; its checkpoint is complete") as raised:
        Run(tmp_path).train(lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 3 else None)
    assert raised.value.exit_code == 128 + signal.SIGTERM
    assert saved(tmp_path) == {3: 3.0}
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_at_the_last_step_lets_the_run_finish(tmp_path: Path) -> None:
    Run(tmp_path).train(lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 6 else None)
    assert saved(tmp_path) == {6: 6.0}


def test_sigterm_without_room_says_that_nothing_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, FULL)
    with pytest.raises(UserError, match="could not save step 3"):
        Run(tmp_path).train(lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 3 else None)


def test_sigusr1_saves_and_training_goes_on(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    Run(tmp_path).train(lambda step: os.kill(os.getpid(), signal.SIGUSR1) if step in (2, 3) else None)
    assert saved(tmp_path) == {2: 2.0, 3: 3.0, 6: 6.0}
    assert signal.getsignal(signal.SIGUSR1) is before


def test_another_thread_leaves_the_signals_alone(tmp_path: Path) -> None:
    thread = threading.Thread(target=Run(tmp_path).train)
    thread.start()
    thread.join()
    assert saved(tmp_path) == {6: 6.0}


# --- several processes ---


def pieces_of(rank: int, world: int, monkeypatch: pytest.MonkeyPatch, states: list[dict[str, Tensor]]) -> set[str]:
    listed = [[(name, (0,), value.nbytes) for name, value in state.items()] for state in states]
    monkeypatch.setattr(snapshots, "of_every", lambda values, layout: listed)
    taken = snapshots.Snapshots(Layout(rank, world, torch.device("cpu")), aside=False).take(states[rank])
    return {piece.name for piece in taken}


def test_replicas_are_written_once_and_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    same = {"large": torch.zeros(100), "b": torch.zeros(60), "c": torch.zeros(50), "d": torch.zeros(1)}
    own = [same, same, {"other": torch.zeros(500)}]
    written = [pieces_of(rank, 3, monkeypatch, own) for rank in range(3)]
    assert written == [{"large", "d"}, {"b", "c"}, {"other"}]


def two(folder: Path) -> None:
    """What each of two processes checks."""
    layout = distributed.join("cpu", threads=1)
    first = layout.rank == 0

    run = Run(folder / "term", layout=layout, every_steps=2)
    with pytest.raises(Preempted, match="after step 3 of 6"):
        run.train(lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 3 and not first else None)
    distributed.barrier(layout)
    assert saved(folder / "term") == {2: 2.0, 3: 3.0}

    Run(folder / "usr1", layout=layout).train(
        lambda step: os.kill(os.getpid(), signal.SIGUSR1) if step == 2 and not first else None
    )
    distributed.barrier(layout)
    assert saved(folder / "usr1") == {2: 2.0, 6: 6.0}

    # one of the two has no room, at its first save
    write, left = snapshots.write, [] if first else [FULL]

    def attempt(path: Path, pieces: list[snapshots.Piece]) -> str:
        if left:
            raise left.pop()
        return write(path, pieces)

    snapshots.write = attempt
    run = Run(folder / "full", layout=layout, every_steps=2, steps=4)
    run.train()
    distributed.barrier(layout)
    assert saved(folder / "full") == {4: 4.0}
    assert ["could not save step 2" in text for text in run.said] == [True]
    left = [] if first else [READ_ONLY]
    with pytest.raises(UserError, match=r"could not save step 2 .*Read-only"):
        Run(folder / "read-only", layout=layout, every_steps=2, steps=3).train()
    (folder / f"done-{layout.rank}").touch()


def test_two_processes_save_at_the_same_step_whoever_is_told(tmp_path: Path) -> None:
    launching.launch(two, (tmp_path,), 2)
    assert {path.name for path in tmp_path.glob("done-*")} == {"done-0", "done-1"}
