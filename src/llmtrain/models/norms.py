"""Normalisation of the residual stream, and of queries and keys.

Shapes: B rows, T positions, N width (the hidden size, or that of heads).
"""

import torch
from torch import Tensor, nn

from llmtrain.config.schema import ModelConfig
from llmtrain.kernels import elementwise


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm`, [..., N] → [..., N], in fewer passes where torch has no kernel for it."""

    def forward(self, hidden: Tensor) -> Tensor:
        if not elementwise.fuses(hidden) or hidden.dtype != self.weight.dtype or hidden.dtype.itemsize < 4:
            return super().forward(hidden)
        assert self.eps is not None
        return elementwise.rms_norm(hidden, self.weight, self.eps)


class ZeroCentredRMSNorm(nn.Module):
    """y = (1 + w) · x / sqrt(mean(x²) + eps), w starting at 0; taken in float32 (Gemma, arXiv 2403.08295)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        scaled = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (scaled * (1.0 + self.weight.to(wide.dtype))).to(hidden.dtype)


def make_norm(config: ModelConfig, size: int | None = None) -> nn.Module:
    """A norm over the last dimension, [B, T, ..., N] → the same; the statistics are taken in float32.

    rmsnorm: y = w · x / sqrt(mean(x²) + eps) (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4).
    layernorm: y = w · (x - mean(x)) / sqrt(var(x) + eps) + b (Ba et al. 2016, arXiv 1607.06450, eq. 4).
    `size`: null stands for the hidden size.
    """
    size = config.hidden_size if size is None else size
    if config.norm == "rmsnorm":
        return RMSNorm(size, eps=config.norm_eps)
    if config.norm == "layernorm":
        return nn.LayerNorm(size, eps=config.norm_eps, bias=config.has_bias("norm"))
    return ZeroCentredRMSNorm(size, config.norm_eps)
