"""oneDNN's products behind linear layers, against float64 and torch's own; they run on any processor."""

import pytest
import torch
from torch import Tensor, nn

from llmtrain.config.schema import ModelConfig
from llmtrain.kernels import cpu_product
from llmtrain.models.heads import LanguageModel
from llmtrain.models.linear import Linear

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


def _gradients(layer: nn.Linear, inputs: Tensor, grad: Tensor) -> list[Tensor]:
    leaf = inputs.clone().requires_grad_()
    outputs = layer(leaf)
    parts = torch.autograd.grad(outputs, [leaf, *layer.parameters()], grad.to(outputs.dtype))
    return [outputs.double(), *(part.double() for part in parts)]


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_layer_of_torch(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bias: bool) -> None:
    """Values and gradients, as close to float64 as torch's own are (1.5 times their error)."""
    torch.manual_seed(0)
    exact = nn.Linear(24, 40, bias=bias, dtype=torch.float64)
    inputs, grad = torch.randn(3, 7, 24, dtype=torch.float64), torch.randn(3, 7, 40, dtype=torch.float64)
    expected = _gradients(exact, inputs, grad)
    calls = []
    monkeypatch.setattr(cpu_product, "is_faster", lambda *_, **__: calls.append(1) or True)
    errors = []
    for kind in (Linear, nn.Linear):
        layer = kind(24, 40, bias=bias)
        layer.load_state_dict(exact.state_dict())
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            found = _gradients(layer, inputs.float(), grad.float())
        pairs = zip(found, expected, strict=True)
        errors.append([((one - other).norm() / other.norm()).item() for one, other in pairs])
    assert len(calls) == 1
    floor = 1e-7 if dtype == torch.float32 else 1e-3
    for mine, torchs in zip(*errors, strict=True):
        assert mine <= 1.5 * torchs + floor


def test_taken_only_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_product, "HAS_ONEDNN", True)
    monkeypatch.setattr(cpu_product, "FEWEST_MULTIPLICATIONS", 1000)
    weight, many, few = torch.zeros(10, 5), torch.zeros(4, 5, 5), torch.zeros(1, 5)
    assert cpu_product.is_faster(many, weight, torch.float32, has_bias=False)
    assert cpu_product.is_faster(many, weight, torch.bfloat16, has_bias=True)
    assert not cpu_product.is_faster(many, weight, torch.bfloat16, has_bias=False)
    assert not cpu_product.is_faster(few, weight, torch.float32, has_bias=True)
    assert not cpu_product.is_faster(many, weight, torch.float64, has_bias=True)
    assert not cpu_product.is_faster(many.to("meta"), weight, torch.float32, has_bias=True)


@needs_onednn
def test_operator_is_sound_for_compilers() -> None:
    for bias in (None, torch.randn(4, requires_grad=True)):
        tensors = (torch.randn(6, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True), bias)
        torch.library.opcheck(cpu_product.onednn_product, tensors)


@needs_onednn
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_learns_the_same_with_it(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, compiled: bool) -> None:
    """Gradients of a whole model: float32 within 1e-6, bfloat16 within 2e-2 of their norm."""
    torch.compiler.reset()
    config = ModelConfig(num_layers=2, hidden_size=32, num_heads=4, max_sequence_length=32, bias=True)
    tokens = torch.arange(20)[None].expand(2, -1).contiguous()
    found = []
    for fewest in (1, 2**62):
        monkeypatch.setattr(cpu_product, "HAS_ONEDNN", True)
        monkeypatch.setattr(cpu_product, "FEWEST_MULTIPLICATIONS", fewest)
        model = LanguageModel(config, 61).initialise(torch.Generator().manual_seed(0))
        run = torch.compile(model, dynamic=False) if compiled else model
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = run(tokens)
        logits.float().logsumexp(-1).sum().backward()
        found.append(torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None]))
        torch.compiler.reset()
    difference = (found[0] - found[1]).norm() / found[1].norm()
    assert difference < (1e-6 if dtype == torch.float32 else 2e-2)
