"""The linear layer of all models."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.kernels import cpu_product


class Linear(nn.Linear):
    """`torch.nn.Linear`, [..., I] → [..., O], by the faster of torch's libraries; weights and names are the same."""

    part: Callable[[nn.Linear, Tensor], Tensor] | None = None
    """What this process computes of the layer where several share it (`tensor_parallel.py`). None: all."""
    row_order: Tensor | None = None
    """[O]: which row of the whole weight stands where, the processes' parts one below the other. None: as they are."""

    def forward(self, inputs: Tensor) -> Tensor:
        return product(inputs, self.weight, self.bias) if self.part is None else self.part(self, inputs)


def product(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """inputs [..., I] times weight [O, I] transposed, with bias [O]: [..., O]."""
    is_autocast = inputs.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if is_autocast else inputs.dtype
    if not cpu_product.is_faster(inputs, weight, dtype, has_bias=bias is not None):
        return F.linear(inputs, weight, bias)
    bias = None if bias is None else bias.to(dtype)
    outputs: Tensor = cpu_product.onednn_product(inputs.to(dtype).flatten(0, -2), weight.to(dtype), bias)
    return outputs.unflatten(0, inputs.shape[:-1])
