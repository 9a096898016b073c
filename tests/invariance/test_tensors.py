"""Matrices shared out over two processes, and positions between them: the same gradients as in one."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.invariance.test_gradients import CONFIG, VOCAB, global_batch, relative_error
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llmtrain.config.errors import ConfigError
from llmtrain.config.schema import EngineConfig, ModelConfig
from llmtrain.engine import gradients
from llmtrain.engine.distributed import Layout, arrange, join, leave, spread
from llmtrain.engine.launching import launch
from llmtrain.engine.row_orders import row_orders, whole
from llmtrain.models.heads import LanguageModel, make_model
from llmtrain.objectives.masked import MaskedTokens
from llmtrain.objectives.next_token import NextToken
from llmtrain.objectives.sequence_to_sequence import SequenceToSequence

BASE = dataclasses.replace(CONFIG, num_kv_heads=2)
PARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "rotary, gated": ("next_token", {}),
    "packed rows": ("packed", {}),
    "biases, LayerNorm": ("next_token", {"norm": "layernorm", "activation": "gelu", "bias": True}),
    "norms of heads": ("next_token", {"qk_norm": "head"}),
    "sandwich": ("sft", {"norm_placement": "sandwich", "norm": "zero_centred_rmsnorm"}),
    "behind the branches": ("sft", {"norm_placement": "post", "bias": True, "embedding_norm": "added"}),
    "parallel": ("prefix", {"block": "parallel", "sliding_window": 5}),
    "encoder": ("masked", {"architecture": "encoder", "mlm_head": True, "positions": "learned"}),
    "encoder-decoder": ("sequence to sequence", {"architecture": "encoder_decoder", "positions": "sinusoidal"}),
}  # fmt: skip
"""What is trained on, and what differs in the architecture."""
# rows that two processes share evenly, and others; what is kept of them
CASES = [(parts, 31, "none") for parts in PARTS]
CASES += [("rotary, gated", 32, "none"), ("rotary, gated", 31, "full"), ("encoder-decoder", 31, "full")]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every figure of a run of two processes."""
    path = tmp_path_factory.mktemp("tensors") / "figures.json"
    launch(measure, (path,), 2)
    figures: dict[str, Any] = json.loads(path.read_text())
    return figures


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case)))
def test_gradients_are_those_of_one_process(case: tuple[str, int, str], measured: dict[str, Any]) -> None:
    figures = measured[str(case)]
    assert figures["gradient"] <= 1e-5
    assert figures["loss"] <= 1e-6
    assert figures["positions"] == [figures["half"]], "norms see half of a row"


def test_what_is_not_shared_out_is_named(measured: dict[str, Any]) -> None:
    assert measured["refused"].startswith("engine.tensor_parallel: it does not go with model.positions=alibi")


def measure(path: Path) -> None:
    """In each of two processes: all cases; process 0 writes the figures."""
    layout = arrange(join("cpu", threads=1), EngineConfig(tensor_parallel=2))
    figures: dict[str, Any] = {
        str(case): measure_case(layout, dataclasses.replace(BASE, **PARTS[case[0]][1]), PARTS[case[0]][0], *case[1:])
        for case in CASES
    }  # fmt: skip
    with pytest.raises(ConfigError) as told:
        spread(language_model(dataclasses.replace(BASE, positions="alibi")), layout)
    figures["refused"] = str(told.value)
    if layout.is_main:
        path.write_text(json.dumps(figures))
    leave()


def language_model(config: ModelConfig) -> LanguageModel:
    model = make_model(config, VOCAB).initialise(torch.Generator().manual_seed(1))
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():  # zeros and ones would hide much
        for each in model.parameters():
            if each.dim() == 1:
                each.add_(0.1 * torch.randn(each.shape, generator=draw))
            else:
                each.mul_(3.0)
    return model


def measure_case(layout: Layout, config: ModelConfig, name: str, width: int, recompute: Any) -> dict[str, Any]:
    batch = narrowed(global_batch(name), width)
    objective = {"masked": MaskedTokens, "sequence to sequence": SequenceToSequence}.get(name, NextToken)()
    alone, part = language_model(config), language_model(config)
    losses = []
    part.trunk.recompute = recompute
    seen: set[int] = set()
    model = spread(part, layout)
    norm = next(each for each in part.trunk.blocks[0].children() if each.__class__.__name__.endswith("Norm"))
    norm.register_forward_hook(lambda module, inputs, _: seen.add(inputs[0].shape[1]))
    for each in (alone, model):
        loss = objective(each, batch)[0] / objective.weight(batch)
        loss.backward()
        losses.append(float(loss.detach()))
    gradients.complete(model)
    return {
        "gradient": relative_error(whole_gradients(part), whole_gradients(alone)),
        "loss": abs(losses[0] - losses[1]) / losses[0],
        "positions": sorted(seen),
        "half": -(-batch.tokens.shape[1] // 2),
    }


def narrowed(batch: Any, width: int) -> Any:
    """The batch without its last columns."""
    changed = {
        each.name: value[:, :width].contiguous()
        for each in dataclasses.fields(batch)
        if isinstance(value := getattr(batch, each.name), Tensor) and value.shape[1:] == (32,)
    }
    return dataclasses.replace(batch, **changed)


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    orders = row_orders(model)
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return {name: whole(grad, orders.get(name)) if isinstance(grad, DTensor) else grad for name, grad in found.items()}
