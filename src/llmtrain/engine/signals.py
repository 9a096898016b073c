"""What a scheduler tells a run: SIGTERM, it will be ended soon; SIGUSR1, save now."""

import signal
import threading
from types import FrameType
from typing import Any


class Signals:
    """Takes note of SIGTERM and SIGUSR1 while it is open, in the main thread; the step that is under way is finished.

    SIGTERM asks to save and end: it comes before a node is taken away, and with `scancel` and `kill`. SIGUSR1 asks to
    save and go on: SLURM's `--signal=USR1@120` sends it some time before the limit, which the run may well use.
    """

    def __init__(self) -> None:
        self.stop = False
        self.save = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._note)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            self.stop = True
        else:
            self.save = True
