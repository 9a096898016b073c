"""Who is told of a run's metrics: `metrics.jsonl` always, the terminal, and trackers that were asked for.

`metrics.jsonl` holds one row a step, `{"step": s, name: value, ...}`; `rollouts.jsonl` one row for each of some answers
of some steps, where a run samples any; `faults.jsonl` one for each update that something was wrong with. Rows are keyed
by step: a run that goes on from step s first drops what it had written beyond s, so a step that is done again replaces
its rows and the files of a run that was killed end as those of one that was not.
"""

import html
import importlib.util
import json
import math
import os
import pkgutil
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmtrain.config.errors import ConfigError, UserError
from llmtrain.config.schema import TrackerConfig
from llmtrain.engine.display import Display
from llmtrain.engine.row_files import RowFile

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "rollouts.jsonl"
FAULTS_FILE = "faults.jsonl"
# Seconds that the end of a run waits for a server that is away; what it has not got by then stays in the run's folder.
WANDB_PATIENCE = 300.0


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
        self._files: dict[str, RowFile] = {}
        self._trackers: list[Any] = []
        self._makers = _makers(config) if is_main else {}

    def start(self, step: int) -> None:
        """Begin, or go on after `step` steps: rows beyond `step` go (at 0: all of them), trackers are opened."""
        if not self.is_main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (METRICS_FILE, SAMPLES_FILE, FAULTS_FILE):
            _keep_rows(self.folder / name, step)
        self._files = {name: RowFile(self.folder / name) for name in (METRICS_FILE, SAMPLES_FILE, FAULTS_FILE)}
        for name, make in self._makers.items():
            tracker = self._try(name, make, self, step)
            if tracker is not None:
                self._trackers.append(tracker)
        self._display.start(step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the row of `step`. A tracker that fails is named once and left out from then on.

        Raises UserError when `metrics.jsonl` cannot be written; while the disk is full, its rows wait.
        """
        if not self._files:
            return
        self._add(METRICS_FILE, [{"step": step} | {name: values[name] for name in sorted(values)}])
        self._tell(_log, step, {name: value for name, value in values.items() if math.isfinite(value)})
        self._display.row(step, values)

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Write samples of `step`, each a row of a table, all with the same columns; trackers get them as a table.

        Raises UserError when `rollouts.jsonl` cannot be written; while the disk is full, its rows wait.
        """
        if not self._files or not samples:
            return
        rows = [{"step": step} | dict(sample) for sample in samples]
        self._add(SAMPLES_FILE, rows)
        self._tell(_log_table, step, rows)

    def log_fault(self, step: int, row: Mapping[str, Any]) -> None:
        """Write what was wrong with an update of `step`. Raises UserError when `faults.jsonl` cannot be written."""
        if self._files:
            self._add(FAULTS_FILE, [{"step": step} | dict(row)])

    def _add(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        try:
            self._files[name].add(map(_line, rows))
        except OSError as error:
            raise UserError(
                f"cannot write {self.folder / name}: {error.strerror}. Mend that and run the same command again."
            ) from error

    def _tell(self, action: Callable[[Any, int, Any], bool], step: int, what: Any) -> None:
        """Tell every tracker; one that fails is left out."""
        for tracker in list(self._trackers):
            if self._try(tracker.name, action, tracker, step, what) is None:
                self._trackers.remove(tracker)

    def say(self, text: str) -> None:
        """Print a line to standard error."""
        if self.is_main:
            self._display.say(text)

    def close(self) -> None:
        """Finish the trackers and give the terminal back; closing twice does no harm."""
        self._display.close()
        for tracker in self._trackers:
            self._try(tracker.name, tracker.finish)
        self._trackers = []
        for name, file in self._files.items():
            if file.waiting:
                self.say(f"warning: the disk is full: {len(file.waiting)} rows of {self.folder / name} are lost")
        self._files = {}

    def _try(self, name: str, action: Callable[..., Any], *arguments: Any) -> Any:
        """The action's result; None where it failed, even by asking to exit: a tracker is not worth a run."""
        try:
            return action(*arguments)
        except (Exception, SystemExit) as error:
            said = f"{type(error).__name__}: {error}".strip()
            self.say(f"tracker {name} left out from here on ({said}). Training goes on; {METRICS_FILE} has every row.")
            return None


Number = int | float


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl` in the order of steps; none where there is no file.

    Null is read as NaN, and what is no number not at all.
    """
    rows = read_rows(folder / METRICS_FILE)
    return [
        {name: math.nan if value is None else value for name, value in row.items() if isinstance(value, Number | None)}
        for row in rows
    ]


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's `rollouts.jsonl` in the order of steps; none where there is no file."""
    return read_rows(folder / SAMPLES_FILE)


def read_faults(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's `faults.jsonl` in the order of steps; none where there is no file."""
    return read_rows(folder / FAULTS_FILE)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that have a step; a line cut short by a kill, or not yet whole, is passed over."""
    rows = []
    # not splitlines: JSON may hold other separators of lines, such as U+2028, as they are
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def until_step(rows: list[dict[str, Any]], step: int | None) -> list[dict[str, Any]]:
    """The rows up to the step whose weights a run has ended with (null: the last); later ones are of other weights."""
    return rows if step is None else [row for row in rows if row["step"] <= step]


def _keep_rows(path: Path, step: int) -> None:
    """Drop the rows beyond `step`, which are about to be written again; step 0 measures anew, so it drops all."""
    rows = until_step(read_rows(path), step) if step else []
    if not rows:
        path.unlink(missing_ok=True)
        return
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text("".join(map(_line, rows)), encoding="utf-8")
    os.replace(aside, path)


def _line(row: Mapping[str, Any]) -> str:
    """One line of JSON; JSON has no NaN and no infinity, so these become null."""
    plain = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }
    return json.dumps(plain, allow_nan=False, ensure_ascii=False) + "\n"


def check_trackers(config: TrackerConfig) -> None:
    """Raises ConfigError when a tracker that was asked for is not installed or is not a tracker."""
    _makers(config)


def _makers(config: TrackerConfig) -> dict[str, Callable[[Tracker, int], Any]]:
    """A function for every tracker that was asked for, by name; each opens its tracker when the run starts."""
    makers: dict[str, Callable[[Tracker, int], Any]] = {}
    if config.tensorboard:
        if importlib.util.find_spec("tensorboard") is None:
            raise ConfigError(
                "tracker.tensorboard: TensorBoard is not installed. `pip install tensorboard`, or turn it off."
            )
        makers["tensorboard"] = _tensorboard
    if config.wandb != "disabled":
        makers["wandb"] = _wandb
    if config.target is not None:
        tracker_class = _own_class(config.target)
        makers[config.target] = lambda tracker, step: _own(tracker_class, tracker)
    return makers


def _tensorboard(tracker: Tracker, step: int) -> Any:
    """Event files in `tensorboard/`; events of steps that are done again are marked as gone."""
    from accelerate.tracking import TensorBoardTracker

    _leave_to_trackers("tensorboard.")
    opened = TensorBoardTracker("tensorboard", tracker.folder, purge_step=step + 1 if step else 0)
    opened.start()
    if step == 0:
        opened.store_init_configuration(flatten(tracker.run_config))
    return opened


def _leave_to_trackers(package: str) -> None:
    """A thread of the package that fails (a full disk, say) prints no traceback: the next row is told what it met."""
    before = threading.excepthook

    def hook(said: threading.ExceptHookArgs) -> None:
        if not type(said.thread).__module__.startswith(package):
            before(said)

    threading.excepthook = hook


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
    import wandb
    from accelerate.tracking import WandBTracker

    settings: dict[str, Any] = {"silent": True, "console": "off"}
    if "finish_timeout" in wandb.Settings.model_fields:
        settings["finish_timeout"] = WANDB_PATIENCE
    opened = WandBTracker(
        tracker.config.wandb_project, name=tracker.run, id=id_file.read_text(), resume="allow", dir=str(tracker.folder),
        mode=tracker.config.wandb, config=dict(tracker.run_config), settings=settings,
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


def _log_table(tracker: Any, step: int, rows: Sequence[Mapping[str, Any]]) -> bool:
    """As a table where the tracker takes tables, as text for TensorBoard; other trackers take numbers alone."""
    if hasattr(tracker, "log_table"):
        table = [list(row.values()) for row in rows]
        tracker.log_table("rollouts", columns=list(rows[0]), data=table, step=step)
    elif tracker.name == "tensorboard":
        tracker.log({"rollouts": _html_table(rows)}, step=step)
    return True


def _html_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table in HTML, which Markdown leaves as it is: what its cells hold is text, not markup."""
    lines = ["".join(f"<th>{html.escape(name)}</th>" for name in rows[0])]
    lines += ["".join(f"<td>{_cell(value)}</td>" for value in row.values()) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    # an empty line would end the table
    return "" if value is None else html.escape(str(value)).replace("\n", "<br>")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Nested settings as one level with dotted names, in types that every tracker and table takes."""
    flat: dict[str, bool | int | float | str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
