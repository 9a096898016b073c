"""Normalisation of the residual stream.

Shapes: B rows, T positions, H hidden size.
"""

from torch import nn

from llmtrain.config.schema import ModelConfig


def make_norm(config: ModelConfig) -> nn.Module:
    """A norm over the last dimension, [B, T, H] → [B, T, H]; the statistics are taken in float32.

    rmsnorm: y = w · x / sqrt(mean(x²) + eps) (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4).
    layernorm: y = w · (x - mean(x)) / sqrt(var(x) + eps) + b (Ba et al. 2016, arXiv 1607.06450, eq. 4).
    """
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.bias)
