"""The linear layer of all models."""

import torch
from torch import Tensor, nn

from llmtrain.kernels import cpu_product


class Linear(nn.Linear):
    """`torch.nn.Linear`, [..., I] → [..., O], by the faster of torch's libraries; weights and names are the same."""

    def forward(self, inputs: Tensor) -> Tensor:
        is_autocast = inputs.device.type == "cpu" and torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if is_autocast else inputs.dtype
        if not cpu_product.is_faster(inputs, self.weight, dtype, has_bias=self.bias is not None):
            return super().forward(inputs)
        bias = None if self.bias is None else self.bias.to(dtype)
        outputs: Tensor = cpu_product.onednn_product(inputs.to(dtype).flatten(0, -2), self.weight.to(dtype), bias)
        return outputs.unflatten(0, inputs.shape[:-1])
