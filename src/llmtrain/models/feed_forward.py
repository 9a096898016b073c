"""The feed-forward part of a block.

Shapes: B rows, T positions, H hidden size, F inner size.
"""

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
    if not has_gate(config):
        return 4 * config.hidden_size
    return -(-8 * config.hidden_size // (3 * SWIGLU_MULTIPLE)) * SWIGLU_MULTIPLE


def has_gate(config: ModelConfig) -> bool:
    """Whether the activation multiplies two projections."""
    return config.activation == "swiglu"


def activate(name: str, hidden: Tensor) -> Tensor:
    """The activation of this name: [..., F] → [..., F], or [..., 2F] → [..., F] of a gate and what it lets through."""
    if name == "swiglu":
        gate, up = hidden.chunk(2, dim=-1)
        return F.silu(gate) * up
    return F.gelu(hidden, approximate="tanh" if name == "gelu_tanh" else "none")


class FeedForward(nn.Module):
    """down(gelu(up(x))), [B, T, H] → [B, T, H] (Radford et al. 2019; GELU: arXiv 1606.08415, eq. 2)."""

    def __init__(self, config: ModelConfig, inner: int) -> None:
        super().__init__()
        self.activation = config.activation
        self.up = Linear(config.hidden_size, inner, bias=config.bias)
        self.down = Linear(inner, config.hidden_size, bias=config.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(activate(self.activation, self.up(hidden)))


class GatedFeedForward(nn.Module):
    """down(silu(gate(x)) · up(x)), [B, T, H] → [B, T, H] (SwiGLU: Shazeer 2020, arXiv 2002.05202, eq. 6).

    `gate_up` holds both matrices, the gate's rows first, so that one product computes both.
    """

    def __init__(self, config: ModelConfig, inner: int) -> None:
        super().__init__()
        self.activation = config.activation
        self.gate_up = Linear(config.hidden_size, 2 * inner, bias=config.bias)
        self.down = Linear(inner, config.hidden_size, bias=config.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(activate(self.activation, self.gate_up(hidden)))


def make_dense(config: ModelConfig, inner: int) -> nn.Module:
    """The feed-forward part that `activation` names, of this inner size."""
    return (GatedFeedForward if has_gate(config) else FeedForward)(config, inner)
