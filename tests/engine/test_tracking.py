import errno
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.tracking import GeneralTracker
from rich.console import Console

from llmtrain.config.errors import ConfigError
from llmtrain.config.schema import TrackerConfig
from llmtrain.engine import display, tracking
from llmtrain.engine.tracking import Tracker, read_metrics, read_samples


def make(folder: Path, *, is_main: bool = True, **config: object) -> Tracker:
    return Tracker(
        folder,
        TrackerConfig(**config),
        steps=10,
        is_main=is_main,
        run="sft",
        run_config={"seed": 0, "model": {"a": None}},
    )


def write(folder: Path, steps: range, start: int = 0, **config: object) -> None:
    tracker = make(folder, **config)
    tracker.start(start)
    for step in steps:
        tracker.log(step, {"train/loss": 1 / (step + 3), "data/b/tokens": 7.0 * step, "data/a/tokens": 0.1})
    tracker.close()


class Recorder(GeneralTracker):
    name, requires_logging_directory, tracker = "recorder", True, None
    seen: list[object] = []  # noqa: RUF012

    def __init__(self, run_name: str, logging_dir: str) -> None:
        super().__init__()
        self.seen.append((run_name, logging_dir))

    def store_init_configuration(self, values: dict) -> None:
        self.seen.append(values)

    def log(self, values: dict, step: int | None = None) -> None:
        self.seen.append((step, values))
        if step == 2:
            raise RuntimeError("the server is gone")

    def finish(self) -> None:
        self.seen.append("finished")


def test_rows_are_exact_sorted_and_written_at_once(tmp_path: Path) -> None:
    tracker = make(tmp_path)
    tracker.start(0)
    tracker.log(1, {"train/loss": 0.1 + 0.2, "eval/loss": 1.0, "data/x/tokens": 3.0})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert line == '{"step": 1, "data/x/tokens": 3.0, "eval/loss": 1.0, "train/loss": 0.30000000000000004}\n'
    tracker.close()
    tracker.close()


def test_a_resumed_run_leaves_the_file_of_an_unbroken_one(tmp_path: Path) -> None:
    write(tmp_path / "whole", range(10))
    write(tmp_path / "killed", range(8))
    path = tmp_path / "killed" / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])  # the last line is torn
    write(tmp_path / "killed", range(5, 10), start=4)
    assert path.read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert [row["step"] for row in read_metrics(tmp_path / "killed")] == list(range(10))
    assert os.listdir(tmp_path / "killed") == ["metrics.jsonl"]


def test_starting_anew_drops_the_row_of_step_0_too(tmp_path: Path) -> None:
    write(tmp_path, range(3))
    write(tmp_path, range(1))
    assert [row["step"] for row in read_metrics(tmp_path)] == [0]


def test_what_is_not_finite_stays_readable_json(tmp_path: Path) -> None:
    tracker = make(tmp_path)
    tracker.start(0)
    tracker.log(1, {"eval/loss": math.inf, "train/loss": math.nan})
    tracker.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "eval/loss": None, "train/loss": None}
    assert math.isnan(read_metrics(tmp_path)[0]["eval/loss"])


def sample(row: int, answer: str = "b", kl: float | None = 0.5) -> dict[str, object]:
    return {
        "row": row, "prompt": "p | q\n\n*r*", "answer": answer, "expected": None, "reward": 0.1 + 0.2,
        "tokens": 3, "finished": True, "kl": kl,
    }  # fmt: skip


def write_samples(folder: Path, steps: range, start: int = 0, **config: object) -> None:
    tracker = make(folder, **config)
    tracker.start(start)
    for step in steps:
        tracker.log_samples(step, [sample(0), sample(7, f"\u2028\x85é<b>{step}", math.nan)])
        tracker.log(step, {"train/loss": 1.0})
    tracker.close()


def test_samples_are_rows_of_a_file_of_their_own(tmp_path: Path) -> None:
    write_samples(tmp_path, range(1, 2))
    first, second, end = (tmp_path / "rollouts.jsonl").read_text(encoding="utf-8").split("\n")
    assert first.startswith('{"step": 1, "row": 0, "prompt": "p | q\\n\\n*r*", "answer": "b", "expected": null, ')
    assert json.loads(second, parse_constant=pytest.fail) == {"step": 1} | sample(7, "\u2028\x85é<b>1", None)
    assert end == ""
    assert read_samples(tmp_path) == [json.loads(first), json.loads(second)]


