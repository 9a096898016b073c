"""Dynamic loss scaling for float16, whose small gradients would be zero (Micikevicius et al. 2017, arXiv 1710.03740).

The loss is multiplied by a scale before the backward pass and the gradient divided by it after. Where the gradient
overflows, the update is not made and the scale halved; after many updates without that it is doubled. Rule and numbers
are those of `torch.amp.GradScaler`, which hides its verdict from the processes that have to agree on it, and its scale
from the state of a run; here both are in the open.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from llmtrain.engine.distributed import local

# GradScaler's: the scale to begin with, and the updates after which it grows.
FIRST_SCALE, GROWTH_UPDATES = 2.0**16, 2000
# With a scale of 1 it is not the scale that makes a gradient overflow.
LAST_SCALE = 1.0
PART = "loss_scale"


class LossScale(nn.Module):
    """The scale, which adapts; a power of two, so that scaling rounds nothing. Its buffers are state of the run."""

    scale: Tensor
    updates: Tensor
    overflowed: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(FIRST_SCALE, dtype=torch.float64))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))  # since it has changed
        self.register_buffer("overflowed", torch.zeros((), dtype=torch.int64))  # updates of the run left out for it

    @torch.no_grad()
    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients by the scale."""
        gradients = [local(each.grad) for each in parameters if each.grad is not None]
        torch._foreach_mul_(gradients, 1 / float(self.scale))

    def overflows(self, loss_is_finite: bool, gradient_is_finite: bool) -> bool:
        """Whether an update is not to be made because of the scale, which adapts; the same on all processes."""
        if loss_is_finite and not gradient_is_finite and float(self.scale) > LAST_SCALE:
            self.scale /= 2
            self.updates.zero_()
            self.overflowed += 1
            return True
        self.updates += 1
        if int(self.updates) == GROWTH_UPDATES:
            self.scale *= 2
            self.updates.zero_()
        return False

    def values(self) -> dict[str, float]:
        """Metrics: the scale, and how many updates have been left out for it."""
        return {"train/loss_scale": float(self.scale), "train/overflowed_steps": float(self.overflowed)}
