"""Averages of weights: those of torch, measured and handed over, and none where none are asked for."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from llmtrain.engine.averages import WeightAverages


def walk(model: nn.Module, seed: int) -> None:
    """A step of training, at random."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))


def test_they_are_those_of_torch() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    expected = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    expected.update_parameters(model)  # its first average is the first weights it sees
    averages = WeightAverages(model, 0.9)
    for step in range(20):
        walk(model, step)
        averages.update()
        expected.update_parameters(model)
    wanted = dict(expected.module.named_parameters())
    for name, value in averages.state().items():
        torch.testing.assert_close(value, wanted[name].detach(), rtol=1e-6, atol=1e-6)


def test_within_the_model_has_them_and_afterwards_its_own_bits() -> None:
    model = nn.Linear(3, 2)
    averages = WeightAverages(model, 0.5)
    walk(model, 0)
    averages.update()
    own, mean = model.weight.detach().clone(), averages.state()["weight"].clone()
    assert not torch.equal(own, mean)
    with averages.in_place():
        assert torch.equal(model.weight, mean)
    assert torch.equal(model.weight, own)
    assert torch.equal(averages.state()["weight"], mean)
    averages.hand_over()
    assert torch.equal(model.weight, mean)


def test_only_what_is_trained_is_averaged_and_nothing_without_a_decay() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    assert set(WeightAverages(model, 0.5).state()) == {"1.weight", "1.bias"}
    none = WeightAverages(model, None)
    before = model[1].weight.detach().clone()
    walk(model, 0)
    none.update()
    with none.in_place():
        none.hand_over()
    assert none.state() == {}
    assert not torch.equal(model[1].weight, before)
