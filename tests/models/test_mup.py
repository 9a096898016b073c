"""muP: what stays the same over widths and grows without it, and its formulas in models, optimizers and files."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.config.errors import ConfigError
from llmtrain.config.schema import (
    MUP_OPTIMIZERS,
    Gpt2InitConfig,
    InitConfig,
    LoraConfig,
    ModelConfig,
    MupInitConfig,
    OptimizerConfig,
    ScaledInitConfig,
)
from llmtrain.models.formats import load_language_model, read_config, save_model
from llmtrain.models.heads import ActorCritic, LanguageModel, ScalarModel, SharedActorCritic
from llmtrain.models.lora import adapt
from llmtrain.models.mup import at_width, learning_rate_scales
from llmtrain.optim.optimizers import build_optimizer

VOCAB_SIZE, ROWS, LENGTH, STEPS, LR = 64, 4, 24, 5, 5e-3
WIDTHS = (64, 128, 256, 512)
MUP = MupInitConfig(base_hidden_size=64, base_head_dim=16)
GPT2: dict[str, Any] = {"positions": "learned", "norm": "layernorm", "activation": "gelu_tanh", "bias": True}
# Heads of the base model's width, more of them in wider models; and as many heads, wider ones.
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 16, "num_kv_heads": 2},
    "llama untied": {"head_dim": 16, "tied_embeddings": False, "zero_head": True},
    "gpt2": {"head_dim": 16, **GPT2},
    "gpt2 wide heads": {"num_heads": 4, **GPT2, "tied_embeddings": False, "zero_head": True, "zero_query": True},
}


def architecture(width: int, init: InitConfig, **parts: Any) -> ModelConfig:
    """Two layers of this width, all widths in the same proportion; zeros are for muP."""
    zeros = {key: parts.pop(key) for key in ("zero_head", "zero_query") if key in parts}
    if isinstance(init, MupInitConfig):
        init = dataclasses.replace(init, **zeros)
    shape = {"num_heads": width // 16, "ffn_hidden_size": 3 * width, "max_sequence_length": LENGTH}
    return ModelConfig(num_layers=2, hidden_size=width, init=init, **{**shape, **parts})


def new_model(config: ModelConfig) -> LanguageModel:
    return LanguageModel(at_width(config), VOCAB_SIZE).initialise(torch.Generator().manual_seed(0))


def tokens() -> Tensor:
    return torch.randint(VOCAB_SIZE, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))


def train(model: LanguageModel, steps: int) -> LanguageModel:
    optimizer = build_optimizer(model, OptimizerConfig(lr=LR), learning_rate_scales(model, "torch.optim.AdamW"))
    rows = tokens()
    for _ in range(steps):
        F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def coordinates(model: LanguageModel) -> dict[str, float]:
    """Mean absolute values of the stream after each block, of attention's scores without rotation, of the logits."""
    found: dict[str, Tensor] = {}

    def scores(number: int, qkv: Tensor) -> None:
        config = model.config
        query, key, _ = qkv.unflatten(-1, (-1, config.head_size)).split(
            (config.num_heads, config.kv_heads, config.kv_heads), dim=2
        )
        key = key.repeat_interleave(config.num_heads // config.kv_heads, dim=2)
        scale = config.attention_scale or config.head_size**-0.5
        found[f"scores {number}"] = scale * torch.einsum("bqhd,bkhd->bhqk", query, key)

    hooks = []
    for number, block in enumerate(model.trunk.blocks):
        hooks += [
            block.register_forward_hook(lambda _, __, out, at=f"block {number}": found.update({at: out})),
            block.attention.qkv.register_forward_hook(lambda _, __, out, number=number: scores(number, out)),
        ]
    found["logits"] = model(tokens())
    for hook in hooks:
        hook.remove()
    return {name: float(values.abs().mean()) for name, values in found.items()}


def slopes(init: InitConfig, parts: dict[str, Any]) -> dict[str, float]:
    """By which power of the width each coordinate grows, after a few steps of AdamW on the same rows."""
    measured = [coordinates(train(new_model(architecture(width, init, **parts)), STEPS)) for width in WIDTHS]
    width = torch.tensor(WIDTHS, dtype=torch.float64).log()
    width -= width.mean()
    logs = {name: torch.tensor([math.log(each[name]) for each in measured]).double() for name in measured[0]}
    return {name: float((width * values).sum() / width.square().sum()) for name, values in logs.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_coordinates_do_not_grow_with_the_width(kind: str) -> None:
    """Coordinate check (Yang et al. 2022, appendix D.1): flat, but for random initial scores and logits that fade."""
    found = slopes(MUP, KINDS[kind])
    print(kind, {name: round(slope, 2) for name, slope in found.items()})
    for name, slope in found.items():
        if name.startswith("block"):
            assert abs(slope) < 0.1, name
        elif name.startswith("scores") and "head_dim" not in KINDS[kind]:
            assert -0.6 < slope < 0.1, name  # 1 / D: at first, random queries and keys give 1 / sqrt(D)
        else:
            assert -0.25 < slope < 0.1, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("standard", [Gpt2InitConfig(), ScaledInitConfig()], ids=lambda init: init.name)
def test_coordinates_grow_without_it(kind: str, standard: InitConfig) -> None:
    found = slopes(standard, KINDS[kind])
    print(kind, {name: round(slope, 2) for name, slope in found.items()})
    assert all(slope > 0.4 for name, slope in found.items() if name.startswith("block"))
    assert all(slope > 0.1 for slope in found.values())


def test_said_of_the_base_model() -> None:
    """Four times the width, heads twice as wide: logits / 4, scores by √16 / 32 instead of 1 / √32."""
    config = architecture(256, MUP, num_heads=8)
    assert at_width(config) == dataclasses.replace(config, logit_scale=0.25, attention_scale=0.125)
    said = dataclasses.replace(config, logit_scale=3.0, attention_scale=0.5, embedding_scale="sqrt_hidden_size")
    assert at_width(said) == dataclasses.replace(
        said, logit_scale=0.75, attention_scale=0.25, embedding_scale=math.sqrt(64)
    )
    more_heads = architecture(256, MUP)
    assert at_width(more_heads) == dataclasses.replace(more_heads, logit_scale=0.25)
    assert at_width(dataclasses.replace(config, init=Gpt2InitConfig())).logit_scale == 1.0


@pytest.mark.parametrize("kind", ["llama", "llama untied", "gpt2"])
def test_the_base_model_is_the_usual_one(kind: str) -> None:
    """The same bits, and one learning rate for all."""
    parts = {key: value for key, value in KINDS[kind].items() if key != "zero_head"}
    base, usual = (new_model(architecture(64, init, **parts)) for init in (MUP, Gpt2InitConfig()))
    assert dataclasses.replace(base.config, init=usual.config.init) == usual.config
    assert learning_rate_scales(base, "torch.optim.SGD") == {}
    for model in (base, usual):
        train(model, 2)
    assert all(torch.equal(one, other) for one, other in zip(base.parameters(), usual.parameters(), strict=True))


def test_zeros() -> None:
    model = new_model(architecture(128, MUP, **KINDS["gpt2 wide heads"]))
    assert not model(tokens()).any()
    for block in model.trunk.blocks:
        query, key_value = block.attention.qkv.weight.split((128, 256))
        assert not query.any()
        assert key_value.std().item() == pytest.approx(0.02 / math.sqrt(2), rel=0.05)
    train(model, 2)
    assert all(parameter.any() for name, parameter in model.named_parameters() if name.endswith("weight"))


def scaled_names(model: Any) -> set[str]:
    scales = learning_rate_scales(model, "torch.optim.AdamW")
    assert set(scales.values()) <= {0.25}
    return set(scales)


@pytest.mark.parametrize("kind", ["llama untied", "gpt2"])
def test_learning_rates_by_name(kind: str) -> None:
    """Matrices of blocks learn more slowly, and heads whose output is one number; nothing else."""
    model = new_model(architecture(256, MUP, **KINDS[kind]))
    up = "gate_up" if kind.startswith("llama") else "up"
    parts = ("attention.qkv", "attention.output", f"feed_forward.{up}", "feed_forward.down")
    blocks = {f"trunk.blocks.{layer}.{part}.weight" for layer in range(2) for part in parts}
    assert scaled_names(model) == blocks
    scores = ScalarModel.from_language_model(model, torch.Generator().manual_seed(0))
    assert scaled_names(scores) == blocks | {"score.weight"}
    policy, value = {f"policy.{name}" for name in blocks}, {f"value.{name}" for name in blocks}
    assert scaled_names(ActorCritic(model, scores)) == policy | value | {"value.score.weight"}
    assert scaled_names(SharedActorCritic(model)) == policy | {"value.weight"}
    adapt(model, LoraConfig(rank=2))
    assert scaled_names(model) == blocks, "frozen weights, and no adapter"


def test_other_optimizers_are_refused() -> None:
    model = new_model(architecture(128, MUP))
    assert all(learning_rate_scales(model, name) for name in MUP_OPTIMIZERS)
    with pytest.raises(ConfigError, match=r"optimizer._target_=torch.optim.SGD: the model has init.name=mup"):
        learning_rate_scales(model, "torch.optim.SGD")


def test_steps_are_those_of_the_formula() -> None:
    """Table 8: lr / m for matrices of blocks; decay of a step is lr · weight_decay everywhere. In float64."""
    model = new_model(architecture(256, MUP, **KINDS["gpt2"])).double()
    config = OptimizerConfig(lr=1e-2, weight_decay=0.3, betas=(0.8, 0.9), eps=1e-10)
    scales = learning_rate_scales(model, config.target)
    optimizer = build_optimizer(model, config, scales)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-2 / 4, 1e-2]
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    moments = {name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in expected.items()}
    rows = tokens()
    for step in (1, 2, 3):
        F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            first, second = moments[name]
            first.lerp_(parameter.grad, 0.2)
            second.lerp_(parameter.grad**2, 0.1)
            update = (first / (1 - 0.8**step)) / ((second / (1 - 0.9**step)).sqrt() + 1e-10)
            decay = 1e-2 * 0.3 if parameter.ndim >= 2 else 0.0
            expected[name] = expected[name] * (1 - decay) - 1e-2 * (0.25 if name in scales else 1.0) * update
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize(("width", "model_type"), [(64, "llama"), (128, "llmtrain")])
def test_a_folder_keeps_it(tmp_path: Path, width: int, model_type: str) -> None:
    """Scales are in the saved architecture; learning rates still follow the width afterwards."""
    model = new_model(architecture(width, MUP, head_dim=16)).eval()
    save_model(tmp_path, model)
    assert f'"model_type": "{model_type}"' in (tmp_path / "config.json").read_text()
    read = load_language_model(tmp_path).eval()
    assert torch.equal(read(tokens()), model(tokens()))
    scales = learning_rate_scales(model, "torch.optim.AdamW")
    assert learning_rate_scales(read, "torch.optim.AdamW") == scales
    assert bool(scales) == (width != 64)


def test_no_family_has_a_word_for_its_learning_rates(tmp_path: Path) -> None:
    """Even where logits are multiplied by 1."""
    config = at_width(architecture(128, MUP, head_dim=16, logit_scale=2.0))
    assert config.logit_scale == 1.0
    save_model(tmp_path, LanguageModel(config, VOCAB_SIZE))
    assert read_config(tmp_path)[0] == config
