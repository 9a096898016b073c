"""The layers of a model on two processes: the same gradients, the same answers, the same state as in one."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.invariance.test_gradients import (
    ALONE,
    CONFIG,
    OBJECTIVES,
    PREFERENCE,
    VOCAB,
    Fixed,
    global_batch,
    language_model,
    plain_gradients,
    relative_error,
    trained_gradients,
    trainer,
)
from torch import Tensor, nn

from llmtrain.config.errors import ConfigError, UserError
from llmtrain.config.schema import EngineConfig
from llmtrain.engine import checkpoints
from llmtrain.engine.distributed import Layout, arrange, barrier, full_state, is_sharded, join, leave, spread
from llmtrain.engine.launching import launch
from llmtrain.engine.pipeline import pipeline_of
from llmtrain.engine.snapshots import Snapshots
from llmtrain.objectives.next_token import NextToken

DIVIDED = (
    "next_token", "sft", "packed", "prefix", "masked", "two segments", "mup", "bradley_terry", "rankings", *PREFERENCE,
    "kto",
)  # fmt: skip
assert set(DIVIDED) < set(OBJECTIVES)
MICRO_BATCHES = (1, 3)  # 3: of eight rows, the last has fewer
SCHEDULES = ("1f1b", "gpipe", "interleaved")
DEEP = dataclasses.replace(CONFIG, num_layers=5)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every figure of a run of two processes, and the folder of its checkpoints."""
    folder = tmp_path_factory.mktemp("pipelines")
    for tied in (False, True):
        train(ALONE, tied, folder / f"alone {tied}")
    launch(measure, (folder,), 2)
    figures: dict[str, Any] = json.loads((folder / "figures.json").read_text())
    return figures | {"folder": folder}


@pytest.mark.parametrize("objective", DIVIDED)
def test_gradient_is_that_of_the_whole_batch(objective: str, measured: dict[str, Any]) -> None:
    for micro in MICRO_BATCHES:
        assert measured["objectives"][f"{objective}/{micro}"] <= 1e-5, f"micro-batches of {micro}"


