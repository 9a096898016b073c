"""Rows on a disk that is full for a while: none is torn, none is lost, none comes twice."""

import errno
import resource
import signal
from pathlib import Path

import pytest

from llmtrain.engine.row_files import RowFile


def test_rows_wait_for_room_and_come_in_order(tmp_path: Path) -> None:
    rows = RowFile(tmp_path / "rows")
    rows.add(["one\n"])
    before, soft_hard = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # the largest size of a file stands for a full disk: a part of the row still fits
        resource.setrlimit(resource.RLIMIT_FSIZE, (7, soft_hard[1]))
        rows.add(["two two\n"])
        rows.add(["three\n"])
        assert (tmp_path / "rows").read_text() == "one\n"
        assert rows.waiting == ["two two\n", "three\n"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft_hard)
        signal.signal(signal.SIGXFSZ, before)
    rows.add(["four\n"])
    assert (tmp_path / "rows").read_text() == "one\ntwo two\nthree\nfour\n"
    assert rows.waiting == []


def test_other_faults_are_told(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Is a directory") as raised:
        RowFile(tmp_path).add(["row\n"])
    assert raised.value.errno == errno.EISDIR
