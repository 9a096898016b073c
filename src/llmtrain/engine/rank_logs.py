"""What each of several processes writes on standard output and standard error, kept in a file of its own.

A launcher mixes what its processes say, and a run that ended in the night is best understood by what each of them said
last. The file also gets the stack of every thread where the process ends in a crash, such as a segmentation fault.
"""

import contextlib
import faulthandler
import sys
from pathlib import Path
from typing import IO, Any, TextIO

FOLDER = "logs"
ESCAPE = "\x1b"


class Copied:
    """A stream whose text also goes into a log; what a terminal redraws again and again stays out of it."""

    def __init__(self, stream: TextIO, log: IO[str]) -> None:
        self._stream, self._log = stream, log

    def write(self, text: str) -> int:
        """Write to both."""
        written = self._stream.write(text)
        if ESCAPE not in text:
            self.note(text)
        return written

    def note(self, text: str) -> None:
        """Write to the log alone."""
        with contextlib.suppress(OSError, ValueError):  # a full disk ends no run for its log; closed at exit
            self._log.write(text)
            self._log.flush()

    def writelines(self, lines: Any) -> None:
        """Write each of them to both."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def keep_log(folder: Path, rank: int, world: int) -> None:
    """From here on, what this process says goes into `logs/rank-N.log` of the run's folder too.

    A run that goes on adds to it. Alone, a process needs none.
    """
    if world == 1 or isinstance(sys.stderr, Copied):
        return
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    log = (folder / FOLDER / f"rank-{rank}.log").open("a", encoding="utf-8", errors="replace")
    faulthandler.enable(log)
    sys.stdout, sys.stderr = Copied(sys.stdout, log), Copied(sys.stderr, log)


def note(text: str) -> None:
    """Write to this process's log alone, where it keeps one."""
    if isinstance(sys.stderr, Copied):
        sys.stderr.note(f"{text}\n")
