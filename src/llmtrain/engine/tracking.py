"""Who is told of a run's metrics: `metrics.jsonl` always, the terminal, and trackers that were asked for.

`metrics.jsonl` holds one row a step, `{"step": s, name: value, ...}`. Rows are keyed by step: a run that goes on from
step s first drops what it had written beyond s, so a step that is done again replaces its row and the file of a run
that was killed ends as that of one that was not.
"""

import importlib.util
import json
import math
import os
import pkgutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from llmtrain.config.errors import ConfigError, UserError
from llmtrain.config.schema import TrackerConfig
from llmtrain.engine.display import Display

METRICS_FILE = "metrics.jsonl"


class Tracker:
    """Metrics of one run; on any process but the main one it does nothing."""

    def __init__(
        self, folder: Path, config: TrackerConfig, *, steps: int, is_main: bool, run: str, run_config: Mapping[str, Any]
    ) -> None:  # fmt: skip
        """`folder` is the run's; `steps` its length; `run_config` is stored by the trackers that store one.

        Raises ConfigError when a tracker that was asked for is not installed or is not a tracker.
        """
        self.folder, self.config, self.run, self.run_config = folder, config, run, run_config
        self.is_main = is_main
        self._display = Display(steps)
        self._file: IO[str] | None = None
        self._trackers: list[Any] = []
        self._makers = _makers(config) if is_main else []

    def start(self, step: int) -> None:
        """Begin, or go on after `step` steps: rows beyond `step` go (at 0: all of them), trackers are opened."""
        if not self.is_main:
            return
        path = self.folder / METRICS_FILE
        _keep_rows(path, step)
        self._file = path.open("a", encoding="utf-8")
        for make in self._makers:
            tracker = self._try(make, self, step)
            if tracker is not None:
                self._trackers.append(tracker)
        self._display.start(step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the row of `step`. A tracker that fails is named once and left out from then on.

        Raises UserError when `metrics.jsonl` cannot be written.
        """
        if self._file is None:
            return
        try:
            self._file.write(_row(step, values))
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"cannot write {self.folder / METRICS_FILE}: {error.strerror}. "
                "Make room and run the same command again."
            ) from error
        for tracker in list(self._trackers):
            finite = {name: value for name, value in values.items() if math.isfinite(value)}
            if self._try(_log, tracker, step, finite) is None:
                self._trackers.remove(tracker)
        self._display.row(step, values)

    def say(self, text: str) -> None:
        """Print a line to standard error."""
        if self.is_main:
            self._display.say(text)

    def close(self) -> None:
        """Finish the trackers and give the terminal back; closing twice does no harm."""
        self._display.close()
        for tracker in self._trackers:
            self._try(tracker.finish)
        self._trackers = []
        if self._file is not None:
            self._file.close()
            self._file = None

    def _try(self, action: Callable[..., Any], *arguments: Any) -> Any:
        """The action's result; None where it failed: a tracker is not worth a run."""
        try:
            return action(*arguments)
        except Exception as error:
            self.say(f"tracker left out: {type(error).__name__}: {error}")
            return None


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl` in the order of steps; none where there is no file.

    A line that is not complete, as a kill or a running writer leaves it, is passed over; null is read as NaN.
    """
    path = folder / METRICS_FILE
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append({name: math.nan if value is None else value for name, value in row.items()})
    return rows


def until_step(rows: list[dict[str, Any]], step: int | None) -> list[dict[str, Any]]:
    """The rows up to the step whose weights a run has ended with (null: the last); later ones are of other weights."""
    return rows if step is None else [row for row in rows if row["step"] <= step]


def _keep_rows(path: Path, step: int) -> None:
    """Drop the rows beyond `step`, which are about to be written again; step 0 measures anew, so it drops all."""
    rows = until_step(read_metrics(path.parent), step) if step else []
    aside = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside.write_text("".join(_row(row.pop("step"), row) for row in rows), encoding="utf-8")
    os.replace(aside, path)


def _row(step: int, values: Mapping[str, float]) -> str:
    """One line of JSON, names sorted; JSON has no NaN and no infinity, so these become null."""
    plain = {name: values[name] if math.isfinite(values[name]) else None for name in sorted(values)}
    return json.dumps({"step": step} | plain, allow_nan=False) + "\n"


def check_trackers(config: TrackerConfig) -> None:
    """Raises ConfigError when a tracker that was asked for is not installed or is not a tracker."""
    _makers(config)


def _makers(config: TrackerConfig) -> list[Callable[[Tracker, int], Any]]:
    """A function for every tracker that was asked for; each opens its tracker when the run starts."""
    makers: list[Callable[[Tracker, int], Any]] = []
    if config.tensorboard:
        if importlib.util.find_spec("tensorboard") is None:
            raise ConfigError(
                "tracker.tensorboard: TensorBoard is not installed. `pip install tensorboard`, or turn it off."
            )
        makers.append(_tensorboard)
    if config.wandb != "disabled":
        makers.append(_wandb)
    if config.target is not None:
        tracker_class = _own_class(config.target)
        makers.append(lambda tracker, step: _own(tracker_class, tracker))
    return makers


def _tensorboard(tracker: Tracker, step: int) -> Any:
    """Event files in `tensorboard/`; events of steps that are done again are marked as gone."""
    from accelerate.tracking import TensorBoardTracker

    opened = TensorBoardTracker("tensorboard", tracker.folder, purge_step=step + 1 if step else 0)
    opened.start()
    if step == 0:
        opened.store_init_configuration(flatten(tracker.run_config))
    return opened


def _wandb(tracker: Tracker, step: int) -> Any:
    """A Weights & Biases run in `wandb/`; going on from a checkpoint goes on with the same run there."""
    offline = tracker.config.wandb == "offline"
    inside = tracker.folder / "wandb"
    inside.mkdir(exist_ok=True)
    names = ["WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"] + ["WANDB_CONFIG_DIR"] * offline
    for name in names:
        os.environ.setdefault(name, str((tracker.folder if name == "WANDB_DIR" else inside).absolute()))
    id_file = inside / "run_id"
    if step == 0 or not id_file.is_file():
        id_file.write_text(uuid.uuid4().hex[:16])
    from accelerate.tracking import WandBTracker

    opened = WandBTracker(
        tracker.config.wandb_project, name=tracker.run, id=id_file.read_text(), resume="allow", dir=str(tracker.folder),
        mode=tracker.config.wandb, config=dict(tracker.run_config), settings={"silent": True, "console": "off"},
    )  # fmt: skip
    opened.start()
    return opened


def _own_class(target: str) -> type:
    """The user's tracker class; raises ConfigError when it cannot be imported or is not one."""
    from accelerate.tracking import GeneralTracker

    try:
        found = pkgutil.resolve_name(target)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"tracker._target_: cannot import {target}: {error}. Name a class as package.module.Class."
        ) from error
    if not (isinstance(found, type) and issubclass(found, GeneralTracker)):
        raise ConfigError(f"tracker._target_: {target} is not a subclass of accelerate.tracking.GeneralTracker.")
    return found


def _own(tracker_class: type, tracker: Tracker) -> Any:
    """Built as accelerate builds it: with the run's name, and with a folder where the class asks for one."""
    place = [str(tracker.folder)] if getattr(tracker_class, "requires_logging_directory", False) else []
    opened = tracker_class(tracker.run, *place)
    opened.start()
    opened.store_init_configuration(flatten(tracker.run_config))
    return opened


def _log(tracker: Any, step: int, values: dict[str, float]) -> bool:
    tracker.log(values, step=step)
    return True


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Nested settings as one level with dotted names, in types that every tracker and table takes."""
    flat: dict[str, bool | int | float | str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
