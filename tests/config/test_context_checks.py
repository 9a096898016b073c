"""What cannot be computed by positions of a row is refused by name before torch is imported."""

import pytest

from llmtrain.config.compose import load_config
from llmtrain.config.errors import ConfigError

TWO = "engine.processes=2 engine.context_parallel=2 "


@pytest.fixture(autouse=True)
def _not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (f"reward {TWO}", "engine.context_parallel: is for pretrain and sft: the loss of reward is of whole rows."),
        (f"align {TWO} method=dpo", "engine.context_parallel: is for pretrain and sft: the loss of align"),
        (f"pretrain {TWO} model=bert_tiny", "engine.context_parallel: does not go with model.architecture=encoder"),
        (
            f"pretrain {TWO} objective=masked model.init_from=elsewhere",
            "engine.context_parallel: does not go with objective=masked",
        ),
        (f"pretrain {TWO} model=mixtral_tiny", "engine.context_parallel: does not go with experts"),
        (f"pretrain {TWO} model.stochastic_depth=0.1", "does not go with stochastic depth"),
        (f"pretrain {TWO} engine.compile=true", "engine.compile: with context parallelism nothing is compiled"),
        (f"pretrain {TWO} engine.processes=4 engine.sharding=fsdp", "hold the model whole: use engine.sharding=ddp"),
        (
            f"pretrain {TWO} engine.processes=4 engine.tensor_parallel=2",
            "engine.context_parallel: does not go with engine.tensor_parallel",
        ),
        (
            f"pretrain {TWO} engine.processes=4 engine.pipeline_parallel=2",
            "engine.pipeline_parallel: does not go with engine.context_parallel",
        ),
        (f"sft {TWO} adapter=lora", "engine.context_parallel: adapters are not trained by positions"),
        ("pretrain engine.context_parallel=2", "engine.context_parallel=2 does not divide the number of processes"),
    ],
)
def test_it_is_refused_with_these_words(overrides: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(*_split(overrides))
    assert words in " ".join(str(caught.value).split())


@pytest.mark.parametrize(
    "overrides",
    [
        f"pretrain {TWO} model.positions=alibi model.sliding_window=64",
        f"pretrain {TWO} engine.processes=4 objective=prefix",
        f"sft {TWO} data.packing=true",
    ],
)
def test_it_is_taken(overrides: str) -> None:
    assert load_config(*_split(overrides)).engine.context_parallel == 2


def _split(text: str) -> tuple[str, list[str]]:
    command, *overrides = text.split()
    return command, overrides
