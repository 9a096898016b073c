"""From rewards to advantages: per token with a value model, per answer against a baseline without one.

Shapes: B rows, T tokens, G answers to each prompt, which stand side by side.
"""

from typing import Literal

import torch
from torch import Tensor

from llmtrain.objectives.kl import Reduce


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True, reduce: Reduce | None = None) -> Tensor:
    """Scales the masked values to variance 1, and shifts them to mean 0 unless told not to; zero elsewhere.

    The variance is the biased one, as in lm-human-preferences (`whiten`). Any shape.

    Args:
        values: what to whiten.
        mask: bool, which of them count.
        shift_mean: if false, the mean is as before.
        reduce: adds up over processes, where the statistics are to be over all of theirs.
    """
    reduce = reduce or _alone
    kept = torch.where(mask, values, 0.0).double()
    total, count = reduce(torch.stack([kept.sum(), mask.sum().double()]))
    mean = total / count.clamp(min=1)
    variance = reduce(torch.where(mask, kept - mean, 0.0).square().sum()) / count.clamp(min=1)
    whitened = (kept - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0.0).to(values.dtype)


def _alone(tensor: Tensor) -> Tensor:
    return tensor


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coefficient: float | Tensor) -> Tensor:
    """Rewards [B, T]: −coefficient · KL at every token, plus the score at the last one.

    Ziegler et al. 2019 (arXiv 1909.08593), equation 2. Scores are [B]; the estimates of the KL (there: k1) and the
    mask are [B, T].
    """
    penalty = torch.where(mask, kl_coefficient * kl, 0.0)
    following = torch.nn.functional.pad(mask[:, 1:], (0, 1))
    return torch.where(mask & ~following, scores[:, None], 0.0) - penalty


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns (advantage + value), [B, T] each, zero outside the mask.

    Schulman et al. 2016 (arXiv 1506.02438), equation 16: A(t) = Σ_l (γλ)^l δ(t+l), δ(t) = r(t) + γ V(t+1) − V(t).
    A row ends with its mask: the value after it is zero, whether or not the end token was reached.
    """
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    deltas = rewards + gamma * following - values
    advantages, running = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        running = torch.where(mask[:, t], deltas[:, t] + gamma * lam * running, 0.0)
        advantages[:, t] = running
    return advantages, advantages + values


RewardScale = Literal["group", "batch", "none"]
EPSILON = 1e-4  # beside a standard deviation, as in trl


def group_advantages(
    rewards: Tensor, group_rows: int, scale: RewardScale = "group", reduce: Reduce | None = None
) -> Tensor:
    """(r − mean of the group) / standard deviation, [B] from rewards [B]; unbiased deviation, `EPSILON` added to it.

    Shao et al. 2024 (arXiv 2402.03300), section 4.1.2, with the deviation of the group; that of the whole batch is
    the variant of Hu et al. 2025 (arXiv 2501.03262); without division as in Liu et al. 2025 (arXiv 2503.20783).
    """
    groups = rewards.view(-1, group_rows)
    advantages = (groups - groups.mean(dim=1, keepdim=True)).flatten()
    if scale == "group":
        return advantages / (groups.std(dim=1).repeat_interleave(group_rows) + EPSILON)
    return advantages / (_deviation(rewards, reduce or _alone) + EPSILON) if scale == "batch" else advantages


def _deviation(values: Tensor, reduce: Reduce) -> Tensor:
    """The unbiased standard deviation of values [B] over all processes, 0-dim."""
    total, count = reduce(torch.stack([values.double().sum(), values.new_tensor(len(values)).double()]))
    squares = reduce((values.double() - total / count).square().sum())
    return (squares / (count - 1).clamp(min=1)).sqrt().to(values.dtype)


def leave_one_out_advantages(rewards: Tensor, group_rows: int) -> Tensor:
    """r − mean of the other answers' rewards to the same prompt, [B] from rewards [B].

    Ahmadian et al. 2024 (arXiv 2402.14740), equation 8, after Kool et al. 2019.
    """
    groups = rewards.view(-1, group_rows)
    others = (groups.sum(dim=1, keepdim=True) - groups) / (group_rows - 1)
    return (groups - others).flatten()


def batch_advantages(rewards: Tensor, reduce: Reduce | None = None) -> Tensor:
    """r − mean over the batch of all processes, [B] from rewards [B]: the plainest baseline of Williams 1992."""
    total, count = (reduce or _alone)(torch.stack([rewards.double().sum(), rewards.new_tensor(len(rewards)).double()]))
    return (rewards.double() - total / count).to(rewards.dtype)


def flat_groups(rewards: Tensor, group_rows: int) -> Tensor:
    """Whether all answers of a group have the same reward, so that nothing is learned from them: [B / G] bool."""
    groups = rewards.view(-1, group_rows)
    return groups.amax(dim=1) == groups.amin(dim=1)
