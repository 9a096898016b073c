"""Kill the process at any instant, run the same command again: the same bits at the end, and the same metrics."""

import contextlib
import hashlib
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.tiny import COMMANDS, OBJECTIVES, TINY, finish, make_parents, start, starting_from

from llmtrain.engine.health import read_warnings

WARMUP = ["train.length_warmup.start_length=4", "train.length_warmup.steps=7"]
# the worst, so that it is not the last
BEST = [
    "checkpoint.final=best", "checkpoint.best_metric=eval/prose/bits_per_byte", "checkpoint.best_mode=max",
    "eval.every_steps=3",
]  # fmt: skip
DROPOUT = ["model.dropout=0.2", "model.stochastic_depth=0.2"]
EXPERTS = [
    "model.experts.num_experts=4", "model.experts.capacity_factor=0.9", "model.experts.capacity_group_tokens=8",
    "model.experts.jitter=0.1",    "model.experts.balance_bias_rate=0.01", "model.experts.z_loss=0.001",
]  # fmt: skip
# text that is encoded while training goes on, with the tokenizer of a run in the folder of the parents
STREAMED = ["data.streaming=true", "tokenizer.path=PARENTS/span-corruption/model"]
UNTRAINED = [text for text in TINY["pretrain"] if not text.startswith("tokenizer.")]
CASES = COMMANDS | {
    "streamed-spans": [
        "pretrain",
        *UNTRAINED,
        *(text for text in OBJECTIVES["span-corruption"] if "vocab" not in text),
        *STREAMED,
    ],
    "dropout": [*COMMANDS["pretrain"], *DROPOUT, "train.micro_batch_rows=2"],
    "mup": [*COMMANDS["pretrain"], "model.init={name:mup,base_hidden_size:8,base_head_dim:4}"],
    "length-warmup": [*COMMANDS["pretrain"], *WARMUP, "train.micro_batch_rows=2"],
    "lora-sft": [*COMMANDS["lora-sft"], "adapter.dropout=0.1"],
    "packed": [*COMMANDS["sft"], "data.packing=true"],
    "best": [*COMMANDS["pretrain"], *BEST],
    "experts": [*COMMANDS["pretrain"], *EXPERTS, "train.micro_batch_rows=2"],
    "masked-experts": [*COMMANDS["masked"], *EXPERTS, "train.micro_batch_rows=2"],
    "span-corruption-experts": [
        *COMMANDS["span-corruption"],
        *EXPERTS,
        "model.experts.capacity_group_tokens=4",
        "train.micro_batch_rows=2",
    ],
    "rankings": [
        "reward",
        "data=files",
        "data.sources.files.path=rankings.jsonl",
        "objective.margin_weight=0.1",
        "objective.centring_weight=0.01",
        "train.batch_rows=8",
        "train.micro_batch_rows=3",
    ],
}
INDEPENDENT = (
    "pretrain",
    "dropout",
    "length-warmup",
    "mup",
    "best",
    "experts",
    "masked-experts",
    "span-corruption-experts",
    *OBJECTIVES,
)
FAST = ("dropout",)


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of finished tiny runs for the later stages to start from, and a file of rankings."""
    folder = tmp_path_factory.mktemp("parents")
    rows = [
        {"prompt": f"What is {n}?", "answers": list("abcde"[: 2 + n % 4]), "scores": [3, 1, 4, 2, 0][: 2 + n % 4]}
        for n in range(40)
    ]
    (folder / "rankings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_parents(folder)


@pytest.fixture
def runs(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Where the runs of a case go: pretraining needs no parents."""
    independent = request.node.callspec.params["case"] in INDEPENDENT
    return tmp_path if independent else Path(request.getfixturevalue("parents"))


