"""A small architecture to change parts of, and numbers for it, in float64; published ones without numbers."""

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from llmtrain.config.compose import load_config
from llmtrain.config.schema import ModelConfig
from llmtrain.models.heads import LanguageModel, make_model
from llmtrain.models.meta import on_meta

LENGTH = 13
CONFIG = ModelConfig(num_layers=2, hidden_size=24, num_heads=6, num_kv_heads=2, head_dim=4, max_sequence_length=64)


def with_parts(**changes: Any) -> ModelConfig:
    return dataclasses.replace(CONFIG, **changes)


@torch.no_grad()
def drawn(module: Any, seed: int = 0) -> Any:
    """All weights N(0, 0.3²), in float64."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.copy_(torch.empty(parameter.shape).normal_(0.0, 0.3, generator=generator))
    return module.double().eval()


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@functools.cache
def published(name: str) -> LanguageModel:
    """The architecture of that name in configs/model with its own vocabulary, on the meta device."""
    config: ModelConfig = load_config("pretrain", [f"model={name}"]).model
    assert config.published_vocab_size is not None
    with on_meta():
        return make_model(config, config.published_vocab_size)
