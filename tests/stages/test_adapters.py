"""Stages with adapter=lora, on a model so small that all of it takes seconds."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.stages.test_preference import ARITHMETIC, run
from torch import nn

from llmtrain.commands import show
from llmtrain.config.compose import load_config
from llmtrain.config.errors import UserError
from llmtrain.engine import checkpoints
from llmtrain.models.formats import load_language_model
from llmtrain.models.lora import adapted_layers
from llmtrain.models.peft_folders import add_adapter
from llmtrain.objectives.preference import OnTheFly
from llmtrain.rewards.answers import Answer
from llmtrain.stages import assembly, reward, sft, starts

LORA = ["adapter=lora", "adapter.rank=2", "optimizer.lr=1e-2"]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that a model was loaded from, filled as it happens."""
    folders: list[str] = []
    original = starts.load_policy

    def load(folder: str, *given: Any, **keys: Any) -> Any:
        folders.append(folder)
        return original(folder, *given, **keys)

    monkeypatch.setattr(starts, "load_policy", load)
    return folders


def stage_run(stage: Any, parent: Path, runs: Path, *overrides: str) -> Path:
    """The folder of a run of sft or reward."""
    name = stage.__name__.rpartition(".")[2]
    line = [each for each in ARITHMETIC if name == "sft" or not each.startswith(("eval.max_problems", "eval.max_new"))]
    stage.run(load_config(name, [*line, f"model.init_from={parent}", f"runs_dir={runs}", "run=a", *LORA, *overrides]))
    return runs / "a"


@pytest.mark.parametrize("method", ["dpo", "kto", "ipo"])
def test_the_reference_is_the_policy_with_its_adapters_off(
    parent: Path,
    tmp_path: Path,
    method: str,
    loaded: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: list[tuple[nn.Module, torch.Tensor]] = []
    original = OnTheFly.__call__

    def watched(self: OnTheFly, batch: Any) -> torch.Tensor:
        found.append((batch, original(self, batch)))
        return found[-1][1]

    monkeypatch.setattr(OnTheFly, "__call__", watched)
    rows = run(parent, tmp_path, "lora", f"method={method}", *LORA)
    assert len(loaded) == 1, "no second model in memory"
    assert rows[0]["eval/log_ratio"] == rows[1]["train/log_ratio"] == 0.0
    assert rows[-1]["eval/log_ratio"] != 0.0
    if method == "dpo":
        assert rows[1]["train/loss"] == pytest.approx(math.log(2), abs=1e-7)
    if method != "kto":
        start = OnTheFly(load_language_model(parent).eval())
        assert len(found) > 4
        assert all(torch.equal(original(start, batch), logprobs) for batch, logprobs in found), "to the bit, to the end"


def test_with_a_second_model_as_reference_the_run_is_the_same_to_the_bit(
    parent: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    loaded: list[str],
) -> None:
    off = run(parent, tmp_path, "off", "method=dpo", *LORA)
    second = starts.load_start(load_config("align", [f"model.init_from={parent}"]), dropout=0.0)
    monkeypatch.setattr(starts, "load_reference", lambda *_: second.eval())
    assert run(parent, tmp_path, "second", "method=dpo", *LORA) == off
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("off", "second")]
    assert weights[0] == weights[1]


def test_modules_that_are_trained_as_they_are_bring_the_second_model_back(
    parent: Path,
    tmp_path: Path,
    loaded: list[str],
) -> None:
    rows = run(parent, tmp_path, "norms", "method=dpo", *LORA, "adapter.also_train=['.*norm']")
    assert len(loaded) == 2
    assert rows[-1]["eval/log_ratio"] != 0.0


def even_tokens(answers: Sequence[Answer]) -> list[float]:
    """A reward that differs between the answers of a model that knows nothing."""
    return [sum(token % 2 == 0 for token in each.tokens) / len(each.tokens) for each in answers]


@pytest.mark.parametrize("method", ["ppo", "grpo", "rloo", "reinforce", "online_dpo"])
def test_methods_that_sample_hold_one_model(parent: Path, tmp_path: Path, method: str, loaded: list[str]) -> None:
    rewards = [f"rewards.even={{_target_:{__name__}.even_tokens}}"]
    samples = [] if method in ("ppo", "reinforce") else ["method.samples_per_prompt=2"]
    rows = run(parent, tmp_path, method, f"method={method}", "method.max_new_tokens=6", *rewards, *samples, *LORA)
    assert len(loaded) == 1
    assert rows[1].get("align/kl", rows[1].get("train/log_ratio")) == 0.0
    assert rows[-1].get("align/kl", rows[-1].get("train/log_ratio")) != 0.0
    if method == "ppo":
        assert rows[1]["train/ratio_max"] >= 1.0
        saved = checkpoints.read_model(tmp_path / method / "checkpoints" / "step-00000003")
        assert {name.rpartition(".adapters.")[2] for name in saved if ".adapters." in name} == {
            f"{adapters}.lora_{matrix}" for adapters in ("default", "value") for matrix in "AB"
        }
        assert saved["value.weight"].abs().max() > 0
    final, kept = (
        starts.load_policy(str(tmp_path / method / place)).state_dict() for place in ("", "checkpoints/step-00000003")
    )
    assert all(torch.equal(value, kept[name]) for name, value in final.items())