def test_a_resumed_run_leaves_the_samples_of_an_unbroken_one(tmp_path: Path) -> None:
    write_samples(tmp_path / "whole", range(1, 10))
    write_samples(tmp_path / "killed", range(1, 8))
    path = tmp_path / "killed" / "rollouts.jsonl"
    path.write_text(path.read_text(encoding="utf-8")[:-20], encoding="utf-8")  # the last line is torn
    write_samples(tmp_path / "killed", range(5, 10), start=4)
    assert path.read_bytes() == (tmp_path / "whole" / "rollouts.jsonl").read_bytes()
    write(tmp_path / "killed", range(1))
    assert not path.exists(), "a run that begins anew has none yet"


def test_trackers_get_samples_as_a_table_or_not_at_all(tmp_path: Path) -> None:
    class Tables(Recorder):
        def log_table(self, name: str, columns: list[str], data: list[list[object]], step: int) -> None:
            self.seen.append((name, columns, data, step))

    Recorder.seen.clear()
    tracker = make(tmp_path)
    tracker.start(0)
    tracker._trackers = [Recorder("r", "x"), Tables("r", "x")]
    tracker.log_samples(3, [sample(0), sample(1)])
    rows = [{"step": 3} | sample(0), {"step": 3} | sample(1)]
    assert Recorder.seen[2:] == [("rollouts", list(rows[0]), [list(row.values()) for row in rows], 3)]
    tracker.close()


def test_no_file_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


def test_other_processes_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = make(tmp_path / "run", is_main=False, tensorboard=True, _target_="no.such.Class")
    tracker.start(0)
    tracker.log(1, {"train/loss": 1.0})
    tracker.say("hello")
    tracker.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_own_tracker_is_told_until_it_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Recorder.seen.clear()
    target = f"{__name__}.Recorder"
    tracker = make(tmp_path, _target_=target)
    tracker.start(0)
    for step in (1, 2, 3):
        tracker.log(step, {"train/loss": 0.5, "train/x": math.nan})
    tracker.close()
    assert Recorder.seen == [
        ("sft", str(tmp_path)),
        {"seed": 0, "model.a": "None"},
        (1, {"train/loss": 0.5}),
        (2, {"train/loss": 0.5}),
    ]
    assert capsys.readouterr().err.count("the server is gone") == 1
    assert len(read_metrics(tmp_path)) == 3


class Broken(Recorder):
    """Fails where it is told to, as libraries fail: by raising, or by asking the whole process to exit."""

    name, fails = "broken", "nowhere"

    def start(self) -> None:
        self.fail("start")

    def store_init_configuration(self, values: dict) -> None:
        self.fail("store_init_configuration")

    def log(self, values: dict, step: int | None = None) -> None:
        self.fail("log")

    def finish(self) -> None:
        self.fail("finish")

    def fail(self, where: str) -> None:
        if where == self.fails:
            raise SystemExit(1) if where == "start" else ConnectionError("no route to the server")


@pytest.mark.parametrize("where", ["start", "store_init_configuration", "log", "finish"])
def test_a_tracker_that_fails_anywhere_is_left_out_and_said_so_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr(Broken, "fails", where)
    write(tmp_path, range(5), _target_=f"{__name__}.Broken")
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tracker ")]
    name = "broken" if where in ("log", "finish") else f"{__name__}.Broken"
    error = "SystemExit: 1" if where == "start" else "ConnectionError: no route to the server"
    assert said == [
        f"tracker {name} left out from here on ({error}). Training goes on; metrics.jsonl has every row."
    ]  # fmt: skip
    assert len(read_metrics(tmp_path)) == 5


