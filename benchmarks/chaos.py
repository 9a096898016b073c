"""What a run loses when it is ended or disturbed at any moment, in any way: short runs, disturbed at random.

    python benchmarks/chaos.py --runs 100 --seed 0 --output benchmarks/results
    python benchmarks/chaos.py --only 17 --seed 0      # one of them again

Each run is one stage on one or two processes and meets one to three of these, at a moment drawn like all else from
(seed, number of the run): all its processes killed; SIGTERM; one process of two killed, or stopped for a while; all
stopped for a while; its disk full for a while (a file system in memory of its own, for which this script must be
root; otherwise left out and said); a file of the newest checkpoint cut short, or one bit of it turned, after a kill.
Now and then it goes on with the other number of processes. The same command is given again until the run has finished.

Undisturbed runs of each stage are made first. Asked of each disturbed one: the weights at the end have the same bits,
or differ by less than `ROUNDING` where the number of processes changed; the metrics too; after a fault it goes on from
the newest checkpoint that was complete, or where that was damaged from the one before; nothing is left lying about. A
kill loses no more steps than lie between two saves, where training stands still for a save and where it goes on beside;
with `checkpoint.max_lost_steps` of more, no more than that. The way of saving is drawn too.
"""

import argparse
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from contenders import report
from safetensors.numpy import load_file

STEPS, EVERY = 24, 4
SAVING = {  # how, and the most steps that a kill may then cost
    "training stands still": (["checkpoint.asynchronous=false"], EVERY),
    "beside training": ([], EVERY),
    "beside training, with slack": ([f"checkpoint.max_lost_steps={2 * EVERY - 1}"], 2 * EVERY - 1),
}
ROUNDING = 1e-4
SECONDS = 240  # one command takes five to twenty
MODEL = ["model.num_layers=2", "model.hidden_size=32", "model.num_heads=2", "model.max_sequence_length=128"]
ROWS = [
    "data.sources.arithmetic.max_rows=64", "data.validation_every=8", "train.batch_rows=8", "train.sequence_length=128",
    "eval.max_rows=4", "eval.max_problems=2", "eval.max_new_tokens=4",
]  # fmt: skip
SAMPLED = [
    *ROWS,
    "rewards=length",
    "rewards.length.options.maximum=8",
    "rewards.length.options.buffer=8",
    "method.max_new_tokens=8",
]
PAIRED = [key for key in ROWS if "problems" not in key and "new_tokens" not in key]
STAGES = {
    "pretrain": [
        "pretrain", *MODEL, "tokenizer.vocab_size=300", "tokenizer.train_bytes=20000", "train.sequence_length=32",
        "train.batch_tokens=256", "eval.max_rows=4", "data.validation_every=2", "schedule.warmup_steps=2",
        *(f"data.sources.{name}.max_documents=4" for name in ("prose", "code", "arithmetic")),
    ],
    "sft": ["sft", *ROWS],
    "reward": ["reward", *PAIRED],
    "dpo": ["align", "method=dpo", *ROWS],
    "ppo": ["align", "method=ppo", *SAMPLED],
    "grpo": ["align", "method=grpo", *SAMPLED, "method.samples_per_prompt=2"],
}  # fmt: skip
PARENT = {"sft": "pretrain", "reward": "sft", "dpo": "sft", "ppo": "sft", "grpo": "sft"}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


class Wrong(Exception):
    """What a run should not have done."""


@dataclasses.dataclass
class Run:
    """A run that may be started several times."""

    keys: list[str]
    folder: Path
    processes: int = 1
    saving: str = "beside training"
    process: subprocess.Popen[str] | None = None
    errors: str = ""
    """What the last start wrote on standard error."""
    damaged: set[int] = dataclasses.field(default_factory=set)
    """The inodes of checkpoints that were damaged: one that is written anew has another."""

    def start(self) -> None:
        """Begin, or go on."""
        command = [
            sys.executable, "-m", "llmtrain", *self.keys, f"runs_dir={self.folder.parent}", f"run={self.folder.name}",
            f"engine.processes={self.processes}", "engine.threads=1", f"train.steps={STEPS}",
            f"checkpoint.every_steps={EVERY}", *SAVING[self.saving][0],
        ]  # fmt: skip
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in `wait`)
        self.process = subprocess.Popen(
            command, env=ENVIRONMENT, text=True, stdout=subprocess.DEVNULL, stderr=self.said, start_new_session=True
        )

    def wait(self) -> int:
        """The exit code. Raises Wrong where it hangs or ends in a traceback."""
        assert self.process is not None
        try:
            code = self.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise Wrong(f"hung for {SECONDS} seconds") from None
        self.said.seek(0)
        self.errors = self.said.read()
        self.said.close()
        if "Traceback (most recent call last)" in self.errors:
            raise Wrong("a traceback")
        return code

    def members(self) -> list[psutil.Process]:
        """The processes that train: those that were launched, or the one that was started."""
        assert self.process is not None
        try:
            children = psutil.Process(self.process.pid).children(recursive=True)
            return [each for each in children if "spawn_main" in " ".join(each.cmdline())]
        except psutil.NoSuchProcess:
            return []

    def signal(self, number: int) -> None:
        """To all processes of the run."""
        assert self.process is not None
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return

    def kill(self) -> None:
        """All processes of the run, at once."""
        self.signal(signal.SIGKILL)

    def rows(self) -> int:
        """Rows of metrics written so far."""
        path = self.folder / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    def newest(self) -> Path | None:
        """The newest checkpoint that is complete and was not damaged."""
        saved = sorted((self.folder / "checkpoints").glob("step-*"))
        return next((path for path in reversed(saved) if path.stat().st_ino not in self.damaged), None)

    def reach(self, rows: int, then_seconds: float) -> bool:
        """Wait until so many rows are written, and a moment more; whether the run still goes on then."""
        assert self.process is not None
        until = time.monotonic() + SECONDS
        while self.rows() < rows and self.process.poll() is None and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(then_seconds)
        return self.process.poll() is None


