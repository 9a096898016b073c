"""Launchers of several machines and of sweeps, as far as one machine can tell."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.tiny import COMMANDS, ENVIRONMENT, finish, start

SCRIPT = Path(__file__).parents[2] / "scripts" / "slurm.sbatch"
SHORT = ["train.steps=4", "schedule.warmup_steps=1", "checkpoint.every_steps=2"]

# srun starts its command on every node and hands signals on; scontrol knows the hosts.
STUBS = {
    "srun": """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do shift; done
children=()
for ((node = 0; node < SLURM_NNODES; node++)); do "$@" & children+=($!); done
trap 'kill -TERM "${children[@]}" 2>/dev/null' TERM
code=0
for child in "${children[@]}"; do
  wait "$child" || code=$?
  while kill -0 "$child" 2>/dev/null; do code=0; wait "$child" || code=$?; done
done
exit $code
""",
    "scontrol": """#!/usr/bin/env bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$SLURM_SUBMIT_DIR/scontrol.log"; fi
""",
}


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a job of two nodes, both of which are this machine."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name, text in STUBS.items():
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "activate").write_text(f'PATH="{Path(sys.executable).parent}:$PATH"\n')
    return ENVIRONMENT | {
        "PATH": f"{stubs}:{os.environ['PATH']}", "VENV": str(tmp_path / "venv"), "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": str(os.getpid()),
    }  # fmt: skip


def test_the_script_is_bash() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)


@pytest.mark.slow
def test_a_job_of_two_nodes_is_told_to_end_queues_again_and_goes_on(cluster: dict[str, str], tmp_path: Path) -> None:
    pretrain = [*COMMANDS["pretrain"], "train.steps=2000", "schedule.warmup_steps=1", "checkpoint.every_steps=2"]
    run = tmp_path / "a"
    said = until(lambda: (run / "checkpoints" / "step-00000002").is_dir(), pretrain, cluster, tmp_path)
    assert (tmp_path / "scontrol.log").read_text() == f"requeue {cluster['SLURM_JOB_ID']}\n", said
    assert {path.name for path in (run / "logs").iterdir()} == {"rank-0.log", "rank-1.log"}
    for checkpoint in (run / "checkpoints").glob("step-*"):
        assert len(list((checkpoint / "state").iterdir())) == 2
    log = run / "logs" / "rank-0.log"
    until(lambda: f"resuming {run} at step" in log.read_text(), pretrain, cluster, tmp_path)
    assert (tmp_path / "scontrol.log").read_text().count("requeue") == 2


def until(reached: Callable[[], bool], command: list[str], environment: dict[str, str], folder: Path) -> str:
    """Run the job's script, tell it to end when something is reached, as SLURM does before the time limit."""
    command = ["bash", str(SCRIPT), *command, f"runs_dir={folder}", "run=a"]
    job = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while job.poll() is None and not reached():
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    said, _ = job.communicate(timeout=150)
    assert job.returncode != 0, said
    return said


FAILING = """
import os
import time
import torch
from llmtrain.config.errors import UserError

class Failing(torch.optim.SGD):
    def step(self, closure=None):
        if os.environ["RANK"] == "1":
            raise UserError("process 1 has had enough")
        return super().step(closure)
"""


@pytest.mark.slow
def test_under_torchrun_the_first_failure_ends_all_and_is_told_first(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d",
                "--rdzv-endpoint=127.0.0.1:0"]  # fmt: skip
    arguments = [*COMMANDS["pretrain"], *SHORT, "optimizer._target_=failing.Failing", "optimizer.betas=null",
                 "optimizer.eps=null", f"runs_dir={tmp_path}", "run=a"]  # fmt: skip
    process = start(arguments, torchrun, cwd=tmp_path)
    _, errors = process.communicate(timeout=250)
    assert process.returncode == 1, errors
    told = errors.index("error: process 1 has had enough")
    for others in ("Traceback", "ChildFailedError", "Connection"):
        assert others not in errors[:told], errors
    assert "error: process 1 has had enough" in (tmp_path / "a" / "logs" / "rank-1.log").read_text()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="needs hydra-submitit-launcher")
def test_a_sweep_goes_through_submitit(tmp_path: Path) -> None:
    launcher = ["hydra/launcher=submitit_local", f"hydra.sweep.dir={tmp_path}/sweep", "hydra.launcher.timeout_min=4",
                f"hydra.launcher.submitit_folder={tmp_path}/submitit"]  # fmt: skip
    said = finish(
        [*COMMANDS["pretrain"], *SHORT[1:], "train.steps=2", "-m", "optimizer.lr=1e-3,1e-2", *launcher,
         f"runs_dir={tmp_path}", "run=sweep"]
    )  # fmt: skip
    lineages = [json.loads(path.read_text()) for path in tmp_path.glob("sweep/*/lineage.json")]
    assert {lineage["run"] for lineage in lineages} == {"sweep/0-optimizer.lr=0.001", "sweep/1-optimizer.lr=0.01"}, said
    assert all(lineage["finished"] for lineage in lineages)