def test_a_disk_that_is_too_full_for_tensorboard_is_said_once_without_a_traceback(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    tracker = make(tmp_path, tensorboard=True)
    tracker.start(0)
    tracker.log(1, {"train/loss": 1.0})
    [opened] = tracker._trackers
    opened.tracker.flush()

    def full(self: RecordWriter, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", full)
    thread = opened.tracker._get_file_writer().event_writer._async_writer._worker
    tracker.log(2, {"train/loss": 1.0})  # its own thread meets the full disk, at this row or soon after
    thread.join(10)
    for step in (3, 4):
        tracker.log(step, {"train/loss": 1.0})
    tracker.close()
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert said.count("tracker tensorboard left out from here on (OSError: [Errno 28] No space left on device)") == 1
    assert len(read_metrics(tmp_path)) == 4


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("no.such.Class", "cannot import no.such.Class"),
        ("json.JSONDecoder", "not a subclass"),
        ("json", "not a subclass"),
    ],
)
def test_a_target_that_is_no_tracker_is_refused_before_the_run(tmp_path: Path, target: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make(tmp_path, _target_=target)


def test_tensorboard_events_of_steps_done_again_are_replaced(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, range(6), tensorboard=True)
    write(tmp_path, range(4, 8), start=3, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(8))


def test_tensorboard_shows_samples_as_a_table_of_plain_text(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator  # the page's own
    from tensorboard.plugin_util import markdown_to_safe_html

    write_samples(tmp_path, range(1, 4), tensorboard=True)
    write_samples(tmp_path, range(3, 5), start=2, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = events.Tensors("rollouts/text_summary")
    assert [event.step for event in found] == [1, 2, 3, 4]
    shown = markdown_to_safe_html(found[-1].tensor_proto.string_val[0])
    assert shown.count("<tr>") == 3
    assert "<td>p | q<br><br>*r*</td>" in shown
    assert "é&lt;b&gt;4</td>" in shown


def test_wandb_stays_in_the_run_folder_and_resumes_its_run(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from llmtrain.config.schema import TrackerConfig\n"
        "from llmtrain.engine.tracking import Tracker\n"
        "from accelerate import PartialState\n"
        "PartialState(cpu=True)\n"  # as every run has it
        "start = int(sys.argv[2])\n"
        "config = TrackerConfig(wandb='offline')\n"
        "tracker = Tracker(Path(sys.argv[1]), config, steps=9, is_main=True, run='a/b', run_config={'seed': 1})\n"
        "tracker.start(start); tracker.log_samples(start + 1, [{'row': 0, 'answer': 'a', 'kl': None}])\n"
        "tracker.log(start + 1, {'train/loss': 1.0}); tracker.close()\n"
    )
    home = tmp_path / "home"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "XDG"))}
    ids = []
    for start in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "run"), start],
            env=environment | {"HOME": str(home)}, cwd=home, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert "wandb" not in done.stdout + done.stderr
        ids.append((tmp_path / "run" / "wandb" / "run_id").read_text())
    assert ids[0] == ids[1]
    assert len(list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{ids[0]}/*.wandb"))) == 2
    tables = [json.loads(path.read_text()) for path in (tmp_path / "run" / "wandb").rglob("rollouts*.table.json")]
    assert sorted(table["data"] for table in tables) == [[[1, 0, "a", None]], [[2, 0, "a", None]]]
    assert not list(home.iterdir())


def test_nothing_heavy_is_imported_unless_asked_for() -> None:
    script = (
        "import sys, llmtrain.engine.tracking; print([m for m in ('torch', 'wandb', 'accelerate') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def lines_of(terminal: bool, monkeypatch: pytest.MonkeyPatch, seconds_a_step: float) -> list[str]:
    """What the display shows of ten steps on a clock of our own."""
    now = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    shown = display.Display(10, Console(file=stream, force_terminal=terminal, width=120, soft_wrap=True))
    shown.start(0)
    for step in range(1, 11):
        now[0] += seconds_a_step
        row = {"train/loss": 2.0, "train/learning_rate": 3e-4, "perf/tokens_per_second": 12345.0, "perf/mfu": 0.114}
        shown.row(step, row | ({"eval/loss": 1.5} if step == 7 else {}))
    shown.close()
    return stream.getvalue().splitlines()


def test_plain_lines_when_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = lines_of(False, monkeypatch, seconds_a_step=2.0)
    assert lines == [
        "step 1/10 loss 2 lr 3.0e-04 12.3k tok/s MFU 11 % eta 0:18",
        "step 4/10 loss 2 lr 3.0e-04 12.3k tok/s MFU 11 % eta 0:12",
        "step 7/10 loss 2 lr 3.0e-04 12.3k tok/s MFU 11 % eta 0:06",
        "step 7/10 eval/loss 1.5",
        "step 10/10 loss 2 lr 3.0e-04 12.3k tok/s MFU 11 % eta 0:00",
    ]


def test_fast_runs_do_not_flood_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(lines_of(False, monkeypatch, seconds_a_step=0.01)) == 3


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n".join(lines_of(True, monkeypatch, seconds_a_step=2.0))
    assert "\x1b[" in text
    assert "━" in text
    assert "step 7/10 eval/loss 1.5" in text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.0, "0"), (950, "950"), (999.6, "1k"), (12345, "12.3k"), (1_050_000, "1.05M"), (2.5e9, "2.5G")],
)
def test_compact(number: float, text: str) -> None:
    assert display.compact(number) == text


@pytest.mark.parametrize(("seconds", "text"), [(35.4, "0:35"), (725, "12:05"), (59.6, "1:00"), (11220, "3:07:00")])
def test_clock(seconds: float, text: str) -> None:
    assert display.clock(seconds) == text


def test_the_file_name_is_the_documented_one() -> None:
    assert tracking.METRICS_FILE == "metrics.jsonl"
