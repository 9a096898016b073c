"""What is said of adapters before anything is loaded."""

from pathlib import Path

import pytest

from llmtrain.config.compose import load_config
from llmtrain.config.errors import ConfigError
from llmtrain.config.schema import LoraConfig, NoAdapterConfig

CASES = {
    "rank": (["sft", "adapter=lora", "adapter.rank=0"], "adapter.rank: 0 is not allowed; it takes a whole number >= 1"),
    "no adapter": (["sft", "adapter.rank=8"], "adapter.rank: unknown key; adapter=none has the keys name"),
    "other adapter": (["sft", "adapter=lor"], "adapter: no option lor; did you mean lora?"),
    "random weights": (["pretrain", "adapter=lora"], "adapter.name: random weights are nothing to adapt"),
    "no weights": (["pretrain", "model.adapter_from=."], "model.adapter_from: has no effect: name the weights"),
    "not there": (["sft", "model.adapter_from=a/b"], "model.adapter_from: no such file or folder: a/b"),
    "dropout": (["align", "adapter=lora", "adapter.dropout=0.1"], "adapter.dropout: has no effect: align is without"),
    "pattern": (["sft", "adapter=lora", "adapter.targets=['(']"], "adapter.targets: '(' is no regular expression"),
    "no targets": (["reward", "adapter=lora", "adapter.targets=[]"], "adapter.targets: needs at least one module"),
}


@pytest.mark.parametrize("case", CASES)
def test_faults(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [command, *overrides], message = CASES[case]
    with pytest.raises(ConfigError) as raised:
        load_config(command, overrides)
    assert message in str(raised.value)


@pytest.mark.parametrize("command", ["sft", "reward", "align"])
def test_choices(command: str) -> None:
    assert load_config(command).adapter == NoAdapterConfig()
    chosen = load_config(command, ["adapter=lora", "adapter.rank=8", "adapter.targets=[q_proj]"])
    assert chosen.adapter == LoraConfig(rank=8, targets=["q_proj"])
