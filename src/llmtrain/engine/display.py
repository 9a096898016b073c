"""What the terminal shows of a run: a live line with a bar, or plain lines where nobody watches."""

import logging
import sys
import time
from collections import deque
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

# A line of a log file every this many seconds at most; evaluations always get theirs.
SECONDS_BETWEEN_LINES = 5.0
# What the shown loss keeps of its past from one row to the next.
LOSS_SMOOTHING = 0.9
# The pace is measured over this many rows, so that the time left follows a change of speed.
ROWS_OF_PACE = 50


class _StandardError(logging.Handler):
    """Log messages as plain lines, on what standard error is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def show_log(is_main: bool) -> None:
    """Show what the parts of llmtrain log: of the main process everything, of the others what went wrong."""
    log = logging.getLogger("llmtrain")
    if not any(isinstance(handler, _StandardError) for handler in log.handlers):
        log.addHandler(_StandardError())
    log.setLevel(logging.INFO if is_main else logging.WARNING)


class Display:
    """One run on standard error: bar, time left, smoothed loss, tokens per second and MFU."""

    def __init__(self, steps: int, console: Console | None = None) -> None:
        """`steps` is the length of the run; `console` is standard error unless told otherwise."""
        self.steps = steps
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._loss, self._loss_weight = 0.0, 0.0
        self._pace: deque[tuple[float, int]] = deque(maxlen=ROWS_OF_PACE)
        self._last_line = float("-inf")

    def start(self, step: int) -> None:
        """The run begins, or goes on, after `step` steps."""
        self._pace.append((time.monotonic(), step))
        if self._console.is_terminal and self.steps:
            columns = BarColumn(bar_width=24), TextColumn("{task.description}")
            # standard output stays untouched: it belongs to what the command prints as its result
            self._bar = Progress(*columns, console=self._console, redirect_stdout=False)
            self._task = self._bar.add_task(f"step {step}/{self.steps}", total=self.steps, completed=step)
            self._bar.start()

    def row(self, step: int, values: Mapping[str, float]) -> None:
        """Show the metrics after `step` steps."""
        self._pace.append((time.monotonic(), step))
        measured = {name: value for name, value in values.items() if name.startswith("eval/")}
        if len(measured) < len(values):
            self._status(step, values)
        if measured:
            parts = [f"{name} {value:.4g}" for name, value in measured.items()]
            self.say(" ".join([f"step {step}/{self.steps}", *parts]))

    def say(self, text: str) -> None:
        """Print a line of its own, above the bar where there is one."""
        self._console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Leave the terminal as it was found."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _status(self, step: int, values: Mapping[str, float]) -> None:
        line = self._line(step, values)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=line)
        elif step == self.steps or time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self.say(line)

    def _line(self, step: int, values: Mapping[str, float]) -> str:
        parts = [f"step {step}/{self.steps}"]
        if "train/loss" in values:
            parts.append(f"loss {self._smooth(values['train/loss']):.4g}")
        if "align/reward" in values:
            parts.append(f"reward {values['align/reward']:.3g}")
        if "align/kl" in values:
            parts.append(f"kl {values['align/kl']:.3g}")
        if "train/learning_rate" in values:
            parts.append(f"lr {values['train/learning_rate']:.1e}")
        if "perf/tokens_per_second" in values:
            parts.append(f"{compact(values['perf/tokens_per_second'])} tok/s")
        if "perf/mfu" in values:
            parts.append(f"MFU {100 * values['perf/mfu']:.0f} %")
        left = self._seconds_left(step)
        return " ".join(parts if left is None else [*parts, f"eta {clock(left)}"])

    def _smooth(self, loss: float) -> float:
        """Exponential average, corrected for having started at zero."""
        self._loss = LOSS_SMOOTHING * self._loss + (1 - LOSS_SMOOTHING) * loss
        self._loss_weight = LOSS_SMOOTHING * self._loss_weight + (1 - LOSS_SMOOTHING)
        return self._loss / self._loss_weight

    def _seconds_left(self, step: int) -> float | None:
        (began, first), (now, _) = self._pace[0], self._pace[-1]
        return (now - began) / (step - first) * (self.steps - step) if step > first else None


def compact(number: float) -> str:
    """A number in at most four digits and a letter: 950, 12.3k, 1.05M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def clock(seconds: float) -> str:
    """A duration as 0:35, 12:05 or 3:07:00."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
