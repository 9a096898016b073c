"""One process or several, started by whatever launcher: the same rows, the same losses within rounding."""

import json
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny import COMMANDS, finish, make_parents, start, starting_from

from llmtrain.engine.tracking import read_samples
from llmtrain.stages import starts

ALONE: list[str] = []
DDP = ["engine.processes=2", "engine.sharding=ddp"]
FSDP = ["engine.processes=2", "engine.sharding=fsdp"]
TENSORS = ["engine.processes=2", "engine.tensor_parallel=2", "engine.activation_checkpointing=selective"]
EXPERT_PARALLEL = ["engine.processes=2", "engine.expert_parallel=2", "engine.activation_checkpointing=full"]
EXPERTS = [
    "model.experts.num_experts=4", "model.experts.shared_experts=1", "model.experts.scores=sigmoid",
    "model.experts.balance_bias_rate=0.01",
]  # fmt: skip
LAUNCHERS = {
    "torchrun": [
        "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0",
    ],
    # with --cpu, accelerate itself starts one process only
    "accelerate": ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0"],
}  # fmt: skip


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process, `alone`, that the others are held against."""
    folder = tmp_path_factory.mktemp("processes")
    pretrain(folder, "alone", ALONE)
    return folder


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of finished tiny runs for the later stages to start from."""
    return make_parents(tmp_path_factory.mktemp("parents"))


