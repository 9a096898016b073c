"""A run whose processes wait for each other for ever is ended, with the stacks of all and the one that is missing.

Every process has a thread that looks at whether its training gets anywhere. Where it has not for too long, it writes
down what all threads are doing; the lowest process that has written waits for the others a little, says who waits where
and who does not, and ends the run. A process that says nothing (it is stopped, or its machine is gone) is killed where
it is on the same machine.

    hang/rank-00000.txt    what the process was doing, and the stacks of its threads
    hang/summary.txt       the message that ended the run
"""

import contextlib
import dataclasses
import faulthandler
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn, Self

from llmtrain.config.errors import UserError
from llmtrain.engine.distributed import Layout, of_every
from llmtrain.engine.launching import tell_launcher

FOLDER = "hang"
# Seconds that the others are waited for, at most: their clocks started within the same collective.
GRACE = 10.0
# Where the innermost frame of a process that waits for others is.
COLLECTIVES, BACKWARD = f"torch{os.sep}distributed{os.sep}", "_engine_run_backward"


@dataclasses.dataclass(frozen=True)
class Report:
    """What one process was doing."""

    rank: int
    doing: str
    """The part of training that it had begun last."""
    where: str
    waits: bool
    """Whether it waits for others, as far as its stack tells."""


class Watchdog:
    """Within, this process is watched; `beat` says that it has got somewhere."""

    def __init__(self, folder: Path, layout: Layout, minutes: float | None) -> None:
        """`folder`: the run's, the same one for all processes. `minutes`: how long nothing may happen; None: for ever.

        Alone, a process waits for no other and is not watched.
        """
        self.folder, self.layout, self.seconds = folder / FOLDER, layout, 60 * (minutes or 0)
        self.is_on = minutes is not None and layout.world > 1
        self._beats, self._doing = 0, "starting"
        self._over = threading.Event()
        self._main = threading.get_ident()
        self._processes: list[tuple[str, int]] = []

    def __enter__(self) -> Self:
        if self.is_on:
            if self.layout.is_main:
                shutil.rmtree(self.folder, ignore_errors=True)
            self._processes = of_every((socket.gethostname(), os.getpid()), self.layout)
            self.beat("starting")
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:  # fmt: skip
        self._over.set()

    def beat(self, doing: str) -> None:
        """Training has got somewhere, and now begins `doing`."""
        self._beats, self._doing = self._beats + 1, doing

    def _watch(self) -> None:
        """Time is counted by waking up: while all are stopped (a suspended job, say) nobody is waited for."""
        period, seen, idle = min(self.seconds / 10, 5.0), 0, 0.0
        while not self._over.wait(period):
            idle = idle + period if self._beats == seen else 0.0
            seen = self._beats
            if idle > self.seconds:
                self._give_up()

    def _give_up(self) -> NoReturn:
        """Write down what this process does; the lowest one that has ends the run, the others wait for that."""
        with contextlib.suppress(OSError):  # a disk that is full, or away: it is ended all the same
            self._write()
        grace = min(GRACE, self.seconds)
        until = time.monotonic() + grace
        while time.monotonic() < until and len(self._reports()) < self.layout.world:
            time.sleep(grace / 50)
        reports = self._reports()
        if not reports or min(each.rank for each in reports) == self.layout.rank:
            message = in_words(reports, self.layout.world, self.seconds, self.folder)
            tell_launcher(UserError(message))
            self._kill_silent({each.rank for each in reports})
            with contextlib.suppress(OSError):
                (self.folder / "summary.txt").write_text(message + "\n")
        else:
            while time.monotonic() < until + grace and not (self.folder / "summary.txt").is_file():
                time.sleep(grace / 50)
        os._exit(1)

    def _write(self) -> None:
        """The report of this process, with the stacks of its threads."""
        frame = sys._current_frames().get(self._main)
        report = Report(self.layout.rank, self._doing, *place(frame))
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"rank-{self.layout.rank:05d}.txt"
        aside = path.with_name(f".{path.name}.partial")
        with aside.open("w", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(report)) + "\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        os.replace(aside, path)

    def _reports(self) -> list[Report]:
        paths = sorted(self.folder.glob("rank-*.txt"))
        return [Report(**json.loads(path.read_text(encoding="utf-8").partition("\n")[0])) for path in paths]

    def _kill_silent(self, told: set[int]) -> None:
        for rank, (host, process) in enumerate(self._processes):
            if rank not in told and host == socket.gethostname():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)


def place(frame: FrameType | None) -> tuple[str, bool]:
    """Where a thread is, in words, and whether it waits for other processes there."""
    stack = traceback.extract_stack(frame) if frame else []
    own = [each for each in stack if f"{os.sep}site-packages{os.sep}" not in each.filename]
    last = own[-1] if own else None
    at = f"{Path(*Path(last.filename).parts[-2:])}:{last.lineno} in {last.name}" if last else "an unknown place"
    if stack and COLLECTIVES in stack[-1].filename:
        collective = next(each.name for each in stack if COLLECTIVES in each.filename and each.name != "wrapper")
        return f"{collective}, called at {at}", True
    if stack and stack[-1].name == BACKWARD:
        return f"the backward pass, called at {at}", True
    return at, False


def in_words(reports: list[Report], world: int, seconds: float, folder: Path) -> str:
    """Who waits where, who does not, and who says nothing."""
    lines: dict[str, list[int]] = {}
    for report in sorted(reports, key=lambda each: (not each.waits, each.rank)):
        kind = "waiting for the others in" if report.waits else "not waiting, but at"
        lines.setdefault(f"{kind} {report.where} ({report.doing})", []).append(report.rank)
    silent = sorted(set(range(world)) - {each.rank for each in reports})
    if silent:
        lines["silent: stopped, or its machine is gone"] = silent
    said = "".join(f"\n  {_ranks(ranks)}: {text}" for text, ranks in lines.items())
    return (
        f"nothing has happened for {seconds / 60:g} minutes (engine.hang_minutes); the run was ended.{said}\n"
        f"The stacks of all threads are in {folder}. The same command goes on from the last checkpoint; if a step "
        "may take so long, raise engine.hang_minutes."
    )


def _ranks(ranks: list[int]) -> str:
    return f"process {ranks[0]}" if len(ranks) == 1 else f"processes {', '.join(map(str, ranks))}"


def nothing_watches(doing: str) -> None:
    """What training tells where nobody watches it."""
