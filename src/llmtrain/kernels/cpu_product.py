"""Matrix products for processors where torch's own are not the fastest ones it brings along.

In float32 torch calls MKL, and in bfloat16 it adds a bias with a pass of its own; oneDNN, which torch has too, makes
the same products in 6 to 15 % less time on the processors meant here. Both sum in another order, no more.

Shapes: N tokens in all, I inputs, O outputs.
"""

from typing import Any

import torch
from torch import Tensor

from llmtrain.kernels.cpu_attention import PRODUCTS_WITHOUT_TILES

# Multiplications below which the call of an operator of one's own costs what is gained; measured on an AMD EPYC of the
# fourth generation, 2 cores.
FEWEST_MULTIPLICATIONS = 2**28
HAS_ONEDNN = PRODUCTS_WITHOUT_TILES and torch.backends.mkldnn.is_available()


def times_transposed(inputs: Tensor, weight: Tensor) -> Tensor:
    """inputs [N, I] times weight [O, I] transposed: [N, O], by the faster of torch's libraries."""
    if not is_faster(inputs, weight, inputs.dtype, has_bias=False):
        return inputs @ weight.T
    product: Tensor = onednn_product(inputs, weight, None)
    return product


def is_faster(inputs: Tensor, weight: Tensor, dtype: torch.dtype, *, has_bias: bool) -> bool:
    """Whether oneDNN is the faster one for inputs [..., I] and a weight [O, I] in such a dtype."""
    if not HAS_ONEDNN or inputs.device.type != "cpu" or inputs.dim() < 2:
        return False
    if not (dtype == torch.float32 or (dtype == torch.bfloat16 and has_bias)):
        return False
    return inputs.numel() * weight.shape[0] >= FEWEST_MULTIPLICATIONS


def _multiply(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """inputs [N, I] times weight [O, I] transposed, with bias [O]: [N, O]."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
    return product


# One operator, so that `torch.compile` takes it as a whole.
onednn_product = torch.library.custom_op("llmtrain::product", _multiply, mutates_args=())


@onednn_product.register_fake
def _product_shape(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return inputs.new_empty(inputs.shape[0], weight.shape[0])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    inputs, weight = ctx.saved_tensors
    of_inputs, of_weight, of_bias = ctx.needs_input_grad
    # a matrix's gradient sums over all tokens, where MKL is the faster one; without a bias bfloat16 is oneDNN's anyway
    return (
        (onednn_product(grad, weight.T, None) if grad.dtype == torch.float32 else grad @ weight) if of_inputs else None,
        grad.T @ inputs if of_weight else None,
        grad.sum(dim=0) if of_bias else None,
    )


onednn_product.register_autograd(_differentiate, setup_context=_save)
