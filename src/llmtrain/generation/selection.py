"""From judged answers to pairs and to the best: what methods learn from that need no log-probabilities of the sampler.

Shapes: B rows of this process in P groups of G, S tokens of the longest row.
"""

import dataclasses

import torch
from torch import Tensor

from llmtrain.generation.rollouts import SampledAnswers, means
from llmtrain.objectives.batch import Metrics
from llmtrain.objectives.next_token import TokenBatch
from llmtrain.objectives.pairs import PairBatch


@dataclasses.dataclass(frozen=True)
class SampledPairs(PairBatch):
    """Pairs of sampled answers."""

    measured: Metrics = dataclasses.field(default_factory=dict)

    def metrics(self) -> Metrics:
        """The rollout's rewards and lengths, and how far apart the rewards of a pair are."""
        return self.measured


@dataclasses.dataclass(frozen=True)
class KeptAnswers(TokenBatch):
    """The best of each group."""

    measured: Metrics = dataclasses.field(default_factory=dict)

    def metrics(self) -> Metrics:
        """The rollout's rewards and lengths, the scores of the best, and how many of these are learned."""
        return self.measured


def best_and_worst(answers: SampledAnswers) -> SampledPairs:
    """The answers with the highest and the lowest reward to each prompt as a pair: online DPO.

    Guo et al. 2024 (arXiv 2402.04792), section 3, with a reward in the place of their judge. Where all rewards of a
    prompt are the same there is nothing to prefer: the pair stays, so that every process has as many, but both masks
    are empty, and so is its gradient.
    """
    highest, lowest = best_rows(answers.rewards, answers.group_rows), best_rows(-answers.rewards, answers.group_rows)
    gap = answers.rewards[highest] - answers.rewards[lowest]
    differ = (gap > 0)[:, None]
    return SampledPairs(
        chosen=answers.tokens[highest], rejected=answers.tokens[lowest],
        chosen_mask=answers.response_mask[highest] & differ, rejected_mask=answers.response_mask[lowest] & differ,
        source=torch.zeros_like(highest), measured=answers.measured | {"align/reward_gap": means(gap)},
    )  # fmt: skip


def best_answers(answers: SampledAnswers, minimum_reward: float | None = None) -> KeptAnswers:
    """The answer with the highest reward to each prompt, for next-token training: rejection sampling.

    Dong et al. 2023 (RAFT, arXiv 2304.06767), section 3; Touvron et al. 2023 (arXiv 2307.09288), section 3.2.3. An
    answer below `minimum_reward` stays in the batch, so that every process has as many, but nothing of it is learned.
    """
    best = best_rows(answers.rewards, answers.group_rows)
    rewards = answers.rewards[best]
    kept = torch.ones_like(rewards, dtype=torch.bool) if minimum_reward is None else rewards >= minimum_reward
    scores = means(answers.scores[best])  # of the kind of `align/reward`, so that the two can be compared
    return KeptAnswers(
        tokens=answers.tokens[best], loss_mask=answers.response_mask[best] & kept[:, None],
        source=torch.zeros_like(best),
        measured=answers.measured | {"align/best_reward": scores, "align/kept": means(kept)},
    )  # fmt: skip


def best_rows(rewards: Tensor, group_rows: int) -> Tensor:
    """The row with the highest reward of each group, the first of equal ones: [P] int64 from rewards [B]."""
    groups = rewards.view(-1, group_rows)
    return groups.argmax(dim=1) + torch.arange(0, len(rewards), group_rows, device=rewards.device)