def all_killed(run: Run, draw: random.Random) -> None:
    run.kill()


def terminated(run: Run, draw: random.Random) -> None:
    assert run.process is not None
    run.process.terminate()


def one_killed(run: Run, draw: random.Random) -> None:
    if members := run.members():
        draw.choice(members).kill()
    else:
        run.kill()


def one_stopped(run: Run, draw: random.Random) -> None:
    stopped = draw.choice(run.members() or [None])
    if stopped is not None:
        stopped.suspend()
        time.sleep(draw.uniform(0.2, 2.0))
        stopped.resume()


def all_stopped(run: Run, draw: random.Random) -> None:
    run.signal(signal.SIGSTOP)
    time.sleep(draw.uniform(0.2, 2.0))
    run.signal(signal.SIGCONT)


def disk_full(run: Run, draw: random.Random) -> None:
    assert run.process is not None
    ballast, until = run.folder.parent / "ballast", time.monotonic() + draw.uniform(0.3, 3.0)
    with ballast.open("wb", buffering=0) as file:
        while time.monotonic() < until and run.process.poll() is None:
            try:
                file.write(bytes(1 << 16))
            except OSError:  # full, as it shall be; what the run gives free meanwhile is taken too
                time.sleep(0.01)
    ballast.unlink()


def newest_damaged(run: Run, draw: random.Random, damage: Callable[[bytes, random.Random], bytes]) -> None:
    run.kill()
    run.wait()
    newest = run.newest()
    assert newest is not None
    run.damaged.add(newest.stat().st_ino)
    path = draw.choice(sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size))
    path.write_bytes(damage(path.read_bytes(), draw))