@pytest.mark.parametrize(
    "case", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_killed_three_times_ends_with_the_same_bits(case: str, runs: Path) -> None:
    command = [text.replace("rankings.jsonl", str(runs / "rankings.jsonl")) for text in CASES[case]]
    command = [text.replace("PARENTS", str(runs)) for text in command]
    command += ["checkpoint.every_steps=3", "train.steps=12", f"runs_dir={runs}"]
    command += [] if case in (*INDEPENDENT, "streamed-spans") else starting_from(runs, case)
    calm, killed = runs / f"calm-{case}", runs / f"killed-{case}"
    finish([*command, f"run={calm.name}"])

    early, late = random.randrange(1, 5), random.randrange(8, 12)  # the save at 6 begins when that at 3 is complete
    print(f"killed after {early} rows of metrics, in the middle of a save, and after {late} rows")
    command = [*command, f"run={killed.name}"]
    kill_when(lambda: count_rows(killed) >= early, command)
    kill_when(lambda: any(killed.glob("checkpoints/.step-*.partial")), command)
    kill_when(lambda: count_rows(killed) >= late, command)
    assert not (killed / "model" / "config.json").exists(), "a kill came too late"
    errors = finish(command)

    assert "resuming" in errors
    assert weights_digest(killed) == weights_digest(calm)
    assert metrics(killed) == metrics(calm)
    assert samples(killed) == samples(calm)
    assert not list((killed / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_killed_at_any_time_of_its_life_ends_with_the_same_bits(tmp_path: Path) -> None:
    command = [*COMMANDS["pretrain"], "checkpoint.every_steps=1", "train.steps=60", f"runs_dir={tmp_path}"]
    began = time.monotonic()
    finish([*command, "run=calm"])
    life = time.monotonic() - began
    killed = tmp_path / "killed"
    for _ in range(8):
        moment = random.uniform(0.2, 1.0) * life
        print(f"killed after {moment:.3f} s of {life:.1f}")
        until = time.monotonic() + moment
        kill_when(lambda until=until: time.monotonic() >= until, [*command, "run=killed"])
    finish([*command, "run=killed"])
    assert weights_digest(killed) == weights_digest(tmp_path / "calm")
    assert metrics(killed) == metrics(tmp_path / "calm")


def test_a_torn_newest_checkpoint_is_named_and_the_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    command = [*COMMANDS["pretrain"], "checkpoint.every_steps=2", "train.steps=6", f"runs_dir={tmp_path}"]
    finish([*command, "run=calm"])
    disturbed = tmp_path / "disturbed"
    kill_when(lambda: (disturbed / "checkpoints" / "step-00000004").is_dir(), [*command, "run=disturbed"])
    newest = max((disturbed / "checkpoints").glob("step-*"))
    for path in (newest / "state").iterdir():
        path.write_bytes(path.read_bytes()[:-100])

    errors = finish([*command, "run=disturbed"])
    assert str(newest) in errors
    assert "passed over" in errors
    assert "resuming" in errors
    assert weights_digest(disturbed) == weights_digest(tmp_path / "calm")
    assert metrics(disturbed) == metrics(tmp_path / "calm")


@pytest.mark.slow
def test_a_disk_that_fills_up_during_a_save_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    command = [*COMMANDS["pretrain"], "checkpoint.every_steps=2", f"runs_dir={tmp_path}", "run=full", "train.steps=8"]
    finish([*COMMANDS["pretrain"], f"runs_dir={tmp_path}", "run=calm", "train.steps=8"])
    full = tmp_path / "full"
    kill_when(lambda: (full / "checkpoints" / "step-00000002").is_dir(), command)
    before = sorted(path.name for path in (full / "checkpoints").glob("step-*"))

    # a limit on the size of a file, between that of the metrics and that of the weights, stands for a full disk
    limited = ["bash", "-c", 'trap "" XFSZ; ulimit -f 200; exec "$@"', "limited", sys.executable]
    errors = finish(command, limited, expect=1)
    assert "warning: could not save step 4" in errors
    assert "training goes on" in errors
    assert "health.failed_saves" in errors
    assert "error: could not save step 8" in errors
    assert "File too large" in errors
    assert "Traceback" not in errors
    assert sorted(path.name for path in (full / "checkpoints").iterdir()) == before == ["step-00000002"]
    assert [row["step"] for row in metrics(full)] == list(range(9))
    assert [warning.rule for warning in read_warnings(full)] == ["failed_saves"]

    assert "resuming" in finish(command)
    assert weights_digest(full) == weights_digest(tmp_path / "calm")
    assert read_warnings(full) == [], "the steps that could not be saved were done again"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_told_to_end_saves_and_goes_on(processes: int, tmp_path: Path) -> None:
    command = [*COMMANDS["pretrain"], "train.steps=30", f"engine.processes={processes}", f"runs_dir={tmp_path}"]
    finish([*command, "run=calm"])
    told, folder = start([*command, "run=told"]), tmp_path / "told"
    wait_for(lambda: count_rows(folder) >= 4, told)
    told.send_signal(signal.SIGUSR1)
    wait_for(lambda: any(folder.glob("checkpoints/step-*")), told)
    rows = count_rows(folder)
    wait_for(lambda: count_rows(folder) > rows, told)
    told.send_signal(signal.SIGTERM)
    _, errors = told.communicate(timeout=60)
    assert told.returncode == 143, errors
    found = re.search(r"stopped by SIGTERM after step (\d+) of 30; its checkpoint is complete", errors)
    assert found
    assert "Traceback" not in errors
    assert sorted(folder.glob("checkpoints/*"))[-1].name == f"step-{int(found[1]):08d}"
    assert f"resuming {folder} at step {found[1]}" in finish([*command, "run=told"])
    assert weights_digest(folder) == weights_digest(tmp_path / "calm")
    assert metrics(folder) == metrics(tmp_path / "calm")


def test_a_second_run_in_the_same_folder_is_refused_and_a_killed_one_succeeded(tmp_path: Path) -> None:
    command = [*COMMANDS["pretrain"], "train.steps=4", f"runs_dir={tmp_path}", "run=mine"]
    first = start(command)
    wait_for(lambda: (tmp_path / "mine" / ".lock").is_file(), first)
    first.send_signal(signal.SIGSTOP)  # it stays the owner, however long
    errors = finish(command, expect=1)
    assert f"error: {tmp_path / 'mine'} is in use by" in errors
    assert f"(process {first.pid}, started" in errors
    first.kill()
    first.communicate()
    finish(command)
    assert not (tmp_path / "mine" / ".lock").exists()


def wait_for(moment: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Until `moment` has come, while the process is running."""
    deadline = time.monotonic() + 200
    while not moment():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def kill_when(moment: Callable[[], bool], command: list[str]) -> None:
    """Start the command and kill it, with no time to tidy up, as soon as `moment` has come."""
    process = start(command)
    deadline = time.monotonic() + 200
    while not moment() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.0005)
    process.kill()
    process.communicate()


def count_rows(folder: Path) -> int:
    """Rows of metrics written so far."""
    path = folder / "metrics.jsonl"
    with contextlib.suppress(FileNotFoundError):  # a run that begins anew removes it
        return path.read_text().count("\n")
    return 0


def weights_digest(folder: Path) -> str:
    """sha256 of a finished run's weights."""
    return hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()


def metrics(folder: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in rows]


def samples(folder: Path) -> bytes:
    """The sampled answers that were kept."""
    path = folder / "rollouts.jsonl"
    return path.read_bytes() if path.is_file() else b""
