"""Products in float8: torchao's rounding against the formula, which layers take part, and what is left as it was."""

import copy
import sys

import pytest
import torch
from torch import Tensor

from llmtrain.config.errors import UserError
from llmtrain.config.schema import ExpertsConfig, Float8Scaling, ModelConfig
from llmtrain.models.feed_forward import FeedForward
from llmtrain.models.float8 import to_float8
from llmtrain.models.heads import make_model

CONFIG = ModelConfig(num_layers=2, hidden_size=32, num_heads=2, max_sequence_length=64)
LARGEST = 448.0  # of float8_e4m3fn


def rounded(values: Tensor, dim: int | None) -> Tensor:
    """To float8 and back, scaled by the largest of all, or of each row; scales are powers of two for rows."""
    largest = values.abs().amax() if dim is None else values.abs().amax(dim, keepdim=True)
    scale = LARGEST / largest
    if dim is not None:
        scale = torch.exp2(torch.floor(torch.log2(scale)))
    return (values * scale).to(torch.float8_e4m3fn).float() / scale


@pytest.mark.parametrize("scaling", ["tensorwise", "rowwise"])
def test_products_are_those_of_rounded_factors(scaling: Float8Scaling) -> None:
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(
        [FeedForward(ModelConfig(num_layers=1, hidden_size=32, num_heads=2, activation="relu"), 64)]
    )
    plain = copy.deepcopy(layers[0].up)
    assert to_float8(layers, scaling, emulated=True) == 2
    inputs = torch.randn(3, 16, 32)
    dim = None if scaling == "tensorwise" else -1
    expected = rounded(inputs, dim) @ rounded(plain.weight.detach(), dim).T
    torch.testing.assert_close(layers[0].up(inputs), expected, rtol=0, atol=1e-5)
    error = (expected - plain(inputs)).norm() / expected.norm()
    assert 1e-3 < error < 0.05, "it is rounded, and not much"


@pytest.mark.parametrize("scaling", ["tensorwise", "rowwise"])
def test_gradients_point_the_same_way(scaling: Float8Scaling) -> None:
    model = make_model(CONFIG, 40).initialise(torch.Generator().manual_seed(0))
    small = copy.deepcopy(model)
    assert to_float8(small, scaling, emulated=True) == 2 * 4
    tokens = torch.randint(40, (4, 15), generator=torch.Generator().manual_seed(1))  # rows of no multiple of 16
    for each in (model, small):
        torch.nn.functional.cross_entropy(each(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    assert small.state_dict().keys() == model.state_dict().keys()
    for (name, one), other in zip(model.named_parameters(), small.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        cosine = torch.nn.functional.cosine_similarity(one.grad.flatten(), other.grad.flatten(), dim=0)
        assert cosine > 0.97, name
        assert other.dtype == torch.float32


def test_some_layers_stay_as_they_are() -> None:
    odd = ModelConfig(num_layers=1, hidden_size=24, num_heads=2, ffn_hidden_size=40, max_sequence_length=64)
    assert to_float8(make_model(odd, 40), "tensorwise", emulated=True) == 0
    experts = ModelConfig(
        num_layers=1, hidden_size=32, num_heads=2, max_sequence_length=64, experts=ExpertsConfig(num_experts=4)
    )
    model = make_model(experts, 48)
    assert to_float8(model, "tensorwise", emulated=True) == 2, "attention's alone"


def test_without_the_library_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(UserError, match=r"needs torchao: pip install 'llmtrain\[float8\]', or use bfloat16"):
        to_float8(make_model(CONFIG, 40), "tensorwise")