@pytest.mark.parametrize("tied", [False, True], ids=["two tables", "one table"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_trains_clips_and_saves_as_one_process(
    schedule: str, tied: bool, measured: dict[str, Any]
) -> None:
    figures = measured["schedules"][f"{schedule}/{tied}"]
    assert figures["answers"] == 0.0, "the whole model's, from both processes"
    assert figures["counted"] == sum(each.numel() for each in deep(tied).parameters())
    assert figures["loaded"], "what one process has saved, to the bit"
    assert figures["both tables"]
    expected = train(ALONE, tied)
    assert figures["norms"] == pytest.approx(expected.pop("norms").tolist(), rel=1e-5)
    folder = measured["folder"] / f"{schedule} {tied}"
    state = train(ALONE, tied, load=folder / "step-00000003")
    saved = torch.load(folder / "state.pt")
    assert state.keys() == saved.keys() == expected.keys()
    for name, value in saved.items():
        assert torch.equal(value, state[name]), name
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def test_activations_may_be_computed_again(measured: dict[str, Any]) -> None:
    assert measured["computed again"] <= 1e-5


def test_fewer_layers_than_stages_are_told(measured: dict[str, Any]) -> None:
    assert measured["told"] == (
        "engine.pipeline_parallel=2 with engine.pipeline_schedule=interleaved makes 4 stages, and the model has 2 "
        "layers; use fewer processes or another schedule"
    )


class Failing(NextToken):
    """Fails where the last stage is."""

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        super().__call__(model, batch)
        raise UserError("this batch cannot be learned: leave it out")


def fail() -> None:
    layout = arranged(join("cpu", threads=1), "1f1b")
    model = spread(language_model(1), layout)
    made, _ = trainer(model, Fixed(global_batch("sft")), Failing(), layout, 2)
    made.updates()(0, made.batches(0))


@pytest.mark.slow
def test_what_fails_in_a_stage_is_told_as_it_is() -> None:
    with pytest.raises(UserError, match=r"^this batch cannot be learned: leave it out$"):
        launch(fail, (), 2)


def measure(folder: Path) -> None:
    """In each of two processes: all cases; process 0 writes the figures."""
    joined = join("cpu", threads=1)
    figures: dict[str, Any] = {"objectives": {}, "schedules": {}}
    layout = arranged(joined, "1f1b")
    for name in DIVIDED:
        expected = plain_gradients(name)
        for micro in MICRO_BATCHES:
            found = of_both(trained_gradients(name, layout, micro)[0])
            figures["objectives"][f"{name}/{micro}"] = relative_error(found, expected[0])
    for schedule in SCHEDULES:
        for tied in (False, True):
            figures["schedules"][f"{schedule}/{tied}"] = measure_schedule(arranged(joined, schedule), tied, folder)
    part = language_model(1)
    part.trunk.recompute = "full"
    made, optimizer = trainer(spread(part, layout), Fixed(global_batch("packed")), NextToken(z_loss=1e-3), layout, 2)
    made.updates()(0, made.batches(0))
    figures["computed again"] = relative_error(of_both(optimizer.seen[0]), plain_gradients("packed")[0])
    with pytest.raises(ConfigError) as told:
        spread(language_model(1), arranged(joined, "interleaved"))
    if joined.is_main:
        (folder / "figures.json").write_text(json.dumps(figures | {"told": str(told.value)}))
    leave()


def arranged(layout: Layout, schedule: Any) -> Layout:
    return arrange(layout, EngineConfig(pipeline_parallel=2, pipeline_schedule=schedule))


def of_both(own: dict[str, Tensor]) -> dict[str, Tensor]:
    boxes: list[Any] = [None, None]
    dist.all_gather_object(boxes, own)
    return {**boxes[0], **boxes[1]}


def measure_schedule(layout: Layout, tied: bool, folder: Path) -> dict[str, Any]:
    part = deep(tied)
    model = spread(part, layout)
    pipeline = pipeline_of(model)
    assert pipeline is not None
    assert is_sharded(model)
    assert not is_sharded(deep(tied))
    tokens = torch.randint(0, VOCAB, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        answers = float((model(tokens) - deep(tied)(tokens)).abs().max())
    counted = torch.tensor(sum(each.numel() for each in pipeline.counted()))
    dist.all_reduce(counted)
    loaded = train(layout, tied, load=folder / f"alone {tied}" / "step-00000003")
    alone = torch.load(folder / f"alone {tied}" / "state.pt")
    name = f"{layout.pipeline_schedule} {tied}"
    found = train(layout, tied, folder / name)
    tables = of_both({f"{layout.rank}": found["model.trunk.token_embedding.weight"]})
    return {
        "answers": answers, "counted": int(counted), "norms": found["norms"].tolist(),
        "loaded": all(torch.equal(value, alone[key]) for key, value in loaded.items()),
        "both tables": torch.equal(tables["0"], tables["1"]),
    }  # fmt: skip


def deep(tied: bool) -> nn.Module:
    return language_model(1, dataclasses.replace(DEEP, tied_embeddings=tied))


def train(layout: Layout, tied: bool, folder: Path | None = None, load: Path | None = None) -> dict[str, Tensor]:
    """The whole state after three clipped steps, and the norms; or of a checkpoint."""
    part = deep(tied)
    model = spread(part, layout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    state = partial(checkpoints.training_state, model, optimizer, {})
    if load is not None:
        checkpoints.load(checkpoints.read(load), state(), layout)
        return gathered(model, state())
    made, _ = trainer(model, Fixed(global_batch("packed")), NextToken(), layout, 2)
    updates = dataclasses.replace(made.updates(), optimizer=optimizer, max_grad_norm=0.3)
    norms = [updates(step, made.batches(step))[0]["train/grad_norm"][0] for step in range(3)]
    found = gathered(model, state())
    if folder is not None:
        checkpoints.save(folder, 3, Snapshots(layout, aside=False).take(state()), layout, metrics={})
        barrier(layout)
        if layout.is_main:
            torch.save(found, folder / "state.pt")
    return found | {"norms": torch.stack(norms)}


def gathered(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    pipeline = pipeline_of(model)
    if pipeline is None:
        return {name: value.clone() for name, value in state.items()}
    own = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
    assert set(own) < set(full_state(model))
    return {name: value.clone() for name, value in pipeline.whole(state).items()}
