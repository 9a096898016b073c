"""Activations that are written in another form for the compiler, against torch's own in float64."""

import pytest
import torch
import torch.nn.functional as F

from llmtrain.models.feed_forward import gelu_tanh


@pytest.mark.parametrize("compiled", [False, True])
def test_gelu_tanh_and_its_gradient(compiled: bool) -> None:
    """Within 1e-6 in float32, also far out."""
    exact = torch.linspace(-30, 30, 4001, dtype=torch.float64, requires_grad=True)
    expected = F.gelu(exact, approximate="tanh")
    [slope] = torch.autograd.grad(expected.sum(), exact)
    inputs = exact.detach().float().requires_grad_()
    found = (torch.compile(gelu_tanh, backend="aot_eager") if compiled else gelu_tanh)(inputs)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), inputs)[0].double(), slope, rtol=1e-6, atol=1e-6)
