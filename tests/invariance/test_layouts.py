"""Every layout of processes against one process: the same rows, the same losses; checkpoints go from any to any.

`python -m tests.invariance.test_layouts` prints the table of 50 steps.
"""

import dataclasses
import json
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from llmtrain.config.schema import (
    CheckpointConfig,
    EngineConfig,
    EvalConfig,
    ExpertsConfig,
    ModelConfig,
    OptimizerConfig,
    TrackerConfig,
)
from llmtrain.data.batches import share
from llmtrain.engine import checkpoints
from llmtrain.engine.averages import WeightAverages
from llmtrain.engine.distributed import Layout, arrange, barrier, gathered, join, leave, spread, total
from llmtrain.engine.launching import launch
from llmtrain.engine.row_orders import whole
from llmtrain.engine.snapshots import Snapshots
from llmtrain.engine.speed import Speed
from llmtrain.engine.steps import nothing_adapts
from llmtrain.engine.tracking import Tracker
from llmtrain.engine.trainer import Trainer
from llmtrain.models.experts import expert_layers
from llmtrain.models.heads import make_model
from llmtrain.models.tensor_parallel import local
from llmtrain.objectives.next_token import NextToken, TokenBatch
from llmtrain.objectives.routing import Routed
from llmtrain.optim.optimizers import build_optimizer

VOCAB, ROWS, WIDTH, MANY = 101, 8, 32, 50
LLAMA = ModelConfig(
    num_layers=2, hidden_size=64, num_heads=4, num_kv_heads=2, ffn_hidden_size=96, max_sequence_length=WIDTH,
    qk_norm="head",
)  # fmt: skip
DROPLESS = ExpertsConfig(num_experts=4, ffn_hidden_size=32, shared_experts=1, balance_loss=0.01)
LIMITED = dataclasses.replace(
    DROPLESS, scores="sigmoid", balance_bias_rate=0.01, capacity_factor=0.9, capacity_group_tokens=8
)
GPT = dataclasses.replace(LLAMA, norm="layernorm", activation="gelu", bias=True, block="parallel", num_kv_heads=4)
MODELS = {
    "llama": LLAMA, "gpt": GPT, "dropless": dataclasses.replace(LLAMA, experts=DROPLESS),
    "limited": dataclasses.replace(LLAMA, experts=LIMITED),
}  # fmt: skip
ALONE = Layout(rank=0, world=1, device=torch.device("cpu"))


class Case(NamedTuple):
    """A layout of so many processes."""

    name: str
    processes: int
    models: tuple[str, ...]
    engine: EngineConfig


DENSE, SPARSE = ("llama", "gpt"), ("dropless", "limited")
CASES = (
    Case("ddp 2", 2, ("llama", *SPARSE), EngineConfig()),
    Case("fsdp 2", 2, ("llama", *SPARSE), EngineConfig(sharding="fsdp")),
    Case("tp 2", 2, DENSE, EngineConfig(tensor_parallel=2)),
    Case("ep 2", 2, SPARSE, EngineConfig(expert_parallel=2)),
    Case("fsdp 2, ep 2", 2, SPARSE, EngineConfig(sharding="fsdp", expert_parallel=2)),
    Case("hsdp 2 x 2", 4, ("llama",), EngineConfig(sharding="hsdp", shard_processes=2)),
    Case("fsdp 2 x tp 2", 4, DENSE, EngineConfig(sharding="fsdp", tensor_parallel=2)),
    Case("ddp 4, ep 2", 4, ("limited",), EngineConfig(expert_parallel=2)),
)


