"""Parts with their gradients written out: fewer passes over memory than autograd makes, where no compiler fuses them.

Shapes: N width of what is normalised; B rows, T positions, N heads, R rotated dimensions of a head.
"""

from typing import Any

import torch
from torch import Tensor


def fuses(inputs: Tensor) -> bool:
    """Whether this module is for such inputs: on a processor, out of `torch.compile`, which fuses by itself."""
    return inputs.device.type == "cpu" and not torch.compiler.is_compiling()


def rms_norm(inputs: Tensor, weight: Tensor, eps: float) -> Tensor:
    """w · x / sqrt(mean(x²) + eps) over the last dimension, [..., N] and [N] of one dtype, float32 or float64.

    Zhang and Sennrich 2019 (arXiv 1910.07467, eq. 4).
    """
    if not torch.is_grad_enabled():
        return (inputs * _inverse_rms(inputs, eps)).mul_(weight)
    normed: Tensor = _RMSNorm.apply(inputs, weight, eps)
    return normed


def rotate_halves(heads: Tensor, cosines: Tensor, signed_sines: Tensor) -> Tensor:
    """x cos + swap(x) (-sin, sin) in the dtype of x, swap exchanging the halves of the last dimension.

    Heads [B, T, N, R] and tables [B or 1, T, 1, R] that repeat in both halves (Su et al. 2021, arXiv 2104.09864,
    eq. 34); what the tables are made of gets no gradient.
    """
    if not torch.is_grad_enabled():
        return _turned(heads, cosines, signed_sines)
    rotated: Tensor = _RotateHalves.apply(heads, cosines, signed_sines)
    return rotated


class _RMSNorm(torch.autograd.Function):
    """With y = w x̂, x̂ = r x, r = 1 / sqrt(mean(x²) + eps): dx = r (w dy - x̂ mean(x̂ w dy)), dw = Σ dy x̂."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = _inverse_rms(inputs, eps)
        unit = inputs * inverse
        ctx.save_for_backward(unit, weight, inverse)
        return unit * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        unit, weight, inverse = ctx.saved_tensors
        weight_grad = (grad * unit).flatten(0, -2).sum(dim=0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, weight_grad, None
        of_unit = grad * weight
        along = torch.linalg.vecdot(of_unit, unit).unsqueeze(-1)
        return of_unit.addcmul_(unit, along, value=-1.0 / unit.shape[-1]).mul_(inverse), weight_grad, None


class _RotateHalves(torch.autograd.Function):
    """The gradient is turned back: the same with the sines' signs changed."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cosines: Tensor, signed_sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, signed_sines)
        return _turned(heads, cosines, signed_sines)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cosines, signed_sines = ctx.saved_tensors
        return _turned(grad, cosines, -signed_sines), None, None


def _inverse_rms(inputs: Tensor, eps: float) -> Tensor:
    return inputs.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()


def _turned(heads: Tensor, cosines: Tensor, signed_sines: Tensor) -> Tensor:
    # operators of one dtype, for those that mix two are several times as slow
    wide = heads.to(torch.promote_types(heads.dtype, cosines.dtype), copy=True)
    swapped = wide.roll(wide.shape[-1] // 2, dims=-1)
    return wide.mul_(cosines).addcmul_(swapped, signed_sines).to(heads.dtype)
