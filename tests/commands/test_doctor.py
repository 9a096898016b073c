"""llmtrain doctor: a table, and an exit code that scripts can read."""

import resource

import pytest
import torch
from tests.tiny import start

from llmtrain import cli
from llmtrain.doctor import checks, losses, training
from llmtrain.doctor.measurement import Measurement, Skipped


def ask(capsys: pytest.CaptureFixture[str], *overrides: str) -> tuple[int, str, str]:
    """Exit code, output, errors."""
    code = cli.main(["doctor", "device=cpu", *overrides])
    return (code, *capsys.readouterr())


def test_the_table_says_what_was_expected_and_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "CHECKS", (losses.whitening, losses.first_dpo_step))
    code, output, errors = ask(capsys)
    assert (code, errors) == (0, "")
    for words in (f"torch {torch.__version__}", "bfloat16", "compiler", "checked on  cpu", "6 of 6 pass, in"):
        assert words in output
    [line] = [line for line in output.splitlines() if "ln 2" in line]
    assert line.split()[-5:] == ["0.6931472", "0.6931472", "±", "1e-06", "pass"]


def test_a_broken_implementation_is_told_and_the_exit_code_is_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "CHECKS", (losses.whitening, losses.first_dpo_step))
    monkeypatch.setattr(losses, "whiten", lambda values, mask, shift_mean=True: values)
    code, output, errors = ask(capsys)
    assert code == 1
    assert "3 of 6 pass" in output
    assert output.count("FAILED") == 3
    assert errors.startswith("error: 3 of 6 measurements are off on this machine (whitening). What is trained here")
    assert "Traceback" not in errors


def test_a_check_that_cannot_be_made_is_skipped_and_one_that_raises_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(device: torch.device) -> list[Measurement]:
        raise Skipped("there is no compiler")

    def torn_library(device: torch.device) -> list[Measurement]:
        raise RuntimeError("illegal instruction\nand what led there")

    monkeypatch.setattr(checks, "CHECKS", (no_compiler, losses.first_dpo_step))
    code, output, _ = ask(capsys)
    assert code == 0
    assert "no compiler: skipped: there is no compiler" in output
    assert "3 of 3 pass" in output
    monkeypatch.setattr(checks, "CHECKS", (torn_library, losses.first_dpo_step))
    code, output, errors = ask(capsys)
    assert code == 1
    assert "torn library: FAILED: RuntimeError: illegal instruction" in output
    assert "1 of 4 measurements are off" in errors


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "device=cuda"]) == 2
    assert capsys.readouterr().err.startswith("error: device=cuda: torch sees no GPU here")


@pytest.mark.slow
def test_all_of_it_passes_in_under_a_minute() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = start(["doctor", "device=cpu"])
    output, errors = process.communicate(timeout=280)
    assert process.returncode == 0, output + errors
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # of the processor, which others on the machine do not make longer
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60
    assert "FAILED" not in output
    assert "compiled: loss" in output


def test_the_compiler_may_be_left_out(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "CHECKS", (losses.first_dpo_step, training.compiling))
    monkeypatch.setattr(training, "has_compiler", lambda device: False)
    assert "compiling: skipped: no C++ compiler" in ask(capsys)[1]
    assert "compil" not in ask(capsys, "compile=false")[1].split("expected")[1]
