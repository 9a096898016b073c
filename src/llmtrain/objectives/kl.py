"""How far the policy has moved: estimates of the KL divergence, its adaptive coefficient, a limit on it.

Shapes: B rows, T tokens.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

# Adds a tensor up over all processes.
Reduce = Callable[[Tensor], Tensor]


def kl_k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """log π − log π_reference: the unbiased estimate of KL(π ‖ reference) on samples of π; k1 of Schulman 2020."""
    return logprobs - reference_logprobs


def kl_k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """exp(−d) − 1 + d with d = log π − log π_reference: unbiased, never negative, of low variance.

    k3 of Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html), on samples of π.
    """
    difference = logprobs - reference_logprobs
    return torch.expm1(-difference) + difference


KLEstimator = Literal["k1", "k3"]
KL_ESTIMATORS: dict[KLEstimator, Callable[[Tensor, Tensor], Tensor]] = {"k1": kl_k1, "k3": kl_k3}


class AdaptiveKL(nn.Module):
    """The KL penalty's coefficient: fixed, or steered towards a KL per answer.

    Ziegler et al. 2019 (arXiv 1909.08593), section 2.2: each rollout multiplies the coefficient by
    1 + error · answers / horizon, where error = KL / target − 1, clipped to ±0.2. A module because the coefficient
    belongs to the state of a run.

    Args:
        coefficient: the value to start from.
        target: wanted sum of log-ratios over an answer, in nats. None: the coefficient stays.
        horizon: number of answers over which it adapts.
    """

    coefficient: Tensor

    def __init__(self, coefficient: float, target: float | None = None, horizon: int = 10_000) -> None:
        super().__init__()
        self.target, self.horizon = target, horizon
        self.register_buffer("coefficient", torch.tensor(coefficient))

    def update(self, kl: Tensor, answers: int) -> None:
        """Adapt to a rollout of `answers` answers, over all processes, whose mean KL per answer was `kl` (0-dim)."""
        if self.target is not None:
            # one rollout whose KL is no number must not make the coefficient one for ever
            error = (kl.to(self.coefficient) / self.target - 1).clamp(-0.2, 0.2).nan_to_num(0.0)
            self.coefficient.mul_(1 + error * (answers / self.horizon))


class KLStop:
    """Ends a rollout's updates once the policy has moved too far from the one that sampled.

    The objective adds what it sees in each micro-batch of an update; before the next update the mean over all
    processes is held against the limit, so all of them stop together. It lives within one step and is no state.
    """

    def __init__(self, limit: float, reduce: Reduce) -> None:
        self.limit, self.reduce = limit, reduce
        self.seen: list[Tensor] = []

    def begin(self) -> None:
        """Forget the rollout before."""
        self.seen = []

    def add(self, kl: Tensor, count: Tensor) -> None:
        """The summed KL (k3) of a micro-batch and the number of its tokens, 0-dim both."""
        self.seen.append(torch.stack([kl.detach().double(), count.double()]))

    def is_reached(self) -> bool:
        """Whether the mean KL per token of the update before is above the limit. All processes must ask together."""
        if not self.seen:
            return False
        kl, count = self.reduce(torch.stack(self.seen).sum(dim=0)).tolist()
        self.seen = []
        return kl > self.limit * count
