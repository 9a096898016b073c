"""The optimizer of a run: any `torch.optim.Optimizer` class, with weight decay on matrices only."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from llmtrain.config.errors import ConfigError
from llmtrain.config.schema import OptimizerConfig
from llmtrain.config.targets import accepted_options, check_options, resolve_target

# torch's optimizers with a fused kernel on CPU and CUDA (AdamW on CPU: 3.7 times as fast as the loop over parameters).
FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
# Options that choose another implementation, or need one that the fused kernel is not.
EXCLUDE_FUSED = {"fused", "foreach", "differentiable"}
# Rows and columns of the matrix on which a step is tried.
PROBE_SIZE = 256
# Keys of the optimizer's config that are arguments of most optimizers, not of all.
SHARED = ("betas", "eps")


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, scales: Mapping[str, float] | None = None,
    first_steps: Mapping[str, int] | None = None,
) -> Optimizer:  # fmt: skip
    """The optimizer that `config` names, over the model's trainable parameters; they may be sharded (DTensor).

    `scales`, `first_steps`: see `parameter_groups`.

    Raises:
        ConfigError: if the class cannot be found or does not know an option.
    """
    target = optimizer_class(config)
    groups = [
        {**group, "lr": config.lr * group.get("lr_scale", 1.0)}
        for group in parameter_groups(model, _decay(target, config), scales, first_steps)
    ]
    arguments = {"lr": config.lr, **_shared(target, config), **_fused(target, config, model), **config.options}
    try:
        return target(groups, **arguments)
    except (ValueError, TypeError, RuntimeError) as problem:
        raise ConfigError(f"optimizer: {config.target} refuses its arguments: {problem}") from problem


def optimizer_class(config: OptimizerConfig) -> type[Optimizer]:
    """The class that `config` names; raises ConfigError if it cannot be found or does not know an option."""
    target = resolve_target(config.target, Optimizer, "optimizer._target_")
    _refuse_closures(target, config.target)
    check_options(target, config.options, "optimizer.options", reserved=("params", "lr", "weight_decay", *SHARED))
    _shared(target, config)
    _decay(target, config)
    return target


def parameter_groups(
    model: nn.Module, weight_decay: float | None, scales: Mapping[str, float] | None = None,
    first_steps: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Trainable parameters in two groups, each once: matrices and embeddings decay; norms, biases and other vectors do
    not, as in nanoGPT. The biases of experts are vectors too, one below the other.

    Empty groups are left out. Without weight decay (None) all are in one group.

    `scales`: what multiplies the learning rate of parameters, by name. Those with the same one are a group of their
    own, which keeps it as `lr_scale`. Their weight decay is divided by it: decay of a step is the product of the two,
    and so the same as without (as in the muP authors' code; Wang and Aitchison 2024, arXiv 2405.13698).

    `first_steps`: from which step on parameters are trained, by name, where it is not 0; their group keeps it as
    `first_step`. Before it their learning rate is to be 0, for weights decay without a gradient too.
    """
    # of those spread over processes (DTensor), torch's kernels take at once what is spread over the same mesh
    scales, first_steps = scales or {}, first_steps or {}
    groups: dict[tuple[bool, float, int, Any], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = weight_decay is not None and parameter.dim() >= 2 and not name.endswith("bias")
            mesh = getattr(parameter, "device_mesh", None)
            kind = (not decays, scales.get(name, 1.0), first_steps.get(name, 0), mesh)
            groups.setdefault(kind, []).append(parameter)
    return [
        {
            "params": groups[constant, scale, first_step, mesh],
            **({} if weight_decay is None else {"weight_decay": 0.0 if constant else weight_decay / scale}),
            **({} if scale == 1.0 else {"lr_scale": scale}),
            **({"first_step": first_step} if first_step else {}),
        }
        for constant, scale, first_step, mesh in sorted(groups, key=lambda kind: (kind[0], -kind[1], kind[2]))
    ]


def state_bytes_per_weight(config: OptimizerConfig) -> float:
    """Bytes that the optimizer keeps for a float32 weight of a large matrix: 8 for the two moments of Adam.

    Raises ConfigError as `build_optimizer`.
    """
    if optimizer_class(config) in (torch.optim.Adam, torch.optim.AdamW) and not config.options:
        return 8.0  # without loading what a step needs
    matrix = nn.Linear(PROBE_SIZE, PROBE_SIZE, bias=False)
    matrix.weight.grad = torch.ones_like(matrix.weight)
    optimizer = build_optimizer(matrix, config)
    optimizer.step()
    kept = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    # a counter of steps is nothing beside a matrix
    return sum(value.nbytes for value in kept if value.dim()) / matrix.weight.numel()


def _refuse_closures(target: type[Optimizer], path: str) -> None:
    closure = inspect.signature(target.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            f"optimizer._target_={path!r}: it evaluates the loss several times a step (a closure), which training in "
            "micro-batches does not offer; choose another optimizer"
        )


def _takes(target: type[Optimizer], name: str) -> bool:
    allowed = accepted_options(target)
    return allowed is None or name in allowed


def _shared(target: type[Optimizer], config: OptimizerConfig) -> dict[str, Any]:
    """`betas` and `eps`, where they are set and known; one that was set on purpose and is not known is a fault."""
    given = {name: getattr(config, name) for name in SHARED if getattr(config, name) is not None}
    for name in list(given):
        if not _takes(target, name) and given.pop(name) != getattr(OptimizerConfig, name):
            raise ConfigError(f"optimizer.{name}: {config.target} has no {name}; set optimizer.{name}=null")
    return given


def _decay(target: type[Optimizer], config: OptimizerConfig) -> float | None:
    if _takes(target, "weight_decay"):
        return config.weight_decay
    if config.weight_decay not in (0.0, OptimizerConfig.weight_decay):
        raise ConfigError(f"optimizer.weight_decay: {config.target} has none; set optimizer.weight_decay=0")
    return None


def _fused(target: type[Optimizer], config: OptimizerConfig, model: nn.Module) -> dict[str, bool]:
    devices = {parameter.device.type for parameter in model.parameters() if parameter.requires_grad}
    usable = target in FUSED and devices <= {"cpu", "cuda"} and not EXCLUDE_FUSED & config.options.keys()
    return {"fused": True} if usable else {}
