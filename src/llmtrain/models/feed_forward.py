"""The feed-forward part of a block.

Shapes: B rows, T positions, H hidden size, F inner size.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from llmtrain.config.schema import ModelConfig
from llmtrain.models.linear import Linear
from llmtrain.models.tensor_parallel import even, split_by_inputs, split_by_outputs

# The gate makes a third matrix; 8/3 x hidden keeps the parameter count of 4 x hidden without one.
GATED_MULTIPLE = 64


def gelu_tanh(inputs: Tensor) -> Tensor:
    """x / 2 · (1 + tanh(√(2/π) (x + 0.044715 x³))), which is x · σ(2 √(2/π) (x + 0.044715 x³)) (arXiv 1606.08415)."""
    if not torch.compiler.is_compiling():
        return F.gelu(inputs, approximate="tanh")
    # the compiler's exponential is several times as fast as its hyperbolic tangent
    return inputs * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (inputs + 0.044715 * inputs * inputs * inputs))


def squared_relu(inputs: Tensor) -> Tensor:
    """max(x, 0)² (So et al. 2021, arXiv 2109.08668)."""
    return F.relu(inputs).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "relu": F.relu,
    "relu_squared": squared_relu,
}
# Of the gate, by the name that it has together with its activation (Shazeer 2020, arXiv 2002.05202).
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": gelu_tanh,
}


def inner_size(config: ModelConfig) -> int:
    """F: `ffn_hidden_size`, or its default, 4 H, with a gate 8/3 H rounded up to a multiple of 64."""
    if config.ffn_hidden_size is not None:
        return config.ffn_hidden_size
    if config.activation not in GATES:
        return 4 * config.hidden_size
    return -(-8 * config.hidden_size // (3 * GATED_MULTIPLE)) * GATED_MULTIPLE


class FeedForward(nn.Module):
    """down(f(up(x))), [B, T, H] → [B, T, H] (Radford et al. 2019; f = GELU: arXiv 1606.08415, eq. 2)."""

    def __init__(self, config: ModelConfig, inner: int) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.up = Linear(config.hidden_size, inner, bias=config.has_bias("mlp"))
        self.down = Linear(inner, config.hidden_size, bias=config.has_bias("mlp"))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(self.activation(self.up(hidden)))

    def split(self, mesh: DeviceMesh) -> None:
        """Keep this process's share of the inner size; raises ConfigError where that is not even."""
        split_by_outputs(self.up, mesh, [even("the inner size", self.up.out_features, mesh)])
        split_by_inputs(self.down, mesh)


class GatedFeedForward(nn.Module):
    """down(f(gate(x)) · up(x)), [B, T, H] → [B, T, H] (f = SiLU is SwiGLU: Shazeer 2020, arXiv 2002.05202, eq. 6).

    `gate_up` holds both matrices, the gate's rows first, so that one product computes both.
    """

    def __init__(self, config: ModelConfig, inner: int) -> None:
        super().__init__()
        self.activation = GATES[config.activation]
        self.gate_up = Linear(config.hidden_size, 2 * inner, bias=config.has_bias("mlp"))
        self.down = Linear(inner, config.hidden_size, bias=config.has_bias("mlp"))

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_up(hidden).chunk(2, dim=-1)  # [B, T, F] each
        return self.down(self.activation(gate) * up)

    def split(self, mesh: DeviceMesh) -> None:
        """Keep this process's share of the inner size; raises ConfigError where that is not even."""
        inner = even("the inner size", self.down.in_features, mesh)
        split_by_outputs(self.gate_up, mesh, [inner, inner])
        split_by_inputs(self.down, mesh)


def make_dense(config: ModelConfig, inner: int) -> nn.Module:
    """The feed-forward part that `activation` names, of this inner size."""
    return (GatedFeedForward if config.activation in GATES else FeedForward)(config, inner)