def test_a_precomputed_reference_is_shared_with_runs_without_adapters(
    parent: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(parent, tmp_path, "plain", "method=dpo", "method.reference=precomputed")
    capsys.readouterr()
    run(parent, tmp_path, "lora", "method=dpo", "method.reference=precomputed", *LORA)
    assert "the reference reads" not in capsys.readouterr().err


def test_what_a_run_leaves_behind(
    parent: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = stage_run(sft, parent, tmp_path)
    assert "adapter=lora: " in capsys.readouterr().err
    start, model = load_language_model(parent), load_language_model(folder / "model")
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, start.state_dict()[name])}
    block = "trunk.blocks.0."
    layers = ("attention.qkv", "attention.output", "feed_forward.gate_up", "feed_forward.down")
    assert changed == {f"{block}{layer}.weight" for layer in layers}

    add_adapter(start, folder / "adapter")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(start.state_dict()[name], value, rtol=1e-6, atol=1e-6)
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        parent
    )

    checkpoint = folder / "checkpoints" / "step-00000003"
    saved = checkpoints.read_model(checkpoint)
    assert len(saved) == 2 * len(layers), "an A and a B for each layer, and no frozen weight"
    again = starts.load_policy(str(checkpoint))
    assert not list(adapted_layers(again))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


def test_a_reward_model_trains_its_head_too_and_its_checkpoint_is_whole_again(
    parent: Path,
    tmp_path: Path,
) -> None:
    folder = stage_run(reward, parent, tmp_path)
    model = starts.load_reward_model(str(folder))
    again = starts.load_reward_model(str(folder / "checkpoints" / "step-00000003"))
    for name, value in model.state_dict().items():
        if not name.startswith("score_"):  # measured at the end of the run
            assert torch.equal(value, again.state_dict()[name]), name
    assert "base_model.model.score.weight" in load_file(folder / "adapter" / "adapter_model.safetensors")


def test_a_checkpoint_whose_start_has_changed_is_refused(parent: Path, tmp_path: Path) -> None:
    copy = tmp_path / "start"
    copy.mkdir()
    for path in parent.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    checkpoint = stage_run(sft, copy, tmp_path) / "checkpoints" / "step-00000003"
    starts.load_policy(str(checkpoint))
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match="holds adapters alone"):
        starts.load_policy(str(checkpoint))


def test_a_stage_goes_on_from_weights_with_an_adapter(parent: Path, tmp_path: Path) -> None:
    first = stage_run(sft, parent, tmp_path / "first")
    overrides = [f"model.init_from={parent}", f"model.adapter_from={first / 'adapter'}"]
    start = starts.load_start(load_config("sft", overrides)).state_dict()
    for name, value in load_language_model(first / "model").state_dict().items():
        torch.testing.assert_close(start[name], value, rtol=1e-6, atol=1e-6)
    rows = run(parent, tmp_path, "dpo", "method=dpo", *LORA, overrides[1])
    assert rows[0]["eval/log_ratio"] == 0.0
    parents = json.loads((tmp_path / "dpo" / "lineage.json").read_text())["parents"]
    assert parents["adapter"]["folder"] == str(first / "adapter")
    checkpoint = starts.load_policy(str(tmp_path / "dpo" / "checkpoints" / "step-00000003")).state_dict()
    for name, value in load_language_model(tmp_path / "dpo" / "model").state_dict().items():
        assert torch.equal(checkpoint[name], value), name


def test_show_says_how_much_will_be_trained(parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of_stage = [f"model.init_from={parent}", "adapter=lora", "adapter.rank=2", "adapter.targets=[attention.output]"]
    said = ",".join(f"'{text}'" for text in [*of_stage, "data.sources.arithmetic.max_rows=8"])
    show.run(load_config("show", ["stage=reward", "rows=1", f"runs_dir={tmp_path}", f"overrides=[{said}]"]))
    weights = sum(each.numel() for each in load_language_model(parent).parameters())
    assert f"adapter=lora: {2 * 32 + 16} of {weights + 2 * 32 + 16:,} parameters are trained" in capsys.readouterr().out


def test_without_adapters_nothing_is_wrapped(parent: Path) -> None:
    config = load_config("sft", [f"model.init_from={parent}"])
    model = starts.load_start(config)
    before = dict(model.named_modules())
    assert dict(assembly.Run.adapt(assembly.Run(config, parent, None, 0.0), model).named_modules()) == before  # type: ignore[arg-type]
    assert all(each.requires_grad for each in model.parameters())
