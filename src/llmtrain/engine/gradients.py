"""What stands between the backward pass and the update: gradients are completed, measured and clipped.

A model's gradients may be of several kinds at once: plain tensors, and DTensors spread over different meshes.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llmtrain.engine.distributed import local
from llmtrain.engine.pipeline import pipeline_of


def complete(model: nn.Module) -> None:
    """Add up, in place, gradients of which a process has a part only, as modules with a `gradient_sum` say.

    A `gradient_sum` has a `group` of processes (None: this one alone) and a `factor`.
    """
    for module in model.modules():
        lacking = getattr(module, "gradient_sum", None)
        if lacking is None:
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.grad is not None:
                gradient = local(parameter.grad)
                if lacking.group is not None:
                    dist.all_reduce(gradient, group=lacking.group)
                gradient.mul_(lacking.factor)


@torch.no_grad()
def clip(model: nn.Module, limit: float | None) -> Tensor:
    """The norm of all gradients together, which are scaled down to `limit` where it is above; None: it is not."""
    limit = math.inf if limit is None else limit
    if pipeline := pipeline_of(model):
        return pipeline.clip(limit)
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    if not any(isinstance(parameter, DTensor) for parameter in parameters):
        return nn.utils.clip_grad_norm_(parameters, limit)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = _norm(gradients)
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)  # torch's own clipping has the same small number
    for device in {each.device for each in gradients}:
        torch._foreach_mul_([local(each) for each in gradients if each.device == device], scale.to(device))
    return norm


def _norm(gradients: Sequence[Tensor]) -> Tensor:
    """Of parts on several processes, each mesh's are added up over the dimensions over which they are spread."""
    kinds: dict[object, list[Tensor]] = {}
    for each in gradients:
        kind = (each.device_mesh, each.placements) if isinstance(each, DTensor) else None
        kinds.setdefault(kind, []).append(each)
    norms = []
    for same in kinds.values():
        squared = nn.utils.get_total_norm([local(each) for each in same]).square()
        first = same[0]
        if isinstance(first, DTensor):
            squared = squared.to(first.device_mesh.device_type)
            for dim, placement in enumerate(first.placements):
                if not placement.is_replicate():
                    dist.all_reduce(squared, group=first.device_mesh.get_group(dim))
        norms.append(squared)
    return torch.stack(norms).sum().sqrt()
