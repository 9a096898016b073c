"""Initial weights against the formula of each kind, parameter by parameter."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmtrain.config.schema import (
    Gpt2InitConfig,
    ModelConfig,
    MupInitConfig,
    NormalInitConfig,
    ScaledInitConfig,
    SmallInitConfig,
)
from llmtrain.models.heads import LanguageModel

VOCAB_SIZE, LAYERS, HIDDEN, INNER, STD = 512, 3, 128, 320, 0.05
LLAMA = ModelConfig(
    num_layers=LAYERS, hidden_size=HIDDEN, ffn_hidden_size=INNER, num_heads=4, num_kv_heads=2, init_std=STD,
    tied_embeddings=False,
)  # fmt: skip
GPT2 = dataclasses.replace(LLAMA, positions="learned", norm="layernorm", activation="gelu", bias=True)
# (layer from 1, inputs, whether its output is added to the stream) → standard deviation
Formula = Callable[[int | None, int, bool], float]
FORMULAS: dict[str, tuple[Any, Formula]] = {
    "gpt2": (Gpt2InitConfig(), lambda layer, inputs, residual: STD / math.sqrt(2 * LAYERS) if residual else STD),
    "normal": (NormalInitConfig(), lambda layer, inputs, residual: STD),
    "scaled": (
        ScaledInitConfig(),
        lambda layer, inputs, residual: (inputs * (2 * (layer or 0) if residual else 1)) ** -0.5,
    ),
    "small": (
        SmallInitConfig(),
        lambda layer, inputs, residual: 2 / LAYERS / math.sqrt(HIDDEN) if residual else math.sqrt(2 / 5 / HIDDEN),
    ),
    "mup": (
        MupInitConfig(base_hidden_size=32, base_head_dim=32),
        lambda layer, inputs, residual: STD * (0.5 if layer else 1.0) / (math.sqrt(2 * LAYERS) if residual else 1.0),
    ),
}  # fmt: skip


def build(config: ModelConfig) -> LanguageModel:
    return LanguageModel(config, VOCAB_SIZE).initialise(torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_every_matrix_has_the_deviation_of_the_formula(config: ModelConfig, kind: str) -> None:
    init, formula = FORMULAS[kind]
    for name, parameter in build(dataclasses.replace(config, init=init)).named_parameters():
        if parameter.ndim == 1:
            assert (parameter == (0.0 if name.endswith("bias") else 1.0)).all()
            continue
        layer = int(name.split(".")[2]) + 1 if ".blocks." in name else None
        inputs = INNER if "down" in name else HIDDEN
        std = formula(layer, inputs, "output" in name or "down" in name)
        error = 4 * std / math.sqrt(2 * parameter.numel())  # four standard errors
        assert parameter.std().item() == pytest.approx(std, abs=error), name
        assert parameter.mean().item() == pytest.approx(0.0, abs=4 * std / math.sqrt(parameter.numel())), name


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_the_usual_weights_are_the_same_bits_as_ever(config: ModelConfig) -> None:
    generator = torch.Generator().manual_seed(3)
    for name, parameter in build(config).named_parameters():
        if parameter.ndim > 1:
            std = STD / (2 * LAYERS) ** 0.5 if name.endswith(("output.weight", "down.weight")) else STD
            assert torch.equal(parameter, torch.empty(parameter.shape).normal_(0.0, std, generator=generator)), name