@pytest.mark.parametrize(
    ("first", "then"),
    [
        pytest.param(FSDP, ALONE, id="fsdp then alone"),
        pytest.param(DDP, ALONE, id="ddp then alone", marks=pytest.mark.slow),
        pytest.param(ALONE, FSDP, id="alone then fsdp", marks=pytest.mark.slow),
        pytest.param(ALONE, DDP, id="alone then ddp", marks=pytest.mark.slow),
        pytest.param(FSDP, DDP, id="fsdp then ddp", marks=pytest.mark.slow),
        pytest.param(TENSORS, FSDP, id="tensor parallel then fsdp", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_goes_on_in_another_layout(first: list[str], then: list[str], pretrained: Path) -> None:
    name = f"{'-'.join(first)}-then-{'-'.join(then)}".replace("engine.", "").replace("=", "")
    pretrain(pretrained, name, first)
    assert_same_run(pretrained / name, pretrained / "alone")
    shards = (pretrained / name / "checkpoints" / "step-00000004" / "state").iterdir()
    assert len(list(shards)) == (2 if first else 1), "as many shards as processes"
    rewind(pretrained / name, step=4)
    assert f"resuming {pretrained / name} at step 4" in pretrain(pretrained, name, then)
    assert_same_run(pretrained / name, pretrained / "alone")


@pytest.mark.slow
def test_learning_rates_by_width_are_those_of_the_sharded_parameters(tmp_path: Path) -> None:
    mup = ["model.init={name:mup,base_hidden_size:8,base_head_dim:4}"]
    for name, layout in {"alone": ALONE, "fsdp": FSDP}.items():
        pretrain(tmp_path, name, [*layout, *mup])
    assert_same_run(tmp_path / "fsdp", tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("layout", [FSDP, EXPERT_PARALLEL], ids=["fsdp", "expert parallel"])
def test_experts_and_their_biases_go_on_in_another_layout(layout: list[str], tmp_path: Path) -> None:
    pretrain(tmp_path, "alone", EXPERTS)
    pretrain(tmp_path, "together", [*EXPERTS, *layout])
    assert_same_run(tmp_path / "together", tmp_path / "alone")
    rewind(tmp_path / "together", step=4)
    assert "at step 4" in pretrain(tmp_path, "together", EXPERTS)
    assert_same_run(tmp_path / "together", tmp_path / "alone")
    weights, others = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("together", "alone"))
    biases = [name for name in weights if name.endswith("router.bias")]
    assert len(biases) == 2
    for name in biases:
        assert weights[name].unique().numel() > 1
        torch.testing.assert_close(weights[name], others[name])


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_other_launchers_work(launcher: str, pretrained: Path) -> None:
    pretrain(pretrained, launcher, ALONE, LAUNCHERS[launcher])
    assert_same_run(pretrained / launcher, pretrained / "alone")
    assert len(list((pretrained / launcher / "checkpoints" / "step-00000008" / "state").iterdir())) == 2


@pytest.mark.slow
@pytest.mark.parametrize("layout", [DDP, FSDP], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("stage", [name for name in COMMANDS if name != "pretrain"])
def test_every_stage_runs_on_two_processes(stage: str, layout: list[str], parents: Path) -> None:
    short = ["train.steps=4", "schedule.warmup_steps=1", f"runs_dir={parents}"]
    command = [*COMMANDS[stage], *short, *starting_from(parents, stage)]
    alone = parents / f"alone-{stage}"
    if not alone.exists():
        finish([*command, f"run={alone.name}"])
    together = parents / f"{layout[1]}-{stage}".replace("engine.sharding=", "")
    finish([*command, f"run={together.name}", *layout])
    assert_same_run(together, alone)


@pytest.mark.parametrize(
    ("stage", "metric", "layout"),
    [
        # the worst, so that it is not the last
        pytest.param("pretrain", "eval/prose/bits_per_byte", ALONE, id="pretrain alone"),
        pytest.param("pretrain", "eval/prose/bits_per_byte", DDP, id="pretrain ddp", marks=pytest.mark.slow),
        pytest.param("reward", "eval/loss", FSDP, id="reward fsdp", marks=pytest.mark.slow),
        pytest.param("ppo", "eval/reward", FSDP, id="ppo fsdp", marks=pytest.mark.slow),
    ],
)
def test_the_best_checkpoint_is_handed_on(
    stage: str, metric: str, layout: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    before = [] if stage == "pretrain" else starting_from(request.getfixturevalue("parents"), stage)
    best = ["checkpoint.final=best", f"checkpoint.best_metric={metric}", "checkpoint.best_mode=max"]
    often = ["train.steps=6", "schedule.warmup_steps=1", "checkpoint.every_steps=2", "eval.every_steps=2"]
    # at its own rate PPO's policy answers the same at every checkpoint
    often += ["optimizer.lr=0.01"] * (stage == "ppo")
    said = finish([*COMMANDS[stage], *before, *best, *often, *layout, f"runs_dir={tmp_path}", "run=a"])
    run = tmp_path / "a"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = {row["step"]: row[metric] for row in rows if row["step"] and metric in row}
    expected = max(step for step, value in measured.items() if value == max(measured.values()))
    assert expected < 6
    assert f"best by {metric}: step {expected}" in said
    assert json.loads((run / "lineage.json").read_text())["step"] == expected
    load = starts.load_reward_model if stage == "reward" else starts.load_policy
    kept = load(str(run / "checkpoints" / f"step-{expected:08d}")).state_dict()
    for name, value in load(str(run)).state_dict().items():
        if not name.startswith("score_"):  # measured when the weights were chosen
            assert torch.equal(value, kept[name]), name


@pytest.mark.slow
def test_two_processes_read_the_reference_as_one_does(parents: Path) -> None:
    command = [*COMMANDS["precomputed"], "train.steps=2", "schedule.warmup_steps=1", f"runs_dir={parents}"]
    found = []
    for name, layout in (("alone", ALONE), ("together", DDP)):
        for path in parents.glob("cache/reference-*"):
            path.unlink()
        finish([*command, *starting_from(parents, "dpo"), f"run=reference-{name}", *layout])
        found.append({path.name: load_file(path)["logprobs"] for path in parents.glob("cache/reference-*")})
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) == 2  # rows to train on, and those held out
    for name, logprobs in found[0].items():
        assert (logprobs < 0).all()
        torch.testing.assert_close(found[1][name], logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_killing_the_launcher_ends_the_processes_and_the_run_goes_on(pretrained: Path) -> None:
    longer = [*DDP, "train.steps=60"]  # so that it is still running when the kill arrives on a busy machine
    command = [*pretrain_command(pretrained, "orphans"), *longer]
    process = start(command)
    while process.poll() is None and not (pretrained / "orphans" / "checkpoints" / "step-00000004").is_dir():
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)  # the pipes close when the last process has gone
    assert "resuming" in finish(command)
    pretrain(pretrained, "calm", longer)
    weights = [(pretrained / name / "model" / "model.safetensors").read_bytes() for name in ("orphans", "calm")]
    assert weights[0] == weights[1]
    assert_same_run(pretrained / "orphans", pretrained / "calm")


@pytest.mark.slow
def test_a_fault_of_the_user_is_told_once_and_without_traceback(tmp_path: Path) -> None:
    command = [*pretrain_command(tmp_path, "wild"), "optimizer.lr=1e30", "train.max_grad_norm=null", *DDP]
    command += ["health.max_skipped_in_a_row=1"]
    errors = finish(command, expect=1)
    assert errors.count("error:") == 1
    assert "stopped before it could be saved" in errors
    assert "Traceback" not in errors
    assert not list((tmp_path / "wild").glob("checkpoints/*"))


def pretrain_command(folder: Path, name: str) -> list[str]:
    """Eight steps with a checkpoint in the middle."""
    return [
        *COMMANDS["pretrain"], "train.steps=8", "schedule.warmup_steps=2", "checkpoint.every_steps=4",
        "train.micro_batch_rows=2", f"runs_dir={folder}", f"run={name}",
    ]  # fmt: skip


def pretrain(folder: Path, name: str, layout: list[str], launcher: list[str] | None = None) -> str:
    """Run it to its end; what it said."""
    return finish([*pretrain_command(folder, name), *layout], [sys.executable, *launcher] if launcher else ())


def rewind(folder: Path, step: int) -> None:
    """Make a finished run look as if it had been killed after `step`."""
    shutil.rmtree(folder / "model")
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        if checkpoint.name > f"step-{step:08d}":
            shutil.rmtree(checkpoint)
    lineage = json.loads((folder / "lineage.json").read_text())
    (folder / "lineage.json").write_text(json.dumps(lineage | {"finished": None}))


def assert_same_run(folder: Path, expected: Path) -> None:
    """The same metrics at the same steps: what was consumed exactly, what was computed within rounding."""
    assert_same_samples(folder, expected)
    rows, others = ([json.loads(line) for line in (place / "metrics.jsonl").open()] for place in (folder, expected))
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for name, value in other.items():
            if name.startswith("data/") and not name.endswith("/loss"):
                assert row[name] == value, name
            elif not name.startswith("perf/"):
                # margins are differences of scores that are fifty times as large
                nearly = pytest.approx(value, rel=1e-4, abs=5e-5 if "margin" in name else 1e-5)
                assert row[name] == nearly, f"{name} at step {row['step']}"


def assert_same_samples(folder: Path, expected: Path) -> None:
    """The same answers in the same order, where any were sampled."""
    found, wanted = read_samples(folder), read_samples(expected)
    assert len(found) == len(wanted)
    for sample, other in zip(found, wanted, strict=True):
        assert sample == {name: near(value) for name, value in other.items()}


def near(value: object) -> object:
    """Numbers within rounding, all else as it is."""
    return pytest.approx(value, rel=1e-4, abs=1e-5) if isinstance(value, float) else value
