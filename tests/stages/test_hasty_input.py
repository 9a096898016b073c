"""What hasty and hostile input to the later stages is told: one message that says where, not a traceback."""

import json
import shutil
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import COMMANDS

from llmtrain import cli
from llmtrain.models.formats import save_model
from llmtrain.stages.starts import load_policy

SHORT = ["train.steps=1", "schedule.warmup_steps=0"]


def asked(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """The exit code, and what was said on standard error."""
    capsys.readouterr()
    code = cli.main(list(arguments))
    return code, capsys.readouterr().err


def rows_file(folder: Path, *rows: dict[str, Any]) -> list[str]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["data=files", f"data.sources.files.path={path}"]


def stage(name: str, parent: Path, *keys: str) -> list[str]:
    own = [key for key in COMMANDS[name] if not key.startswith("data.sources.arithmetic")]
    return [*own, *SHORT, f"model.init_from={parent}", f"runs_dir={parent.parent}/runs", f"run={name}", *keys]


ASKED = {"prompt": "What is 1 + 1?", "chosen": "2", "rejected": "3"}
ROWS: dict[str, tuple[str, list[dict[str, Any]], str]] = {
    "a score beyond float32": (
        "reward", [{"prompt": "a", "answers": ["x", "y"], "scores": [1e39, 0]}],
        "must be a number of at most 1e+38",
    ),
    "a history that is no list": (
        "sft", [{"instruction": "a", "history": 5, "output": "b"}], "`history` must be a list of [question, answer]",
    ),
    "a role that is no name": (
        "sft", [{"messages": [{"role": None, "content": "x"}, {"role": "assistant", "content": "y"}]}],
        "role must be a name, found",
    ),
    "a pair of one text": ("reward", [ASKED | {"rejected": "2"}] * 20, "chosen and rejected are the same"),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_rows(name: str, parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command, rows, says = ROWS[name]
    problems = ["eval.problems=embedded:arithmetic"] * (command == "sft")
    code, errors = asked(capsys, *stage(command, parent, *rows_file(tmp_path, *rows), *problems))
    assert code == 2
    message = errors[errors.index("error: ") :]
    assert says in message
    assert len(message.splitlines()) <= 10


def test_a_problem_that_fills_the_model_is_cut_so_that_an_answer_has_room(
    parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "problems.jsonl").write_text(json.dumps({"prompt": "What is 1 + 1? " * 90, "answer": "2"}))
    keys = ["train.sequence_length=128", f"eval.problems={tmp_path / 'problems.jsonl'}", "run=long"]
    code, errors = asked(capsys, *stage("sft", parent, *keys))
    assert code == 0, errors


@pytest.mark.parametrize(
    ("text", "path", "says"),
    [
        ("def f(:", "broken_rewards.f", "broken_rewards fails: SyntaxError"),
        ("raise RuntimeError('boom')", "broken_rewards.f", "broken_rewards fails: RuntimeError: boom"),
        ("", ".broken_rewards.f", "expected an import path such as package.module.Name"),
    ],
)
def test_a_module_of_ones_own_that_cannot_be_imported(
    text: str, path: str, says: str, parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "broken_rewards.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("broken_rewards", None)
    code, errors = asked(capsys, *stage("reinforce", parent, f"rewards.mine={{_target_:{path}}}"))
    assert code == 2
    assert f"rewards.mine._target_={path!r}: " in errors
    assert says in errors


def test_a_reward_model_for_shorter_rows(parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = shutil.copytree(parent, tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16}))
    code, errors = asked(capsys, *stage("ppo", parent, f"reward_model={short}"))
    assert code == 2
    assert "reads 16 tokens, and prompts with their answers may have 128" in errors


def test_a_reward_model_with_other_special_tokens(
    parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(parent, tmp_path / "other")
    text = (other / "tokenizer.json").read_text()
    swapped = text.replace("<|user|>", "<|x|>").replace("<|assistant|>", "<|user|>").replace("<|x|>", "<|assistant|>")
    assert swapped != text
    (other / "tokenizer.json").write_text(swapped)
    code, errors = asked(capsys, *stage("ppo", parent, f"reward_model={other}"))
    assert code == 2
    assert "has another tokenizer than the policy" in errors


def test_generate(parent: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, errors = asked(capsys, "generate", f"model={parent}", "prompt=x", "temperature=1e-40")
    assert code == 2
    assert "temperature: 1e-40 is too near to 0 to divide by" in errors
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(b"hi \xff"), encoding="utf-8"))
    code, errors = asked(capsys, "generate", f"model={parent}", "prompt=-")
    assert (code, errors) == (1, "error: standard input: not UTF-8: byte 3 is 0xff\n")


def test_a_kept_reference_that_is_no_number_is_made_again(parent: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = stage("dpo", parent, "method.reference=precomputed", "data.sources.arithmetic.max_rows=64")
    assert asked(capsys, *command, "run=first")[0] == 0
    kept = list((parent.parent / "runs" / "cache").glob("reference-*.safetensors"))
    before = {path: load_file(path)["logprobs"] for path in kept}
    assert before
    for path, logprobs in before.items():
        save_file({"logprobs": torch.full_like(logprobs, torch.nan)}, path)
    assert asked(capsys, *command, "run=second")[0] == 0
    for path, logprobs in before.items():
        assert torch.equal(load_file(path)["logprobs"], logprobs)


@pytest.mark.parametrize("fault", [{"r": "4"}, {"r": None}, {"lora_alpha": "8"}, {"lora_alpha": float("inf")}])
def test_an_adapter_of_strange_numbers(
    fault: dict[str, Any], parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | fault))
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    code, errors = asked(capsys, *stage("sft", parent, f"model.adapter_from={tmp_path}"))
    assert code == 1
    assert "adapter_config.json asks for what is not supported" in errors


def test_a_finished_stage_of_a_pipeline_is_held_against_its_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a stage in which nothing is measured has no numbers in the table."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    rows = rows_file(tmp_path, {"instruction": "What is 1 + 1?", "output": "2"})

    def write(rate: float) -> None:
        own = [key for key in COMMANDS["sft"][1:] if not key.startswith(("data.", "eval."))]
        stages = {
            "base": {"command": "pretrain", "overrides": [*COMMANDS["pretrain"][1:], *SHORT]},
            "sft": {
                "command": "sft", "model": "base",
                "overrides": [*own, *SHORT, *rows, "eval.problems=null", f"optimizer.lr={rate}"],
            },
        }  # fmt: skip
        for each in stages.values():
            each["overrides"] = [key for key in each["overrides"] if not key.startswith("run=")]
        (tmp_path / "configs" / "road.yaml").write_text(json.dumps({"stages": stages}))

    write(1e-3)
    command = ["pipeline", "--config-name", "road", "runs_dir=runs", "run=road"]
    for _ in range(2):
        code, errors = asked(capsys, *command)
        assert code == 0, errors
    assert errors.count("finished earlier") == 2
    write(5e-1)
    code, errors = asked(capsys, *command)
    assert code == 2
    assert "holds a run with another config:\n  optimizer.lr: " in errors
    write(1e-3)
    policy = load_policy("runs/road/base")
    with torch.no_grad():
        policy.head_weight.mul_(1.5)
    save_model(Path("runs/road/base/model"), policy)
    code, errors = asked(capsys, *command)
    assert code == 2
    assert "have changed since the run began" in errors