class Rows:
    """A batch source that notes the rows of all processes."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.seen: list[Any] = []

    def __call__(self, step: int) -> TokenBatch:
        tokens = torch.randint(VOCAB, (ROWS, WIDTH), generator=torch.Generator().manual_seed(step % 5))
        mine = tokens[share(ROWS, self.layout.data_rank, self.layout.data_world)]
        self.seen.append(gathered(mine.tolist(), self.layout))
        ones = torch.ones(mine.shape, dtype=torch.bool)
        return TokenBatch(tokens=mine, loss_mask=ones, source=torch.zeros(len(mine), dtype=torch.int64))

    def counts(self, step: int) -> dict[str, float]:
        return {}


class Running:
    """A model in training, in some layout."""

    def __init__(self, model: str, layout: Layout, seed: int = 1, *, compiled: bool = False) -> None:
        self.layout = layout
        trained = make_model(MODELS[model], VOCAB).initialise(torch.Generator().manual_seed(seed))
        self.model = spread(trained, layout)
        self.objective: Any = NextToken()
        if layers := expert_layers(trained):
            self.objective = Routed(self.objective, layers, partial(total, layout=layout), layout.device)
        self.optimizer = build_optimizer(trained, OptimizerConfig(lr=1e-3))
        self.averages = WeightAverages(self.model, 0.5)
        self.rows = Rows(layout)
        self.trainer = Trainer(
            folder=Path(), layout=layout, model=self.model, batches=self.rows, objective=self.objective,
            optimizer=self.optimizer, learning_rate=lambda step: 1e-3, steps=1, seed=0, tracker=quiet_tracker(),
            checkpoint=CheckpointConfig(), eval=EvalConfig(), tracking=TrackerConfig(),
            extra=lambda step: lambda folder: None, autocast=lambda: torch.autocast("cpu", enabled=False),
            micro_batch_rows=2, max_grad_norm=0.5, after_update=getattr(self.objective, "after_update", nothing_adapts),
            speed=Speed(layout.device, 1.0, 1.0), compile=compiled, fixed_shapes=True,
        )  # fmt: skip

    def losses(self, steps: int) -> list[float]:
        """Of so many steps, over all processes."""
        self.model.train()
        found, make_updates = [], self.trainer.updates()
        for step in range(steps):
            metrics, _, faults = make_updates(step, self.rows(step))
            assert not faults
            self.averages.update()
            found.append([float(total(part.detach(), self.layout)) for part in metrics["loss"]])
        return [value / weight for value, weight in found]

    def bytes_over_formula(self) -> float:
        """Weights, gradients and moments of this process, over 16 bytes a parameter shared out to all processes."""
        batch = self.rows(0)
        self.objective(self.model, batch)[0].sum().backward()
        parameters = list(self.model.parameters())
        moments = [value for each in self.optimizer.state.values() for value in each.values() if value.dim()]
        gradients = [each.grad for each in parameters if each.grad is not None]
        held = sum(local(each.detach()).nbytes for each in (*parameters, *gradients, *moments))
        return held / (16 * sum(each.numel() for each in parameters) / self.layout.world)

    @property
    def state(self) -> dict[str, Tensor]:
        """As it is saved."""
        return checkpoints.training_state(self.model, self.optimizer, {}, self.averages.state())

    def whole_state(self) -> dict[str, Tensor]:
        """As it is saved, put together."""
        return {
            name: whole(value, None) if isinstance(value, DTensor) else value.clone()
            for name, value in self.state.items()
        }


def quiet_tracker() -> Tracker:
    return Tracker(Path(), TrackerConfig(), steps=1, is_main=False, run="", run_config={})


def arranged(case: Case, layout: Layout) -> Layout:
    return arrange(layout, case.engine)


def measure(folder: Path, processes: int, steps: int, models: tuple[str, ...]) -> None:
    """In each process: all cases of so many processes against one, and each checkpoint into each other layout.

    With few steps, each checkpoint into the next layout only.
    """
    layout = join("cpu", threads=1)
    figures: dict[str, Any] = {}
    cases = [case for case in CASES if case.processes == processes]
    for model in models:
        mine = [case for case in cases if model in case.models]
        alone, saved = Running(model, ALONE), {}
        expected = alone.losses(steps)
        for case in mine:
            running = Running(model, arranged(case, layout))
            found = running.losses(steps)
            pieces = Snapshots(running.layout, aside=False).take(running.state)
            checkpoints.save(folder / model / case.name, steps, pieces, layout, metrics={})
            barrier(layout)
            saved[case.name] = running.whole_state()
            figures[f"{model}/{case.name}"] = {
                "same rows": running.rows.seen == alone.rows.seen, "loss": expected[-1],
                "largest difference": max(abs(one - other) for one, other in zip(found, expected, strict=True)),
                "averages": max(
                    float((value - alone.averages.state()[name.removeprefix("average.")]).abs().max())
                    for name, value in saved[case.name].items()
                    if name.startswith("average.")
                ),
                "bytes over formula": running.bytes_over_formula(),
            }  # fmt: skip
        others = [*mine, None]
        for first, then in product(mine, others) if steps >= MANY else zip(mine, others[1:], strict=True):
            other = Running(model, ALONE if then is None else arranged(then, layout), seed=2)
            state = other.state
            checkpoints.load(checkpoints.read(folder / model / first.name / f"step-{steps:08d}"), state, other.layout)
            name = f"{model}/{first.name} then {'alone' if then is None else then.name}"
            figures[name] = {"same bits": same_bits(other.whole_state(), saved[first.name])}
    if layout.is_main:
        (folder / "figures.json").write_text(json.dumps(figures))
    leave()


def same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def figures_of(folder: Path, processes: int, steps: int, models: tuple[str, ...] = tuple(MODELS)) -> dict[str, Any]:
    launch(measure, (folder, processes, steps, models), processes)
    found: dict[str, Any] = json.loads((folder / "figures.json").read_text())
    return found


@pytest.mark.parametrize(
    ("processes", "steps", "models"),
    [
        (2, 3, ("llama", "limited")),
        pytest.param(2, MANY, tuple(MODELS), marks=pytest.mark.slow),
        pytest.param(4, MANY, tuple(MODELS), marks=pytest.mark.slow),
    ],
)
def test_every_layout_trains_as_one_process_and_reads_the_checkpoints_of_all(
    processes: int, steps: int, models: tuple[str, ...], tmp_path: Path
) -> None:
    figures = figures_of(tmp_path, processes, steps, models)
    trained = {name: found for name, found in figures.items() if "then" not in name}
    expected = {f"{model}/{case.name}" for case in CASES if case.processes == processes for model in case.models}
    assert trained.keys() == {name for name in expected if name.partition("/")[0] in models}
    for name, found in trained.items():
        assert found["same rows"], name
        assert found["largest difference"] <= 1e-4, name
        assert found["averages"] <= 1e-3, name  # AdamW's first steps go by signs
        if name.endswith("/fsdp 2"):
            assert found["bytes over formula"] == pytest.approx(1.0, abs=0.15), name
    moved = {name: found["same bits"] for name, found in figures.items() if "then" in name}
    assert moved
    assert all(moved.values()), moved


def measure_compiled(folder: Path, processes: int) -> None:
    """In each process: the largest difference of three losses, compiled, from those of one process that is not."""
    layout, figures = join("cpu", threads=1), {}
    for case in (each for each in CASES if each.processes == processes):
        for model in [each for each in case.models if each in ("llama", "limited")]:
            expected = Running(model, ALONE).losses(3)
            found = Running(model, arranged(case, layout), compiled=True).losses(3)
            figures[f"{model}/{case.name}"] = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    if layout.is_main:
        (folder / "figures.json").write_text(json.dumps(figures))
    leave()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("processes", [2, 4])
def test_every_layout_can_be_compiled(processes: int, tmp_path: Path) -> None:
    launch(measure_compiled, (tmp_path, processes), processes)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert len(figures) >= 3
    assert max(figures.values()) < 1e-4, figures


if __name__ == "__main__":
    import tempfile

    print("| layout | model | last loss of one process | largest difference in 50 steps |\n|---|---|---|---|")
    for processes in (2, 4):
        for name, found in figures_of(Path(tempfile.mkdtemp()), processes, MANY).items():
            if "then" not in name:
                model, _, case = name.partition("/")
                print(f"| {case} | {model} | {found['loss']:.4f} | {found['largest difference']:.1e} |")
