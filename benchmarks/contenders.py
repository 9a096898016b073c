"""What comparisons share: contenders in processes of their own that take turns, ratios over rounds, the report.

A turn is a few steps; contenders take turns round after round, in turning order.
"""

import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def turns(wait: Callable[[], object] = int) -> Iterator[None]:
    """In a contender, one item per step; between turns it reports the seconds of each step and waits for the next.

    `wait` returns when a step's work is done, where a device does it apart.
    """
    print(json.dumps({"ready": True}), flush=True)
    while steps := int(sys.stdin.readline() or 0):  # 0 or nothing: the end
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            yield
            wait()
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


def ratios(above: Sequence[float], below: Sequence[float], digits: int) -> dict[str, float]:
    """The ratio in each round: median, lowest and highest."""
    found = sorted(one / other for one, other in zip(above, below, strict=True))
    shown = {"median": statistics.median(found), "low": found[0], "high": found[-1]}
    return {name: round(value, digits) for name, value in shown.items()}


def report(result: Mapping[str, Any], output: Path | None, *libraries: str) -> None:
    """Prints a result with the versions of torch and of these libraries and the machine; appends it to `output`."""
    import torch

    result = {
        **result,
        "torch": torch.__version__,
        **{library: importlib.metadata.version(library) for library in libraries},
        "cpus": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
    }
    print(json.dumps(result, indent=1))
    if output:
        with output.open("a") as file:
            file.write(json.dumps(result) + "\n")
