"""What cannot go through a pipeline is refused by name before torch is imported."""

import pytest

from llmtrain.config.compose import load_config
from llmtrain.config.errors import ConfigError

TWO = "engine.processes=2 engine.pipeline_parallel=2 train.micro_batch_rows=2 "


@pytest.fixture(autouse=True)
def _not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("pretrain engine.pipeline_schedule=gpipe", "engine.pipeline_schedule: has no effect: there is no pipeline"),
        (
            "pretrain engine.processes=2 engine.pipeline_parallel=2",
            "train.micro_batch_rows: 16 rows are 1 micro-batches, and a pipeline of 2 wants 2 at least: set it to 8",
        ),
        (
            f"pretrain {TWO} train.micro_batch_rows=6 engine.pipeline_schedule=interleaved model.num_layers=4",
            "train.micro_batch_rows: 16 rows are 3 micro-batches, and engine.pipeline_schedule=interleaved wants a",
        ),
        (f"pretrain {TWO} model.num_layers=1", "makes 2 stages, and there are fewer layers: model.num_layers=1"),
        (
            f"pretrain {TWO} engine.pipeline_schedule=interleaved model.num_layers=3",
            "engine.pipeline_parallel: 2 with engine.pipeline_schedule=interleaved makes 4 stages",
        ),
        (f"pretrain {TWO} model.positions=relative", "engine.pipeline_parallel: does not go with model.positions=rel"),
        (f"pretrain {TWO} model=mixtral_tiny", "engine.pipeline_parallel: does not go with experts"),
        (f"pretrain {TWO} model=t5_tiny objective=span_corruption", "go with model.architecture=encoder_decoder"),
        (f"pretrain {TWO} engine.compile=true", "engine.compile: the stages of a pipeline are not compiled"),
        (
            f"pretrain {TWO} engine.processes=4 engine.sharding=fsdp",
            "engine.pipeline_parallel: each process of a pipeline holds its layers whole: use engine.sharding=ddp",
        ),
        (
            f"pretrain {TWO} engine.processes=4 engine.tensor_parallel=2",
            "engine.pipeline_parallel: does not go with engine.tensor_parallel",
        ),
        (f"sft {TWO} adapter=lora", "engine.pipeline_parallel: adapters are not divided by layers"),
        (f"align {TWO} method=grpo", "engine.pipeline_parallel: does not go with method=grpo, which samples answers"),
        (
            "pretrain engine.pipeline_parallel=2",
            "engine.pipeline_parallel=2 does not divide the number of processes, 1",
        ),
    ],
)
def test_it_is_refused_with_these_words(overrides: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(*_split(overrides))
    assert words in " ".join(str(caught.value).split())


@pytest.mark.parametrize(
    "overrides",
    [
        f"pretrain {TWO} engine.pipeline_schedule=interleaved model.num_layers=4",
        f"pretrain {TWO} engine.processes=4",
        f"sft {TWO}",
        f"reward {TWO}",
        f"align {TWO} method=dpo",
    ],
)
def test_it_is_taken(overrides: str) -> None:
    assert load_config(*_split(overrides)).engine.pipeline_parallel == 2


def _split(text: str) -> tuple[str, list[str]]:
    command, *overrides = text.split()
    return command, overrides
