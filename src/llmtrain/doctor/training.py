"""What a step of training must not depend on: packing, micro-batches, the compiler, saving and loading."""

import itertools
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from llmtrain.config.schema import CheckpointConfig, EvalConfig, TrackerConfig
from llmtrain.doctor.measurement import Measurement, Skipped, largest_difference, relative_difference
from llmtrain.doctor.subject import VOCAB_SIZE, gradients, language_model, ragged_rows
from llmtrain.engine import checkpoints
from llmtrain.engine.distributed import Layout
from llmtrain.engine.snapshots import Snapshots
from llmtrain.engine.speed import Speed, has_compiler
from llmtrain.engine.steps import LossFunction
from llmtrain.engine.tracking import Tracker
from llmtrain.engine.trainer import Trainer
from llmtrain.models.formats import load_language_model, save_model
from llmtrain.objectives.next_token import NextToken, TokenBatch

DOCUMENT_LENGTHS = (5, 1, 14, 4, 8)


def packing(device: torch.device) -> list[Measurement]:
    """Documents packed into a row have the loss and the gradient that they have alone."""
    model, objective = language_model(device), NextToken()
    lengths = torch.tensor(DOCUMENT_LENGTHS)
    row = torch.randint(1, VOCAB_SIZE, (1, sum(DOCUMENT_LENGTHS)), generator=torch.Generator().manual_seed(1))
    documents = torch.arange(len(lengths)).repeat_interleave(lengths)[None].int()
    starts = documents.diff(prepend=documents.new_full((1, 1), -1)).bool()
    source = torch.zeros(1, dtype=torch.int64)
    together = loss_and_gradients(model, objective, TokenBatch(row, ~starts, source, documents).to(device))
    separate = [
        TokenBatch(document, torch.ones_like(document, dtype=torch.bool), source).to(device)
        for document in row.split(DOCUMENT_LENGTHS, dim=1)
    ]
    losses, slopes = zip(*(loss_and_gradients(model, objective, batch) for batch in separate), strict=True)
    summed = {name: torch.stack([each[name] for each in slopes]).sum(0) for name in slopes[0]}
    return [
        Measurement("packed rows: loss, ratio to separate ones", 1.0, together[0] / sum(losses), 1e-5),
        Measurement("packed rows: gradient, off by", 0.0, relative_difference(together[1], summed), 1e-5),
    ]


def accumulation(device: torch.device) -> list[Measurement]:
    """A step in micro-batches moves the weights as a step in one batch does."""
    whole, *parts = (weights_after_a_step(device, rows) for rows in (None, 1, 3))
    before = dict(language_model(device).named_parameters())
    moved = {name: value - before[name].detach() for name, value in whole.items()}
    return [
        Measurement(
            f"micro-batches of {rows}: update, off by", 0.0,
            relative_difference({name: value - before[name].detach() for name, value in part.items()}, moved), 1e-5,
        )
        for rows, part in zip((1, 3), parts, strict=True)
    ]  # fmt: skip


def saving(device: torch.device) -> list[Measurement]:
    """A model folder and a checkpoint give back every bit, and the model its logits."""
    model, tokens = language_model(device), ragged_rows(4, 24, seed=8)[0].to(device)
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, model)
        loaded = load_language_model(folder).to(device)
        root, layout = Path(folder), Layout(0, 1, device)
        optimizer = torch.optim.AdamW(model.parameters())
        state = checkpoints.training_state(model, optimizer, {})
        saved = checkpoints.save(root, 1, Snapshots(layout, aside=False).take(state), layout, metrics={})
        fault = checkpoints.inspect(saved.folder)
        emptied = {name: torch.full_like(value, torch.nan) for name, value in state.items()}
        checkpoints.load(saved, emptied, layout)
    with torch.no_grad():
        off = largest_difference(loaded(tokens), model(tokens))
    return [
        Measurement("model folder: tensors that differ", 0.0, count_different(loaded.state_dict(), model.state_dict())),
        Measurement("model folder: logits, largest difference", 0.0, off),
        Measurement("checkpoint: tensors that differ", 0.0, count_different(emptied, state)),
        Measurement("checkpoint: files that do not match their digest", 0.0, float(fault is not None)),
    ]


