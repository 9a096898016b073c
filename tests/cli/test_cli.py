"""The command line as a user meets it: help, messages, exit codes, sweeps."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import llmtrain
from llmtrain import cli
from llmtrain.config.commands import COMMANDS
from llmtrain.config.errors import UserError

SOURCE = str(Path(llmtrain.__file__).parents[1])


def run(*arguments: str, cwd: Path, code: str = "") -> subprocess.CompletedProcess[str]:
    """`python -m llmtrain ...`, or `python -c code`, in another folder."""
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "llmtrain", *arguments]
    environment = {**os.environ, "PYTHONPATH": SOURCE}
    environment.pop("WORLD_SIZE", None)
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """What would have been run, instead of running it."""
    seen: list[Any] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(cli, "execute", lambda command, config: seen.append(config))
    return seen


def test_help_and_version(tmp_path: Path) -> None:
    result = run("--help", cwd=tmp_path)
    assert result.returncode == 0
    for name, command in COMMANDS.items():
        assert f"  {name}" in result.stdout
        assert command.summary in result.stdout
    assert run("--version", cwd=tmp_path).stdout == f"llmtrain {llmtrain.__version__}\n"


def test_help_imports_no_library(tmp_path: Path) -> None:
    code = (
        "import sys; from llmtrain.cli import main; main(['--help'])\n"
        "print(sorted({'torch', 'hydra', 'pydantic', 'yaml'} & set(sys.modules)))"
    )
    assert run(cwd=tmp_path, code=code).stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("arguments", [["pretrain", "--help"], ["align", "--cfg", "job"], ["sft", "lr=1"]])
def test_help_config_and_faults_do_without_torch(arguments: list[str], tmp_path: Path) -> None:
    code = (
        f"import sys; from llmtrain.cli import main; main({arguments!r})\n"
        "print(sorted({'torch', 'accelerate', 'datasets'} & set(sys.modules)))"
    )
    assert run(cwd=tmp_path, code=code).stdout.splitlines()[-1] == "[]"


def test_the_size_of_a_model_needs_torch_and_no_stage(tmp_path: Path) -> None:
    """Each of these takes as long to import as the answer takes."""
    code = (
        "import sys; from llmtrain.cli import main; main(['show', 'model=gpt3_175b'])\n"
        "heavy = {'accelerate', 'datasets', 'huggingface_hub.hf_api', 'transformers', 'wandb', 'torch._dynamo',\n"
        "         'torch.distributed.checkpoint', 'torch.distributed.fsdp'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert run(cwd=tmp_path, code=code).stdout.splitlines()[-1] == "[]"


def test_stage_help_lists_every_key_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["align", "--help"]) == 0
    text = capsys.readouterr().out
    assert "model.init_from = null" in text
    assert "method=ppo:" in text
    assert "method.kl_target = null   (a number > 0, or null)" in text
    assert "Name of the run; its folder is" in text
    assert "schedule    constant, cosine*, inverse_sqrt" in text


def test_stage_help_shows_the_values_that_hold(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretrain", "model=bench_a", "--help"]) == 0
    assert "model.num_layers = 6 " in capsys.readouterr().out


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretain"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no command 'pretain'; did you mean pretrain?")
    assert "align, pipeline" in error


@pytest.mark.parametrize("arguments", [["pretrain", "--foo"], ["pretrain", "--cfg", "nope"], ["--cfg", "job"]])
def test_wrong_flags_are_messages(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_config_fault_is_one_quick_message_without_traceback(tmp_path: Path) -> None:
    run("pretrain", "lr=1", cwd=tmp_path)
    start = time.monotonic()
    result = run("pretrain", "lr=1", "train.steps=x", cwd=tmp_path)
    elapsed = time.monotonic() - start
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: 2 faults in the config of `llmtrain pretrain`")
    assert "Traceback" not in result.stderr
    assert elapsed < 5  # 0.5 s on a quiet machine: far less than importing torch
    assert list(tmp_path.iterdir()) == []


def test_cfg_job_is_complete_and_valid_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sft", "optimizer.lr=0.25", "--cfg", "job"]) == 0
    text = capsys.readouterr().out
    assert "lr: 0.25" in text
    assert "validation_every: 50" in text
    (tmp_path / "mine.yaml").write_text(text)
    assert cli.main(["sft", "--config-dir", str(tmp_path), "--config-name", "mine", "--cfg", "job"]) == 0
    assert capsys.readouterr().out == text


def test_single_run_leaves_nothing_of_hydra(jobs: list[Any], tmp_path: Path) -> None:
    assert cli.main(["pretrain", "run=a/b"]) == 0
    assert [config.run for config in jobs] == ["a/b"]
    assert list(tmp_path.iterdir()) == []


def test_hydra_override_goes_through_hydra_main(
    jobs: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["pretrain", "hydra.job.name=x", "run=a"]) == 0
    assert [config.run for config in jobs] == ["a"]
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_sweep_gives_each_job_its_own_folder(jobs: list[Any], tmp_path: Path) -> None:
    # no file names engine.threads
    assert cli.main(["pretrain", "-m", "engine.threads=1,2", "model=gpt2_tiny,llama_tiny", "run=grid"]) == 0
    assert [(config.run, config.engine.threads, config.model.positions) for config in jobs] == [
        ("grid/0-engine.threads=1-model=gpt2_tiny", 1, "learned"),
        ("grid/1-engine.threads=1-model=llama_tiny", 1, "rope"),
        ("grid/2-engine.threads=2-model=gpt2_tiny", 2, "learned"),
        ("grid/3-engine.threads=2-model=llama_tiny", 2, "rope"),
    ]
    assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()] == [
        "runs/grid/multirun.yaml"
    ]


def test_swept_run_names_are_taken_as_they_are(jobs: list[Any]) -> None:
    assert cli.main(["pretrain", "-m", "run=a,b"]) == 0
    assert [config.run for config in jobs] == ["a", "b"]


def test_sweep_of_generate_keeps_text_and_model(jobs: list[Any], tmp_path: Path) -> None:
    assert cli.main(["generate", f"model={tmp_path}", "prompt=it's, (so", "-m", "temperature=0.5,1.0"]) == 0
    assert [(config.model, config.prompt, config.temperature) for config in jobs] == [
        (str(tmp_path), "it's, (so", 0.5),
        (str(tmp_path), "it's, (so", 1.0),
    ]


@pytest.mark.parametrize("fault", ["optimizer.lr=1e-3,x", "model=llama_tiny,llama_tny", "optimizer.lrr=1,2"])
def test_faults_of_a_sweep_come_before_its_first_job(
    fault: str, jobs: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["pretrain", "-m", fault]) == 2
    assert jobs == []
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("flags", [["--cfg", "hydra"], ["--cfg", "all"], ["--info", "searchpath"]])
def test_other_flags_of_hydra(flags: list[str], tmp_path: Path) -> None:
    result = run("pretrain", *flags, cwd=tmp_path)
    assert result.returncode == 0
    assert "hydra" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_missing_config_dir(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretrain", "--config-dir", "/no/such"]) == 2
    assert "--config-dir /no/such: no such folder" in capsys.readouterr().err


def test_exit_codes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException) -> None:
        def execute(command: str, config: Any) -> None:
            raise error

        monkeypatch.setattr(cli, "execute", execute)

    monkeypatch.chdir(tmp_path)
    fail(UserError("the disk is full"))
    assert cli.main(["pretrain"]) == 1
    assert capsys.readouterr().err == "error: the disk is full\n"
    assert cli.main(["pretrain", "hydra.job.name=x"]) == 1
    assert capsys.readouterr().err.endswith("error: the disk is full\n")
    fail(KeyboardInterrupt())
    assert cli.main(["pretrain"]) == 130
    fail(RuntimeError("a bug of ours"))
    with pytest.raises(RuntimeError, match="a bug of ours"):
        cli.main(["pretrain"])


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX pipe")
def test_broken_pipe_is_quiet(tmp_path: Path) -> None:
    command = f"{sys.executable} -m llmtrain pretrain --help | head -1"
    environment = {**os.environ, "PYTHONPATH": SOURCE}
    result = subprocess.run(
        command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert result.stderr == ""
    assert result.stdout.startswith("llmtrain pretrain: ")
