"""Initial weights against the formula of each kind, parameter by parameter."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmtrain.config.schema import (
    ExpertsConfig,
    Gpt2InitConfig,
    ModelConfig,
    MupInitConfig,
    NormalInitConfig,
    ScaledInitConfig,
    SmallInitConfig,
    T5InitConfig,
)
from llmtrain.models.heads import LanguageModel, make_model
from llmtrain.models.layouts import to_ours
from llmtrain.models.layouts.switch import SWITCH
from llmtrain.models.layouts.t5 import T5
from llmtrain.models.layouts.table import to_config

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


WIDE = {
    "d_model": 192, "d_kv": 24, "d_ff": 384, "num_heads": 6, "num_layers": 2, "num_decoder_layers": 2,
    "vocab_size": 300, "relative_attention_num_buckets": 256,
    "relative_attention_max_distance": 512,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["T5", "gated", "Switch"])
def test_t5_begins_as_in_transformers(kind: str) -> None:
    """Matrix by matrix, queries apart; of its experts Transformers' second matrices are by another width, and routers
    have deviation 1, so both are against the formula."""
    transformers = pytest.importorskip("transformers")
    name = "SwitchTransformers" if kind == "Switch" else "T5"
    options: dict[str, Any] = {"feed_forward_proj": "gated-gelu"} if kind == "gated" else {}
    if kind == "Switch":
        options = {"num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{name}ForConditionalGeneration")(
        getattr(transformers, f"{name}Config")(**WIDE, **options)
    )
    layout = SWITCH if kind == "Switch" else T5
    fields, faults = layout.read_fields(theirs.config.to_dict())
    assert not faults
    config = dataclasses.replace(to_config(fields), init=T5InitConfig())
    ours = make_model(config, WIDE["vocab_size"]).initialise(torch.Generator().manual_seed(3)).state_dict()
    expected = to_ours(layout, config, list(ours), theirs.state_dict())
    kinds = set()
    for key, value in ours.items():
        if value.ndim == 1:
            assert (value == 1.0).all()
            continue
        queries = config.num_heads * config.head_size
        parts = [slice(0, queries), slice(queries, None)] if key.endswith("attention.qkv.weight") else [slice(None)]
        for found, reference in ((value[part], expected[key][part]) for part in parts):
            std = reference.std().item()
            if key.endswith(("router.weight", "expert_down.weight")):
                std = value.shape[-1] ** -0.5
            error = 6 * std / math.sqrt(2 * found.numel())  # of two draws
            assert found.std().item() == pytest.approx(std, abs=error), key
            kinds.add(round(std, 1 if std > 0.5 else 3))
    assert len(kinds) > 3


def test_blocks_of_switch_begin_smaller() -> None:
    """Fedus et al. 2021, section 2.4: σ = √(s / n), in the blocks."""
    config = dataclasses.replace(
        LLAMA, architecture="encoder_decoder", positions="relative", attention_scale=1.0,
        experts=ExpertsConfig(num_experts=4, experts_per_token=1, normalise_weights=False, first_layer=1),
    )  # fmt: skip
    usual, small = (
        make_model(dataclasses.replace(config, init=T5InitConfig(variance_scale=scale)), VOCAB_SIZE)
        .initialise(torch.Generator().manual_seed(3)).state_dict()
        for scale in (1.0, 0.1)
    )  # fmt: skip
    for name, value in usual.items():
        factor = 0.1**0.5 if ".blocks." in name and value.ndim > 1 else 1.0
        torch.testing.assert_close(small[name], factor * value)
    assert usual["head.weight"].std().item() == pytest.approx(HIDDEN**-0.5, rel=0.03)
    assert usual["trunk.token_embedding.weight"].std().item() == pytest.approx(1.0, rel=0.03)
    assert usual["encoder.blocks.1.feed_forward.expert_down.weight"].std().item() == pytest.approx(
        INNER**-0.5, rel=0.03
    )