def cut_short(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def one_bit_turned(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]


FAULTS: dict[str, Callable[[Run, random.Random], None]] = {
    "all killed": all_killed,
    "terminated": terminated,
    "one killed": one_killed,
    "one stopped": one_stopped,
    "all stopped": all_stopped,
    "disk full": disk_full,
    "cut short": lambda run, draw: newest_damaged(run, draw, cut_short),
    "bit turned": lambda run, draw: newest_damaged(run, draw, one_bit_turned),
}
DAMAGES = ("cut short", "bit turned")


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[bool]:
    """A file system of its own at this folder; whether it could be made."""
    folder.mkdir(parents=True)
    options = ["-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    made = subprocess.run(["mount", *options], capture_output=True).returncode == 0
    try:
        yield made
    finally:
        if made:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
        shutil.rmtree(folder, ignore_errors=True)


def weights(folder: Path) -> dict[str, Any]:
    """A finished run's."""
    return load_file(folder / "model" / "model.safetensors")


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Without what depends on the clock."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in rows]


def compare(run: Run, calm: Path, *, same_processes: bool) -> float:
    """The largest difference of a weight. Raises Wrong where there should be none, or less."""
    there, here = weights(calm), weights(run.folder)
    largest = max(float(abs(there[name] - here[name]).max()) for name in there)
    if (largest > 0.0 if same_processes else largest > ROUNDING) or there.keys() != here.keys():
        raise Wrong(f"weights differ by {largest:.1e}")
    if same_processes and metrics(run.folder) != metrics(calm):
        raise Wrong("metrics differ")
    if len(metrics(run.folder)) != len(metrics(calm)):
        raise Wrong("rows of metrics are missing or too many")
    left = [path.name for path in (run.folder / "checkpoints").glob(".*")]
    if left:
        raise Wrong(f"left behind: {left}")
    return largest


def resumed_at(run: Run) -> int | None:
    """The step that the last start went on from, as it said; None: it did not say so, or not come so far."""
    _, _, after = run.errors.partition("resuming ")
    return int(after.partition(" at step ")[2].split()[0]) if after else None


def disturb(run: Run, fault: str, draw: random.Random) -> int:
    """Let this happen to a run that has been started, in the middle of its steps or while it starts; its exit code."""
    row, has = draw.randrange(EVERY + 1 if fault in DAMAGES else 1, STEPS), run.rows()
    going = run.reach(row, draw.uniform(0.0, 0.1)) if row > has else run.reach(0, draw.uniform(0.0, 5.0))
    if not going or (fault in DAMAGES and run.newest() is None):
        return run.wait()
    FAULTS[fault](run, draw)
    if fault in DAMAGES:
        return -signal.SIGKILL
    code = run.wait()
    if code and "stopped" in fault:
        raise Wrong(f"exit code {code} for having been stopped for a while")
    return code


def live(run: Run, faults: list[str], draw: random.Random, *, change: bool) -> int:
    """Start a run again and again, with one fault each time, until it has finished; the most steps that were lost."""
    expected, lost = 0, 0
    for fault in [*faults, None]:
        rows_before = run.rows()
        run.start()
        code = disturb(run, fault, draw) if fault else run.wait()
        resumed = resumed_at(run)
        was_finished = "has finished already" in run.errors  # just before it was killed
        if (resumed or 0) != expected and (code == 0 or resumed is not None) and not was_finished:
            raise Wrong(f"went on from step {resumed}, not from step {expected}")
        if code == 0:
            return lost
        newest = run.newest()
        expected = int(newest.name[5:]) if newest else 0
        # what damage or a full disk cost is not the fault of a kill that comes before training goes on
        has_trained = resumed is not None or run.rows() != rows_before
        if fault not in (*DAMAGES, "disk full") and has_trained:
            lost = max(lost, run.rows() - 1 - expected)
            if lost > SAVING[run.saving][1]:
                raise Wrong(f"{lost} steps are lost")
        if change:
            run.processes = 3 - run.processes
    raise Wrong(f"exit code {code} though nothing happened")


def trial(number: int, seed: int, calm: Path) -> dict[str, Any]:
    """One disturbed run, from beginning to end."""
    draw = random.Random(f"{seed} {number}")
    stage, processes, change = draw.choice(list(STAGES)), draw.choice((1, 2)), draw.random() < 0.15
    saving = draw.choice(list(SAVING))
    folder = calm.parent / f"run-{number}"
    with small_disk(folder, megabytes=24) as is_small:
        usual = [name for name in FAULTS if (is_small or name != "disk full") and (processes > 1 or "one " not in name)]
        faults = draw.choices(usual, k=draw.randrange(1, 4))
        said = {
            "run": number, "stage": stage, "processes": processes, "saving": saving, "changed": change, "faults": faults
        }  # fmt: skip
        (folder / "cache").symlink_to(calm / "cache")
        run = Run(command(stage, calm), folder / stage, processes, saving)
        try:
            lost = live(run, faults, draw, change=change)
            difference = compare(run, calm / f"{stage}-{processes}", same_processes=not change)
            return said | {"lost": lost, "difference": difference}
        except Wrong as wrong:
            return said | {"wrong": str(wrong), "errors": run.errors[-3000:]}
        finally:
            run.kill()


def command(stage: str, calm: Path) -> list[str]:
    """A stage's, starting from an undisturbed run."""
    before = [f"model.init_from={calm / PARENT[stage]}-1"] if stage in PARENT else []
    return [*STAGES[stage], *before]


def undisturbed(calm: Path) -> None:
    """Each stage's run on one process and on two; those that others start from first."""
    for stage in STAGES:
        for processes in (1, 2):
            run = Run(command(stage, calm), calm / f"{stage}-{processes}", processes)
            run.start()
            if run.wait():
                sys.exit(f"{stage} failed undisturbed:\n{run.errors}")


def main() -> None:
    """Parse the arguments, make the runs, print what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", help="these runs alone")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--output", type=Path, help="append the result to chaos.jsonl in this folder")
    arguments = parser.parse_args()
    numbers = arguments.only or range(arguments.runs)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        calm = Path(folder) / "calm"
        undisturbed(calm)
        results = []
        for result in pool.map(lambda number: trial(number, arguments.seed, calm), numbers):
            results.append(result)
            print(json.dumps(result), flush=True)
    wrong = [result for result in results if "wrong" in result]
    right = [result for result in results if "wrong" not in result]
    summary = {
        "seed": arguments.seed, "runs": len(results), "wrong": [result["run"] for result in wrong],
        "faults": dict(Counter(fault for result in results for fault in result["faults"])),
        "stages": dict(Counter(f"{result['stage']} on {result['processes']}" for result in results)),
        "most_steps_lost": {
            saving: max((result["lost"] for result in right if result["saving"] == saving), default=None)
            for saving in SAVING
        },
        "save_interval": EVERY,
        "largest_difference_processes_changed": max((result["difference"] for result in right), default=None),
    }  # fmt: skip
    report(summary, arguments.output and arguments.output / "chaos.jsonl")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
