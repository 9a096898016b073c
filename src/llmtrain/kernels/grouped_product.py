"""One matrix product for each group of rows, as a layer of experts needs it.

Rows stand sorted by group: those of group e are [ends[e - 1], ends[e]), the first from 0. What lies behind the last end
belongs to no group, and its result is zero. Where the groups end is known at run time only; for `torch.compile` the
products are operators whose shapes do not depend on it.

Shapes: N rows, E groups, I inputs, O outputs.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# On a CPU no product is made of fewer rows: MKL computes those in another way, which rounds differently, and a row's
# result should not depend on how many others there are.
LEAST_ROWS = 4
# What torch's grouped kernel wants of the bytes in a row.
ALIGNMENT_BYTES = 16


def _multiply(inputs: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """inputs [N, I] times their group's part of weight [E, O, I] transposed: [N, O]; ends [E] int64, ascending."""
    if _has_kernel(inputs, weight):
        return grouped_kernel(inputs, weight, ends)
    outputs = inputs.new_empty(inputs.shape[0], weight.shape[1])
    last = 0
    for group, start, last in _ranges(ends):
        rows = inputs[start:last]
        if last - start < LEAST_ROWS:
            filled = F.pad(rows, (0, 0, 0, LEAST_ROWS - len(rows)))
            outputs[start:last] = (filled @ weight[group].T)[: len(rows)]
        else:
            torch.mm(rows, weight[group].T, out=outputs[start:last])
    outputs[last:] = 0
    return outputs


def _weight_gradient(grad: Tensor, inputs: Tensor, ends: Tensor) -> Tensor:
    """grad [N, O] transposed times inputs [N, I], of each group: [E, O, I]."""
    if _has_kernel(grad, inputs):
        return F.grouped_mm(grad.T, inputs, offs=ends.int())
    gradient = grad.new_zeros(len(ends), grad.shape[1], inputs.shape[1])
    for group, start, end in _ranges(ends):
        torch.mm(grad[start:end].T, inputs[start:end], out=gradient[group])
    return gradient


def grouped_kernel(inputs: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The product by torch's own grouped kernel, which a GPU runs without telling the processor where groups end."""
    outputs = F.grouped_mm(inputs, weight.transpose(1, 2), offs=ends.int())
    behind = torch.arange(len(inputs), device=ends.device) >= ends[-1]
    return outputs.masked_fill_(behind[:, None], 0)  # the kernel leaves them as the memory was


def _has_kernel(*tensors: Tensor) -> bool:
    """Whether torch's grouped kernel takes such tensors; elsewhere it is a loop of torch's own."""
    return all(
        each.device.type == "cuda"
        and each.dtype == torch.bfloat16
        and all(size * each.element_size() % ALIGNMENT_BYTES == 0 for size in each.shape[1:])
        for each in tensors
    )


def _ranges(ends: Tensor) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of each group that has rows."""
    start = 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            yield group, start, end
        start = end


# Operators, so that `torch.compile` takes them as a whole.
grouped_product = torch.library.custom_op("llmtrain::grouped_product", _multiply, mutates_args=())
weight_gradient = torch.library.custom_op("llmtrain::grouped_weight_gradient", _weight_gradient, mutates_args=())


@grouped_product.register_fake
def _product_shape(inputs: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return inputs.new_empty(inputs.shape[0], weight.shape[1])


@weight_gradient.register_fake
def _gradient_shape(grad: Tensor, inputs: Tensor, ends: Tensor) -> Tensor:
    return grad.new_empty(ends.shape[0], grad.shape[1], inputs.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    inputs, weight, ends = ctx.saved_tensors
    of_inputs, of_weight, _ = ctx.needs_input_grad
    grad = grad.contiguous()
    return (
        grouped_product(grad, weight.transpose(1, 2), ends) if of_inputs else None,
        weight_gradient(grad, inputs, ends) if of_weight else None,
        None,
    )


grouped_product.register_autograd(_differentiate, setup_context=_save)
