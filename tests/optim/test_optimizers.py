"""Optimizers: parameter groups, options, the fused kernel, sharded parameters and clear refusals."""

import sys
import types

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from llmtrain.config.errors import ConfigError
from llmtrain.config.schema import OptimizerConfig
from llmtrain.optim.optimizers import build_optimizer, parameter_groups


class Frugal(torch.optim.Optimizer):
    """A user's optimizer with few options."""

    def __init__(self, params, lr: float, sharpness: float = 1.0) -> None:
        super().__init__(params, {"lr": lr, "sharpness": sharpness})

    def step(self, closure=None):
        return None


class Everything(torch.optim.Optimizer):
    """A user's optimizer that takes whatever it is given."""

    def __init__(self, params, **options) -> None:
        super().__init__(params, options)

    def step(self, closure=None):
        return None


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3))


@pytest.fixture(autouse=True)
def _own_classes_importable(monkeypatch):
    module = types.ModuleType("users_own")
    module.Frugal, module.Everything = Frugal, Everything
    monkeypatch.setitem(sys.modules, "users_own", module)


def config(target: str = "torch.optim.AdamW", **options) -> OptimizerConfig:
    return OptimizerConfig(_target_=target, **options)


def test_matrices_decay_and_vectors_do_not(model):
    optimizer = build_optimizer(model, config(weight_decay=0.1))
    decaying, constant = optimizer.param_groups
    assert decaying["weight_decay"] == 0.1
    assert [tuple(p.shape) for p in decaying["params"]] == [(5, 4), (3, 4)]
    assert constant["weight_decay"] == 0.0
    assert [tuple(p.shape) for p in constant["params"]] == [(3,), (3,), (3,)]
    assert decaying["betas"] == (0.9, 0.95)


def test_scaled_learning_rates_make_groups_whose_steps_decay_alike(model):
    optimizer = build_optimizer(model, config(lr=0.01, weight_decay=0.1), {"1.weight": 0.25, "2.weight": 0.5})
    groups = [
        (len(each["params"]), each["lr"], each["weight_decay"], each.get("lr_scale")) for each in optimizer.param_groups
    ]
    assert groups == [(1, 0.01, 0.1, None), (1, 0.0025, 0.4, 0.25), (2, 0.01, 0.0, None), (1, 0.005, 0.0, 0.5)]
    assert optimizer.param_groups[1]["params"] == [model[1].weight]


def test_weights_that_are_trained_later_are_a_group_of_their_own(model):
    optimizer = build_optimizer(model, config(weight_decay=0.1), first_steps={"1.weight": 3})
    groups = [
        ([tuple(each.shape) for each in group["params"]], group.get("first_step")) for group in optimizer.param_groups
    ]
    assert groups == [([(5, 4)], None), ([tuple(model[1].weight.shape)], 3), ([(3,), (3,), (3,)], None)]


def test_frozen_and_shared_parameters(model):
    model[1].requires_grad_(False)
    tied = nn.ModuleDict({"body": model, "head": nn.Linear(4, 5, bias=False)})
    tied["head"].weight = model[0].weight
    groups = parameter_groups(tied, 0.1)
    assert [len(group["params"]) for group in groups] == [1, 2]


def test_adamw_steps_as_by_hand(model):
    """The fused kernel does what the plain one does."""
    other = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3))
    other.load_state_dict(model.state_dict())
    fused = build_optimizer(model, config(lr=0.01))
    assert all(group["fused"] for group in fused.param_groups)
    plain = build_optimizer(other, config(lr=0.01, options={"foreach": False}))
    assert not any(group["fused"] for group in plain.param_groups)
    for _ in range(3):
        for net, optimizer in ((model, fused), (other, plain)):
            net(torch.arange(5)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two)


def test_options_reach_the_optimizer(model):
    optimizer = build_optimizer(model, config("torch.optim.SGD", lr=0.5, options={"momentum": 0.9}))
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.param_groups[0]["momentum"] == 0.9
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_epsilon_reaches_the_optimizer(model):
    assert build_optimizer(model, config(lr=0.01, eps=1e-5)).param_groups[0]["eps"] == 1e-5
    assert build_optimizer(model, config(lr=0.01)).param_groups[0]["eps"] == 1e-8


def test_the_users_own_classes(model):
    frugal = build_optimizer(model, config("users_own.Frugal", options={"sharpness": 2.0}))
    assert isinstance(frugal, Frugal)
    assert len(frugal.param_groups) == 1  # it knows no weight decay
    assert frugal.param_groups[0]["sharpness"] == 2.0
    everything = build_optimizer(model, config("users_own.Everything", options={"anything": 1}))
    assert everything.param_groups[0]["anything"] == 1
    assert everything.param_groups[0]["betas"] == (0.9, 0.95)


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        (
            config("torch.optim.SGD", options={"momentun": 0.9}),
            r"optimizer.options.momentun: SGD knows no such option; did you mean momentum\? Allowed: dampening",
        ),
        (config(options={"lr": 0.1}), "optimizer.options.lr: is set by a key of its own"),
        (config("torch.optim.SGD", betas=(0.8, 0.9)), "optimizer.betas: torch.optim.SGD has no betas"),
        (config("users_own.Frugal", weight_decay=0.3), "optimizer.weight_decay: users_own.Frugal has none"),
        (config("torch.optim.LBFGS"), "closure"),
        (config("torch.optim.Muon"), "Muon refuses its arguments: .*2D"),
        (config("torch.optim.AdamX"), r"torch.optim has no 'AdamX'; did you mean Adam"),
    ],
)
def test_refusals_name_the_key(model, faulty, message):
    with pytest.raises(ConfigError, match=message):
        build_optimizer(model, faulty)


def test_sharded_parameters(model, tmp_path, monkeypatch):
    if dist.is_initialized():
        pytest.skip("another test's process group is open")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        plain = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3))
        plain.load_state_dict(model.state_dict())
        fully_shard(model, mesh=mesh)
        for net in (model, plain):
            optimizer = build_optimizer(net, config(lr=0.01), {"1.weight": 0.25})
            assert optimizer.param_groups[1]["lr_scale"] == 0.25
            net(torch.arange(5)).square().sum().backward()
            optimizer.step()
        assert type(next(model.parameters())).__name__ == "DTensor"
        for one, two in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one.full_tensor(), two)
    finally:
        dist.destroy_process_group()
