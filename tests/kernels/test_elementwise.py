"""Parts with gradients of their own agree with autograd's of the plain formula."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from llmtrain.kernels.elementwise import fuses, rms_norm, rotate_halves


def plain_norm(inputs: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * inputs / (inputs.square().mean(dim=-1, keepdim=True) + eps).sqrt()


def plain_rotation(heads: Tensor, cosines: Tensor, signed_sines: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    return heads * cosines + torch.cat((second, first), dim=-1) * signed_sines


def tables(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = torch.rand(shape, dtype=dtype) * 6.3
    sines = angles.sin()
    return torch.cat((angles.cos(), angles.cos()), dim=-1), torch.cat((-sines, sines), dim=-1)


def test_derivatives_are_those_of_differences() -> None:
    torch.manual_seed(0)
    inputs, weight = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 8), (8,)))
    assert gradcheck(lambda x, w: rms_norm(x, w, 0.1), (inputs, weight))
    heads = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    cosines, sines = tables((2, 3, 1, 3), torch.float64)
    assert gradcheck(lambda x: rotate_halves(x, cosines, sines), (heads,))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_norm_agrees_with_float64(scale: float) -> None:
    """Value and gradients within 1e-6 of the largest."""
    torch.manual_seed(0)
    inputs, weight, grad = torch.randn(5, 7, 64) * scale, torch.randn(64), torch.randn(5, 7, 64)
    found = gradients(lambda x, w: rms_norm(x, w, 1e-5), (inputs, weight), grad)
    wanted = gradients(lambda x, w: plain_norm(x, w, 1e-5), (inputs.double(), weight.double()), grad.double())
    for mine, exact in zip(found, wanted, strict=True):
        assert (mine - exact).abs().max() <= 1e-6 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_is_the_formula_to_the_bit(dtype: torch.dtype) -> None:
    """Gradients too, rounded once, where autograd rounds each summand to bfloat16."""
    torch.manual_seed(0)
    heads, grad = torch.randn(2, 5, 3, 16).to(dtype), torch.randn(2, 5, 3, 16).to(dtype)
    cosines, sines = tables((2, 5, 1, 8), torch.float32)
    value, of_heads = gradients(lambda x: rotate_halves(x, cosines, sines), (heads,), grad)
    plain = gradients(lambda x: plain_rotation(x, cosines, sines), (heads.float(),), grad.float())
    assert value.dtype == of_heads.dtype == dtype
    for mine, wanted in zip((value, of_heads), plain, strict=True):
        torch.testing.assert_close(mine, wanted.to(dtype), rtol=0, atol=1e-6 if dtype == torch.float32 else 0)


def test_turning_keeps_its_argument() -> None:
    heads = torch.randn(1, 2, 1, 4)
    before = heads.clone()
    rotate_halves(heads, *tables((1, 2, 1, 2), torch.float32))
    assert torch.equal(heads, before)


def test_frozen_weights_and_inputs_get_no_gradient() -> None:
    inputs, weight = torch.randn(3, 4, requires_grad=True), torch.randn(4)
    rms_norm(inputs, weight, 1e-5).sum().backward()
    assert inputs.grad is not None
    assert weight.grad is None
    frozen, trained = torch.randn(3, 4), torch.randn(4, requires_grad=True)
    rms_norm(frozen, trained, 1e-5).sum().backward()
    assert frozen.grad is None
    assert trained.grad is not None


def test_a_compiler_fuses_by_itself() -> None:
    """Under it, and where there is no data, the plain formulas are taken."""
    assert fuses(torch.ones(1))
    assert not fuses(torch.ones(1, device="meta"))
    assert not torch.compile(fuses, backend="eager")(torch.ones(1))


def gradients(function, inputs: tuple[Tensor, ...], grad: Tensor) -> list[Tensor]:  # type: ignore[no-untyped-def]
    leaves = [each.clone().requires_grad_() for each in inputs]
    value = function(*leaves)
    value.backward(grad)
    return [value.detach(), *(each.grad for each in leaves if each.grad is not None)]
