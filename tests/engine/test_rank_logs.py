"""What each process says is kept in a file of its own, and what fails first is told first."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmtrain.config.errors import UserError
from llmtrain.engine import rank_logs
from llmtrain.engine.distributed import launch


@pytest.fixture
def streams() -> Iterator[None]:
    """The process's streams, put back afterwards."""
    before = sys.stdout, sys.stderr
    yield
    sys.stdout, sys.stderr = before


@pytest.mark.usefixtures("streams")
def test_what_is_said_goes_to_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rank_logs.keep_log(tmp_path, 3, 4)
    rank_logs.keep_log(tmp_path, 3, 4)  # once is enough
    print("out")
    print("err", file=sys.stderr)
    print("\x1b[2K a bar\n", end="", file=sys.stderr)
    rank_logs.note("in the log alone")
    assert capsys.readouterr() == ("out\n", "err\n\x1b[2K a bar\n")
    assert (tmp_path / "logs" / "rank-3.log").read_text().split("\n") == ["out", "err", "in the log alone", ""]
    assert sys.stderr.encoding.lower() == "utf-8"  # what else a stream has is the stream's own


@pytest.mark.usefixtures("streams")
def test_one_process_keeps_none(tmp_path: Path) -> None:
    rank_logs.keep_log(tmp_path, 0, 1)
    rank_logs.note("nowhere")
    assert list(tmp_path.iterdir()) == []


def talk(folder: Path) -> None:
    """Both say something; the second one then fails, in words or in a crash."""
    rank = int(os.environ["RANK"])
    rank_logs.keep_log(folder, rank, 2)
    print(f"process {rank} begins", file=sys.stderr)
    if rank == 1:
        raise UserError("there are no rows for process 1")


def test_every_process_has_its_log_and_the_reason_is_in_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^there are no rows for process 1$"):
        launch(talk, (tmp_path,), 2)
    logs = {path.name: path.read_text() for path in (tmp_path / "logs").iterdir()}
    assert "process 1 begins\nin process 1:\nTraceback" in logs["rank-1.log"]
    assert "UserError: there are no rows for process 1" in logs["rank-1.log"]
    assert logs.get("rank-0.log", "process 0 begins\n") == "process 0 begins\n"  # it may have been stopped before
