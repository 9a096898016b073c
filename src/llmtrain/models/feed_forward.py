"""The feed-forward part of a block.

Shapes: B rows, T positions, H hidden size, F inner size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.config.schema import ModelConfig
from llmtrain.models.linear import Linear

# The gate makes a third matrix; 8/3 x hidden keeps the parameter count of 4 x hidden without one.
SWIGLU_MULTIPLE = 64


def inner_size(config: ModelConfig) -> int:
    """F: `ffn_hidden_size`, or its default, 4 H (GELU) or 8/3 H rounded up to a multiple of 64 (SwiGLU)."""
    if config.ffn_hidden_size is not None:
        return config.ffn_hidden_size
    if config.activation != "swiglu":
        return 4 * config.hidden_size
    return -(-8 * config.hidden_size // (3 * SWIGLU_MULTIPLE)) * SWIGLU_MULTIPLE


def gelu_tanh(inputs: Tensor) -> Tensor:
    """x / 2 · (1 + tanh(√(2/π) (x + 0.044715 x³))), which is x · σ(2 √(2/π) (x + 0.044715 x³)) (arXiv 1606.08415)."""
    if not torch.compiler.is_compiling():
        return F.gelu(inputs, approximate="tanh")
    # the compiler's exponential is several times as fast as its hyperbolic tangent
    return inputs * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (inputs + 0.044715 * inputs * inputs * inputs))


class FeedForward(nn.Module):
    """down(gelu(up(x))), [B, T, H] → [B, T, H] (Radford et al. 2019; GELU: arXiv 1606.08415, eq. 2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = gelu_tanh if config.activation == "gelu_tanh" else F.gelu
        self.up = Linear(config.hidden_size, inner_size(config), bias=config.bias)
        self.down = Linear(inner_size(config), config.hidden_size, bias=config.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(self.activation(self.up(hidden)))


class GatedFeedForward(nn.Module):
    """down(silu(gate(x)) · up(x)), [B, T, H] → [B, T, H] (SwiGLU: Shazeer 2020, arXiv 2002.05202, eq. 6).

    `gate_up` holds both matrices, the gate's rows first, so that one product computes both.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = Linear(config.hidden_size, 2 * inner_size(config), bias=config.bias)
        self.down = Linear(inner_size(config), config.hidden_size, bias=config.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_up(hidden).chunk(2, dim=-1)  # [B, T, F] each
        return self.down(F.silu(gate) * up)


def make_feed_forward(config: ModelConfig) -> nn.Module:
    """The feed-forward part that `activation` names."""
    return GatedFeedForward(config) if config.activation == "swiglu" else FeedForward(config)
