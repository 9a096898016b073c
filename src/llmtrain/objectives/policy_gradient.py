"""Proximal policy optimisation of a language model: the rollout's batch type, the estimators, the objective.

Shapes: B rows, S tokens of the longest row, T = S − 1. A quantity [B, T] at position t belongs to the choice of
tokens[:, t + 1]: `logprobs[:, t]` is that token's log-probability, `values[:, t]` the value of the state before it.
Padding stands on the right; the mask of a row is one unbroken range of positions.

How the details of PPO that decide whether it works are handled, after openai/lm-human-preferences and Huang et al.
2024 (arXiv 2403.17031). "Followed" and "switch" are as there; the rest says what is done instead, and why.

 1. Reward and value models read prompt and answer: followed.
 2. Padding apart from the end token, prompts padded left: instead rows are padded on the right and every use is masked,
    so positions need no correction and padding is never seen.
 3. Answers of fixed length, cut at the end token afterwards: instead a row stops being sampled at its end token; the
    answers are the same and no time is spent beyond the end.
 4. The temperature divides the logits wherever log-probabilities are taken: followed (`Ppo`, the rollouts).
 5. No top-k or top-p in rollouts: followed; there is no switch, because the ratio would be wrong.
 6. Reward head drawn from N(0, 1 / (H + 1)) without bias: followed. Value model copied from the reward model: followed.
 7. Reward normalised: followed; the reward model carries its mean and standard deviation.
 8. The score at the last token, a KL penalty at every token: followed (`token_rewards`).
 9. A fixed score for answers without end token: instead a penalty is taken from their score (switch:
    missing_eos_penalty), so that among unfinished answers the better one is still preferred.
10. gamma 1, lambda 0.95, clip 0.2, value clip 0.2, value weight 0.1: followed; each a switch.
11. Rewards whitened without shift of the mean, advantages with it: followed; each a switch. Statistics are over the
    rollout of all processes and not over a minibatch, so they do not depend on the layout.
12. Adaptive KL coefficient: switch (kl_target, kl_horizon); fixed by default (`AdaptiveKL`).
13. Dropout off in policy, reference, value and reward model: followed; with dropout the first ratio is not 1.
14. Adam's epsilon 1e-5: switch (optimizer.eps). TensorFlow's placement of it: left out, an own optimizer by `_target_`
    can have it.
15. Learning rate annealed to 0: switch (schedule).
16. A seed for each process: instead a seed for each row, so that rollouts do not depend on the number of processes.
17. Four passes, one minibatch, batches of 512: switch (epochs, minibatches, train.batch_rows).
18. Padding excluded from KL, advantages, losses and whitening; the value after the end is zero: followed (`gae`).
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Self

import torch
from torch import Tensor, nn

from llmtrain.config.errors import ConfigError
from llmtrain.config.seeds import derive_seed
from llmtrain.objectives.batch import Batch, Metrics
from llmtrain.objectives.logprobs import token_logprobs_and_entropy

# Adds a tensor up over all processes.
Reduce = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trajectory(Batch):
    """A rollout: prompts, sampled answers, and what PPO learns from; the rows of `rows_of_process`, in that order."""

    tokens: Tensor
    """[B, S] int64: prompt, answer, padding."""
    response_mask: Tensor
    """[B, S] bool: the sampled tokens, end token included."""
    logprobs: Tensor
    """[B, T] float32, of the policy that sampled; zero outside the answer, as below."""
    values: Tensor
    """[B, T] float32, of the value model at that time."""
    advantages: Tensor
    """[B, T] float32."""
    returns: Tensor
    """[B, T] float32."""
    epochs: int
    """Passes over the rollout."""
    minibatches: int
    """Updates in each pass."""
    first_slot: int
    """Number of this process's first slot: the first of its `rows_of_process`."""
    seed: int
    """With `step`: the key of the shuffling."""
    step: int
    """The training step that this is the rollout of."""
    measured: Metrics = dataclasses.field(default_factory=dict)
    """What is known of the rollout before it is trained on: rewards, KL."""

    def metrics(self) -> Metrics:
        """The rollout's rewards, KL and lengths."""
        return self.measured

    def updates(self) -> Iterator[Self]:
        """`minibatches` updates for each of the `epochs` passes; every pass holds each row once."""
        for rows in self.update_rows():
            yield self[rows]

    def update_rows(self) -> Iterator[Tensor]:
        """The positions in this trajectory of each update's rows, [B / minibatches] int64, by slot."""
        slots = len(self) // self.minibatches
        for epoch in range(self.epochs):
            lines = torch.stack([self._order(epoch, self.first_slot + slot) for slot in range(slots)], dim=1)
            yield from (lines * slots + torch.arange(slots)).to(self.tokens.device)

    def _order(self, epoch: int, slot: int) -> Tensor:
        """Which of a slot's rows goes into which minibatch."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "minibatch", self.step, epoch, slot))
        return torch.randperm(self.minibatches, generator=generator)


def rows_of_process(rank: int, world: int, rows: int, minibatches: int) -> Tensor:
    """Numbers, among all `rows` of a rollout, of the rows that a process holds, ascending.

    The rows are laid out as a table of `minibatches` lines and rows / minibatches slots; row r stands in slot
    r mod slots. A process holds whole slots, a contiguous range of them. A minibatch takes one row from each slot, by
    a permutation drawn for that slot alone; so it holds the same rows however many processes share them, and every
    process has the same part in it.

    Raises:
        ConfigError: if the rows cannot be laid out in minibatches, or the slots not be shared out.
    """
    slots, rest = divmod(rows, minibatches)
    if rest:
        raise ConfigError(
            f"train.batch_rows={rows} cannot be split into method.minibatches={minibatches} equal parts; "
            "choose a multiple"
        )
    if slots % world:
        raise ConfigError(
            f"{slots} rows in each minibatch (train.batch_rows={rows} / method.minibatches={minibatches}) cannot be "
            f"shared out evenly to {world} processes; choose a multiple of {world}"
        )
    return torch.arange(rows).view(minibatches, slots)[:, slots_of_process(rank, world, slots)].flatten()


def slots_of_process(rank: int, world: int, slots: int) -> slice:
    """The range of slots that a process holds."""
    return slice(rank * slots // world, (rank + 1) * slots // world)


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


def token_rewards(
    scores: Tensor, logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor, kl_coefficient: float | Tensor
) -> Tensor:
    """Rewards [B, T]: −coefficient · (log π − log π_reference) at every token, plus the score at the last one.

    Ziegler et al. 2019 (arXiv 1909.08593), equation 2. Scores are [B]; all else is [B, T].
    """
    penalty = torch.where(mask, kl_coefficient * (logprobs - reference_logprobs), 0.0)
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


def kl_k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """log π − log π_reference: the unbiased estimate of KL(π ‖ reference) on samples of π; k1 of Schulman 2020."""
    return logprobs - reference_logprobs


def kl_k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """exp(−d) − 1 + d with d = log π − log π_reference: unbiased, never negative, of low variance.

    k3 of Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html), on samples of π.
    """
    difference = logprobs - reference_logprobs
    return torch.expm1(-difference) + difference


def ppo_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip_range: float
) -> Tensor:
    """Clipped surrogate loss of each token, [B, T], zero outside the mask: −min(ratio · A, clip(ratio) · A).

    Schulman et al. 2017 (arXiv 1707.06347), equation 7.
    """
    ratio = _ratio(logprobs, old_logprobs, mask)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.where(mask, -torch.minimum(ratio * advantages, clipped * advantages), 0.0)


def ppo_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip_range: float) -> Tensor:
    """Clipped squared error of each value, [B, T], zero outside the mask: ½ max((V − R)², (clip(V) − R)²).

    V is clipped to `clip_range` around the value at the time of the rollout, as in openai/baselines (ppo2).
    """
    clipped = torch.clamp(values, old_values - clip_range, old_values + clip_range)
    return torch.where(mask, 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square()), 0.0)


def _ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """π / π_old of each token; 1 outside the mask."""
    return torch.where(mask, logprobs - old_logprobs, 0.0).exp()


class Ppo:
    """PPO's clipped losses of policy and value model, averaged over the sampled tokens of a minibatch.

    The model maps tokens [B, S] to (what `read` returns, values [B, S]).
    """

    def __init__(
        self,
        clip_range: float = 0.2,
        value_clip_range: float = 0.2,
        value_weight: float = 0.1,
        temperature: float = 1.0,
        value_warmup_steps: int = 0,
    ) -> None:
        self.clip_range, self.value_clip_range = clip_range, value_clip_range
        self.value_weight, self.temperature = value_weight, temperature
        self.value_warmup_steps = value_warmup_steps

    def weight(self, batch: Trajectory) -> Tensor:
        """Number of sampled tokens."""
        return batch.response_mask[:, 1:].sum().float()

    def __call__(self, model: nn.Module, batch: Trajectory) -> tuple[Tensor, Metrics]:
        """The summed loss.

        Metrics over the sampled tokens: loss, policy_loss, value_loss, ratio (1 at a rollout's first update),
        clip_fraction, approx_kl (k3, against the policy that sampled) and entropy in nats.
        """
        mask = batch.response_mask[:, 1:]
        logprobs, entropy, values = policy_and_values(model, batch.tokens, batch.response_mask, self.temperature)
        policy_loss = ppo_policy_loss(logprobs, batch.logprobs, batch.advantages, mask, clip_range=self.clip_range)
        value_loss = ppo_value_loss(values, batch.values, batch.returns, mask, clip_range=self.value_clip_range)
        # a value model that knows nothing yet makes advantages of noise: at first it learns alone
        policy_weight = 0.0 if batch.step < self.value_warmup_steps else 1.0
        losses = policy_weight * policy_loss + self.value_weight * value_loss
        ratio = _ratio(logprobs, batch.logprobs, mask)
        per_token = {
            "loss": losses,
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "ratio": ratio,
            "clip_fraction": (ratio - 1).abs() > self.clip_range,
            "approx_kl": kl_k3(batch.logprobs, logprobs),
            "entropy": entropy,
        }
        weight = self.weight(batch)
        return losses.sum(), {
            name: (torch.where(mask, value.detach().float(), 0.0).sum(), weight) for name, value in per_token.items()
        }


def policy_and_values(
    model: nn.Module, tokens: Tensor, response_mask: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the sampled tokens, entropies and values of an actor-critic, [B, T] float32 each.

    Log-probabilities and entropies are zero outside the answer. Rollouts and updates both read the model through this
    function, so the ratio of the first update is 1.
    """

    def read(hidden: Tensor, head_weight: Tensor) -> tuple[Tensor, Tensor]:
        return token_logprobs_and_entropy(
            hidden[:, :-1], head_weight, tokens[:, 1:], response_mask[:, 1:], temperature=temperature
        )

    (logprobs, entropy), values = model(tokens, read=read)
    return logprobs, entropy, values[:, :-1].float()


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
            error = (kl.to(self.coefficient) / self.target - 1).clamp(-0.2, 0.2)
            self.coefficient.mul_(1 + error * (answers / self.horizon))
