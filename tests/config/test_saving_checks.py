"""What is said of keys of saving before anything is read or built."""

import pytest

from llmtrain.config.compose import load_config
from llmtrain.config.errors import ConfigError

OFTEN = "checkpoint.every_steps=10"
CASES = {
    "never saved": (["checkpoint.every_steps=null", "checkpoint.keep_every_steps=5"], "5 is no multiple of"),
    "not all saved": ([OFTEN, "checkpoint.keep_every_steps=15"], "15 is no multiple of checkpoint.every_steps=10"),
    "hours without saves": (
        ["checkpoint.every_steps=null", "checkpoint.keep_every_hours=2"],
        "checkpoint.keep_every_hours: has no effect: only the end of the run is saved",
    ),
    "lost sooner than saved": (
        [OFTEN, "checkpoint.max_lost_steps=9"],
        "9 is less than lies between two saves, with checkpoint.every_steps=10",
    ),
    "nothing beside": (
        [OFTEN, "checkpoint.max_lost_steps=10", "checkpoint.asynchronous=false"],
        "checkpoint.max_lost_steps: has no effect",
    ),
    "no URL": (["checkpoint.mirror=backup"], "checkpoint.mirror: 'backup' is no URL, such as s3://"),
    "decay": (["train.ema_decay=1"], "train.ema_decay"),
}


@pytest.mark.parametrize("name", CASES)
def test_wrong_combinations(name: str) -> None:
    overrides, words = CASES[name]
    with pytest.raises(ConfigError) as raised:
        load_config("pretrain", overrides)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    "overrides",
    [
        [OFTEN, "checkpoint.keep_every_steps=30", "checkpoint.keep_every_hours=1"],
        ["checkpoint.every_steps=null", "checkpoint.every_minutes=5", "checkpoint.keep_every_hours=1"],
        [OFTEN, "checkpoint.max_lost_steps=10"],
        ["train.ema_decay=0.999", "checkpoint.asynchronous=false"],
    ],
)
def test_right_ones(overrides: list[str]) -> None:
    load_config("pretrain", overrides)
