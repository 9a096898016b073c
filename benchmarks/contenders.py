"""Contenders in processes of their own that take turns: a few steps each, round after round, in turning order."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any


def turns() -> Iterator[None]:
    """In a contender, one item per step; between turns it reports the seconds of each step and waits."""
    print(json.dumps({"ready": True}), flush=True)
    while steps := int(sys.stdin.readline() or 0):  # 0 or nothing: the end
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            yield
            seconds.append(time.perf_counter() - start)
        print(json.dumps(seconds), flush=True)


class Contender:
    """The same script, started as one contender."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def turn(self, steps: int) -> list[float]:
        """Lets it do so many steps; the seconds of each."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        seconds: list[float] = self._answer()
        return seconds

    def end(self) -> None:
        """Ends it."""
        self.process.kill()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            if line.startswith(("[", "{")):
                return json.loads(line)
        raise SystemExit("a contender ended early; its error is above")