def bfloat16(device: torch.device) -> list[Measurement]:
    """Matrix products in bfloat16 (autocast) give nearly the loss and the gradient of float32."""
    model, objective, batch = language_model(device), NextToken(), token_batch(device)
    exact, slopes = loss_and_gradients(model, objective, batch)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss, _ = objective(model, batch)
    loss.backward()
    rounded = gradients(model)
    pairs = [(rounded[name].flatten().double(), value.flatten().double()) for name, value in slopes.items()]
    one, other = (torch.cat(side) for side in zip(*pairs, strict=True))
    return [
        Measurement("bfloat16: loss, ratio to float32", 1.0, loss.item() / exact, 0.01),
        Measurement("bfloat16: gradient, cosine to float32", 1.0, float(one @ other / one.norm() / other.norm()), 0.02),
    ]


def compiling(device: torch.device) -> list[Measurement]:
    """Under torch.compile the loss and the gradient are those without it."""
    if not has_compiler(device):
        raise Skipped("no C++ compiler (g++, clang++) on the PATH: engine.compile has nothing to work with")
    model, objective, batch = language_model(device, num_layers=1), NextToken(), token_batch(device)
    eager = loss_and_gradients(model, objective, batch)
    compiled = loss_and_gradients(model, torch.compile(objective, dynamic=False), batch)
    return [
        Measurement("compiled: loss, ratio to eager", 1.0, compiled[0] / eager[0], 1e-5),
        Measurement("compiled: gradient, off by", 0.0, relative_difference(compiled[1], eager[1]), 1e-4),
    ]


def token_batch(device: torch.device) -> TokenBatch:
    """Eight padded rows."""
    tokens, mask = ragged_rows(8, 24, seed=9)
    return TokenBatch(tokens, mask, torch.zeros(8, dtype=torch.int64)).to(device)


def loss_and_gradients(model: nn.Module, objective: LossFunction, batch: TokenBatch) -> tuple[float, dict[str, Tensor]]:
    """The summed loss, and its gradient by name."""
    loss, _ = objective(model, batch)
    loss.backward()
    return loss.item(), gradients(model)


class OneBatch:
    """A batch source of a single step."""

    def __init__(self, batch: TokenBatch) -> None:
        self.batch = batch

    def __call__(self, step: int) -> TokenBatch:
        return self.batch

    def counts(self, step: int) -> dict[str, float]:
        return {}


def weights_after_a_step(device: torch.device, micro_batch_rows: int | None) -> dict[str, Tensor]:
    """The weights after one step of the training loop, with plain gradient descent."""
    model = language_model(device)
    with tempfile.TemporaryDirectory() as name:
        folder, layout = Path(name), Layout(0, 1, device)
        tracker = Tracker(folder, TrackerConfig(), steps=1, is_main=False, run="doctor", run_config={})
        Trainer(
            folder=folder, layout=layout, model=model, batches=OneBatch(token_batch(device)), objective=NextToken(),
            optimizer=torch.optim.SGD(model.parameters(), lr=1.0), learning_rate=lambda step: 1.0, steps=1, seed=0,
            tracker=tracker, checkpoint=CheckpointConfig(), eval=EvalConfig(), tracking=TrackerConfig(),
            extra=lambda step: lambda folder: None, micro_batch_rows=micro_batch_rows, max_grad_norm=None,
            autocast=lambda: torch.autocast(device.type, torch.bfloat16, enabled=False), speed=Speed(device, 1.0, 1.0),
        ).fit()  # fmt: skip
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def count_different(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Tensors that are not the same to the bit, or are in one of the two alone."""
    names = set(itertools.chain(found, expected))
    return float(
        sum(not (name in found and name in expected and torch.equal(found[name], expected[name])) for name in names)
    )
