"""Kill the process at any instant, run the same command again: the same bits at the end, and the same metrics."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.tiny import TINY, make_parents

STAGES = {
    "pretrain": ["pretrain", *TINY["pretrain"]],
    "sft": ["sft", *TINY["sft"]],
    "reward": ["reward", *TINY["reward"]],
    "dpo": ["align", "method=dpo", *TINY["dpo"]],
    "ppo": ["align", "method=ppo", *TINY["ppo"]],
}
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of finished tiny runs for the later stages to start from."""
    return make_parents(tmp_path_factory.mktemp("parents"))


@pytest.mark.parametrize(
    "stage", ["pretrain", *(pytest.param(name, marks=SLOW) for name in STAGES if name != "pretrain")]
)
def test_killed_three_times_ends_with_the_same_bits(stage: str, parents: Path, tmp_path: Path) -> None:
    command = [*STAGES[stage], "checkpoint.every_steps=3", "train.steps=12", f"runs_dir={parents}"]
    calm, killed = f"calm-{stage}", f"killed-{stage}"
    assert _start([*command, f"run={calm}"]).wait(timeout=300) == 0

    seed = random.randrange(2**32)
    print(f"kill moments drawn with seed {seed}")
    draw = random.Random(seed)
    folder = parents / killed
    moments = [
        lambda: _rows(folder) >= draw.randrange(1, 4),
        lambda: any(folder.glob("checkpoints/.step-*.partial")),  # in the middle of a save
        lambda: _rows(folder) >= draw.randrange(7, 11),
    ]
    for moment in moments:
        _kill_when(moment, [*command, f"run={killed}"])
    assert not (folder / "model" / "config.json").exists(), "every kill came too late"
    assert _start([*command, f"run={killed}"]).wait(timeout=300) == 0

    assert _digest(folder) == _digest(parents / calm)
    assert _metrics(folder) == _metrics(parents / calm)


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "llmtrain", *command], env=environment, stderr=subprocess.DEVNULL)


def _kill_when(moment: Callable[[], bool], command: list[str]) -> None:
    process = _start(command)
    deadline = time.monotonic() + 120
    while not moment() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.wait()


def _rows(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()


def _metrics(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in rows]
