"""Proximal policy optimisation of a language model with a value model: its losses.

Shapes as in `trajectories.py`: B rows, S tokens of the longest row, T = S − 1.

How the details of PPO that decide whether it works are handled, after openai/lm-human-preferences and Huang et al.
2024 (arXiv 2403.17031). "Followed" and "switch" are as there; the rest says what is done instead, and why.

 1. Reward and value models read prompt and answer: followed.
 2. Padding apart from the end token, prompts padded left: instead rows are padded on the right and every use is masked,
    so positions need no correction and padding is never seen.
 3. Answers of fixed length, cut at the end token afterwards: instead a row stops being sampled at its end token; the
    answers are the same and no time is spent beyond the end.
 4. The temperature divides the logits wherever log-probabilities are taken: followed (`Ppo`, the rollouts).
 5. No top-k or top-p in rollouts: followed; there is no switch, because the ratio would be wrong.
 6. Reward head drawn from N(0, 1 / (H + 1)) without bias: followed. Value model copied from the reward model: followed
    (switch: value_model; copied from the policy or sharing its trunk, its head is zero at first, as in 2019).
 7. Reward normalised: followed after reward training, not before; the reward model carries mean and deviation.
 8. The score at the last token, a KL penalty at every token: followed (`token_rewards`; switch: kl_estimator).
 9. A fixed score for answers without end token: instead a penalty is taken from their score (switch:
    missing_eos_penalty), so that among unfinished answers the better one is still preferred.
10. gamma 1, lambda 0.95, clip 0.2, value clip 0.2, value weight 0.1: followed; each a switch.
11. Rewards whitened without shift of the mean, advantages with it: followed; each a switch. Statistics are over the
    rollout of all processes and not over a minibatch, so they do not depend on the layout.
12. Adaptive KL coefficient: switch (kl_target, kl_horizon); fixed by default (`AdaptiveKL`).
13. Dropout off in policy, reference, value and judging reward model: followed; with it the first ratio is not 1.
14. Adam's epsilon 1e-5: switch (optimizer.eps). TensorFlow's placement of it: left out, an own optimizer by `_target_`
    can have it.
15. Learning rate annealed to 0: switch (schedule).
16. A seed for each process: instead a seed for each row, so that rollouts do not depend on the number of processes.
17. Four passes, one minibatch, batches of 512: switch (epochs, minibatches, train.batch_rows).
18. Padding excluded from KL, advantages, losses and whitening; the value after the end is zero: followed (`gae`).
"""

import torch
from torch import Tensor, nn

from llmtrain.objectives.batch import Metrics
from llmtrain.objectives.kl import kl_k3
from llmtrain.objectives.policy_gradient import (
    clipped_policy_loss,
    importance,
    logprobs_reader,
    over_mask,
    ratio_metrics,
    ratio_of,
    tell_stop,
)
from llmtrain.objectives.shared_positions import group_leaders, shared_positions
from llmtrain.objectives.trajectories import Trajectory


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

        Metrics over the sampled tokens: loss, policy_loss, value_loss, those of `ratio_metrics` and `importance`,
        approx_kl (k3, against the policy that sampled) and entropy in nats.
        """
        mask = batch.response_mask[:, 1:]
        logprobs, entropy, values = policy_and_values(model, batch.tokens, batch.response_mask, self.temperature)
        policy_loss = clipped_policy_loss(logprobs, batch.logprobs, batch.advantages, mask, clip_range=self.clip_range)
        weights, metrics = importance(batch, batch.logprobs, mask)
        policy_loss = policy_loss * weights
        value_loss = ppo_value_loss(values, batch.values, batch.returns, mask, clip_range=self.value_clip_range)
        # a value model that knows nothing yet makes advantages of noise: at first it learns alone
        policy_weight = 0.0 if batch.step < self.value_warmup_steps else 1.0
        losses = policy_weight * policy_loss + self.value_weight * value_loss
        metrics |= over_mask(
            mask, loss=losses, policy_loss=policy_loss, value_loss=value_loss,
            approx_kl=kl_k3(batch.logprobs, logprobs), entropy=entropy,
        )  # fmt: skip
        tell_stop(batch, metrics)
        ratio = ratio_of(logprobs, batch.logprobs, mask)
        return losses.sum(), metrics | ratio_metrics(ratio, mask, clip_range=self.clip_range)


def ppo_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip_range: float) -> Tensor:
    """Clipped squared error of each value, [B, T], zero outside the mask: ½ max((V − R)², (clip(V) − R)²).

    V is clipped to `clip_range` around the value at the time of the rollout, as in openai/baselines (ppo2).
    """
    clipped = torch.clamp(values, old_values - clip_range, old_values + clip_range)
    return torch.where(mask, 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square()), 0.0)


def policy_and_values(
    model: nn.Module, tokens: Tensor, response_mask: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the sampled tokens, entropies and values of an actor-critic, [B, T] float32 each.

    All are zero outside the answer. Rollouts and updates both read the model through this function, so the ratio of
    the first update is 1.
    """
    same_as = shared_positions(tokens, response_mask, group_leaders(tokens, group_rows=1))  # no padding, that is
    reader = logprobs_reader(tokens, response_mask, temperature)
    (logprobs, entropy), values = model(tokens, read=reader, same_as=same_as)
    return logprobs, entropy, torch.where(response_mask[:, 1:], values[:, :-1].float(), 0.0)
