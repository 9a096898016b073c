"""The positions of rows on two processes: the same gradients and the same answers as in one."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.invariance.test_gradients import (
    CONFIG,
    VOCAB,
    Fixed,
    global_batch,
    language_model,
    relative_error,
    trainer,
)
from tests.invariance.test_processes import assert_same_run, pretrain, rewind
from tests.tiny import COMMANDS, finish, starting_from

from llmtrain.config.errors import ConfigError
from llmtrain.config.schema import EngineConfig, ModelConfig
from llmtrain.engine.distributed import Layout, arrange, bare, join, leave, spread
from llmtrain.engine.launching import launch
from llmtrain.objectives.next_token import NextToken
from llmtrain.objectives.own_positions import OwnPositions, own_columns, padded_length

CONTEXT = ["engine.processes=2", "engine.context_parallel=2"]
BATCHES = ("next_token", "sft", "packed", "prefix")
PARTS: dict[str, dict[str, Any]] = {
    "rotary": {}, "windows": {"sliding_window": 5, "attention_pattern": ["sliding", "full"]},
    "alibi": {"positions": "alibi"}, "sinks": {"attention_sinks": True}, "relative": {"positions": "relative"},
    "learned": {"positions": "learned", "tied_embeddings": True, "max_sequence_length": 33},
    "sinusoidal, capped": {"positions": "sinusoidal", "attention_softcap": 3.0, "qk_norm": "head"},
}  # fmt: skip
REFUSED: dict[str, dict[str, Any]] = {
    "architecture encoder": {"architecture": "encoder"}, "stochastic depth": {"stochastic_depth": 0.1}
}  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every figure of a run of two processes."""
    path = tmp_path_factory.mktemp("contexts") / "figures.json"
    launch(measure, (path,), 2)
    figures: dict[str, Any] = json.loads(path.read_text())
    return figures


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("parts", PARTS)
def test_gradient_is_that_of_whole_rows(parts: str, batch: str, measured: dict[str, Any]) -> None:
    figures = measured[f"{parts}/{batch}"]
    assert figures["gradient"] <= 1e-5
    assert figures["loss"] <= 1e-5
    assert figures["answers"] <= 1e-5, "on every process, for every position"


def test_activations_may_be_computed_again(measured: dict[str, Any]) -> None:
    assert measured["computed again"]["gradient"] <= 1e-5


@pytest.mark.parametrize("why", REFUSED)
def test_what_has_no_positions_of_its_own_is_named(why: str, measured: dict[str, Any]) -> None:
    assert measured[why].startswith(f"engine.context_parallel: it does not go with {why}")


def test_each_column_is_of_one_process_and_all_have_the_same_work() -> None:
    for length, processes in ((32, 2), (30, 4), (7, 3), (1, 2)):
        shares = [own_columns(length, rank, processes) for rank in range(processes)]
        assert torch.cat(shares).sort().values.tolist() == list(range(padded_length(length, processes)))
        assert padded_length(length, processes) - length < 2 * processes
        assert len({int(each.sum()) for each in shares}) == 1, "keys that causal attention looks at"


def test_each_prediction_counts_once() -> None:
    batch = global_batch("sft")
    objectives = [OwnPositions(NextToken(), rank, 3) for rank in range(3)]
    assert sum(float(each.weight(batch)) for each in objectives) == float(NextToken().weight(batch))


@pytest.mark.slow
def test_runs_have_the_curve_of_one_process_and_go_on_in_it(tmp_path: Path) -> None:
    rows = ["data.sequences=documents", "train.sequence_length=30", "train.batch_tokens=240"]
    pretrain(tmp_path, "alone", rows)
    for name, layout in {"contexts": CONTEXT, "contexts-and-rows": [*CONTEXT, "engine.processes=4"]}.items():
        pretrain(tmp_path, name, [*rows, *layout])
        assert_same_run(tmp_path / name, tmp_path / "alone")
    rewind(tmp_path / "contexts", step=4)
    assert "at step 4" in pretrain(tmp_path, "contexts", rows)
    assert_same_run(tmp_path / "contexts", tmp_path / "alone")


@pytest.mark.slow
def test_fine_tuning_has_the_curve_of_one_process(tmp_path: Path) -> None:
    pretrain(tmp_path, "pretrain", [])
    command = [*COMMANDS["sft"], "train.steps=3", "schedule.warmup_steps=1", f"runs_dir={tmp_path}"]
    for name, layout in {"alone": [], "contexts": CONTEXT}.items():
        finish([*command, *starting_from(tmp_path, "sft"), f"run={name}", *layout])
    assert_same_run(tmp_path / "contexts", tmp_path / "alone")


def measure(path: Path) -> None:
    """In each of two processes: all cases; process 0 writes the figures."""
    layout = arrange(join("cpu", threads=1), EngineConfig(context_parallel=2))
    figures: dict[str, Any] = {
        f"{parts}/{batch}": measure_case(layout, dataclasses.replace(CONFIG, **changes), batch)
        for parts, changes in PARTS.items() for batch in BATCHES
    }  # fmt: skip
    figures["computed again"] = measure_case(layout, CONFIG, "packed", "full")
    for why, changes in REFUSED.items():
        with pytest.raises(ConfigError) as told:
            spread(language_model(1, dataclasses.replace(CONFIG, **changes)), layout)
        figures[why] = str(told.value)
    if layout.is_main:
        path.write_text(json.dumps(figures))
    leave()


def measure_case(layout: Layout, config: ModelConfig, name: str, recompute: Any = "none") -> dict[str, float]:
    batch, objective, alone = global_batch(name), NextToken(z_loss=1e-3), language_model(1, config)
    weight = objective.weight(batch)
    (objective(alone, batch)[0] / weight).backward()
    expected = {name: each.grad for name, each in alone.named_parameters() if each.grad is not None}
    part = language_model(1, config)
    part.trunk.recompute = recompute
    model = spread(part, layout)
    made, optimizer = trainer(model, Fixed(batch), OwnPositions(objective, layout.token_rank, 2), layout, 3)
    metrics = made.updates()(0, batch)[0]
    sums = torch.stack([torch.stack([each.double() for each in metrics["loss"]])])
    torch.distributed.all_reduce(sums)
    whole, given = bare(model).eval(), {"documents": batch.documents, "prefix": batch.prefix}
    tokens = torch.randint(0, VOCAB, (2, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        answers = [(whole(tokens) - alone(tokens)).abs().max()]
        answers += [(whole(batch.tokens, **given) - alone(batch.tokens, **given)).abs().max()]
        loss = objective(alone, batch)[1]["loss"][0] / weight
    return {
        "gradient": relative_error(optimizer.seen[0], expected), "answers": float(torch.stack(answers).max()),
        "loss": abs(float(sums[0, 0] / sums[0, 1] - loss)),
    }  # fmt: skip
