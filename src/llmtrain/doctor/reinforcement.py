"""The parts of PPO one by one, each against what is worked out by hand or with a plain float64 loop.

docs/rlhf_details.md says what each of them is taken from.
"""

import dataclasses

import torch
from torch import Tensor

from llmtrain.doctor.measurement import Measurement, largest_difference
from llmtrain.doctor.subject import CONFIG, VOCAB_SIZE, language_model, prompts, ragged_rows
from llmtrain.models.heads import ScalarModel, SharedActorCritic
from llmtrain.objectives.advantages import token_rewards
from llmtrain.objectives.kl import KL_ESTIMATORS, AdaptiveKL
from llmtrain.objectives.pairs import answer_scores
from llmtrain.objectives.policy_gradient import clipped_policy_loss
from llmtrain.objectives.ppo import ppo_value_loss
from llmtrain.rewards.answers import Answer
from llmtrain.rewards.models import LearnedReward

KL_COEFFICIENT, CLIP = 0.05, 0.2
# Few weights, so that a variance of 1 / H would be far from 1 / (H + 1); many draws, so that chance is not.
NARROW, DRAWS = 8, 2000
# Of Ziegler et al. 2019: the first coefficient, the target of the KL per answer, the horizon, the answers of a rollout.
COEFFICIENT, TARGET, HORIZON, ANSWERS = 0.15, 6.0, 10_000, 512


def score_heads(device: torch.device) -> list[Measurement]:
    """A score head is drawn from N(0, 1 / (H + 1)); value heads that have no reward model to start from say 0."""
    config = dataclasses.replace(CONFIG, num_layers=1, hidden_size=NARROW, num_heads=1, num_kv_heads=1)
    narrow, draw, drawn = ScalarModel(config, VOCAB_SIZE), torch.Generator().manual_seed(1), []
    for _ in range(DRAWS):
        narrow.initialise_score(draw)
        drawn.append(narrow.score.weight.detach().clone())
    weights = torch.cat(drawn).double()
    variance = float(weights.var(correction=0))
    policy, tokens = language_model(device), ragged_rows(4, 16, seed=9)[0].to(device)
    apart = ScalarModel.from_language_model(policy, draw).zero_score()
    with torch.no_grad():
        first = torch.stack([apart(tokens), SharedActorCritic(policy)(tokens)[1]]).abs().max()
    return [
        Measurement("score head: mean of its weights", 0.0, float(weights.mean()), 0.01),
        Measurement("score head: variance of its weights, times H + 1", 1.0, variance * (NARROW + 1), 0.05),
        Measurement("value head of zeros: largest first value", 0.0, float(first)),
    ]


def score_places(device: torch.device) -> list[Measurement]:
    """An answer's score is read at its last token, which padding and other answers do not change."""
    mask = ragged_rows(8, 24, seed=3)[1]
    positions = torch.arange(24.0).expand(mask.shape)
    last = torch.tensor([float(row.nonzero()[-1]) for row in mask])
    found = answer_scores(positions.to(device), mask.to(device)).cpu()
    model = ScalarModel.from_language_model(language_model(device), torch.Generator().manual_seed(1)).eval()
    model.score_mean.fill_(0.5)
    model.score_std.fill_(2.0)
    answers = [
        Answer(prompt_tokens=asked, tokens=said, prompt="", text="", expected=None, finished=True)
        for asked, said in zip(prompts(8, seed=5), prompts(9, seed=6)[1:], strict=True)
    ]
    together = torch.tensor(LearnedReward(model, pad_id=0, micro_batch_rows=3)(answers))
    alone = torch.tensor([last_score(model, [*each.prompt_tokens, *each.tokens]) for each in answers])
    off = largest_difference(together, alone)
    return [
        Measurement("score: answers read elsewhere than at their last token", 0.0, float((found != last).sum())),
        Measurement("score: difference from each answer alone, by hand", 0.0, off, 1e-5),
    ]


@torch.no_grad()
def last_score(model: ScalarModel, tokens: list[int]) -> float:
    """The score at the last token of one row without padding, less the mean, over the standard deviation."""
    score = model(torch.tensor([tokens], device=model.score.weight.device))[0, -1]
    return (float(score) - float(model.score_mean)) / float(model.score_std)


def rewards_of_tokens(device: torch.device) -> list[Measurement]:
    """Each token costs the KL, the last one has the score as well, and padding has nothing."""
    mask = ragged_rows(8, 24, seed=3)[1]
    draw = torch.Generator().manual_seed(5)
    scores, logprobs, reference = (torch.randn(shape, generator=draw) for shape in (8, (8, 24), (8, 24)))
    wanted = rewards_loop(scores, logprobs - reference, mask)
    given = (each.to(device) for each in (logprobs, reference))
    found = token_rewards(scores.to(device), KL_ESTIMATORS["k1"](*given), mask.to(device), KL_COEFFICIENT).cpu()
    off = largest_difference(found, wanted)
    return [
        Measurement("rewards: KL at every token, score at the last: off by", 0.0, off, 1e-6),
        Measurement("rewards: largest one of padding and prompts", 0.0, float(found[~mask].abs().max())),
        *expected_kl(device),
    ]


def rewards_loop(scores: Tensor, log_ratios: Tensor, mask: Tensor) -> Tensor:
    """Rewards [B, T] float64, token by token."""
    rewards = torch.zeros(mask.shape, dtype=torch.float64)
    for row in range(mask.shape[0]):
        places = mask[row].nonzero().flatten().tolist()
        for t in places:
            rewards[row, t] = -KL_COEFFICIENT * float(log_ratios[row, t])
        rewards[row, places[-1]] += float(scores[row])
    return rewards


def expected_kl(device: torch.device) -> list[Measurement]:
    """What the estimators of the KL give on average over the policy is the KL itself, here summed over a vocabulary."""
    draws = torch.randn(2, VOCAB_SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    policy, reference = draws.to(device).log_softmax(-1)
    exact = float((policy.exp() * (policy - reference)).sum())
    return [
        Measurement(
            f"rewards: {name} on average, ratio to the KL", 1.0,
            float((policy.exp() * estimate(policy, reference)).sum()) / exact, 1e-9,
        )
        for name, estimate in KL_ESTIMATORS.items()
    ]  # fmt: skip


def adaptive_kl(device: torch.device) -> list[Measurement]:
    """The coefficient follows the error of the KL, clipped to ±0.2, times answers over horizon; or it is fixed."""
    share = ANSWERS / HORIZON
    cases = {"10 % above its target": (1.1, 1 + 0.1 * share), "far above": (50.0, 1 + 0.2 * share)}
    cases |= {"far below": (0.0, 1 - 0.2 * share), "at its target": (1.0, 1.0)}
    measured = [Measurement("fixed KL: factor far above", 1.0, moved_by(AdaptiveKL(COEFFICIENT).to(device), 50.0))]
    for what, (kl, factor) in cases.items():
        adaptive = AdaptiveKL(COEFFICIENT, TARGET, HORIZON).to(device)
        measured.append(Measurement(f"adaptive KL: factor {what}", factor, moved_by(adaptive, kl), 1e-6))
    return measured


def moved_by(controller: AdaptiveKL, kl: float) -> float:
    """The factor by which a rollout of ANSWERS answers moves the coefficient, whose KL is `kl` times TARGET."""
    before = float(controller.coefficient)
    controller.update(torch.tensor(kl * TARGET), ANSWERS)
    return float(controller.coefficient) / before


def clipping(device: torch.device) -> list[Measurement]:
    """The clipped losses of policy and values, and their slopes, are those worked out by hand."""
    # value, return, loss ½ max((V − R)², (clip(V) − R)²), slope; each value was 0 at the time of the rollout
    values = ((0.1, 1.0, 0.405, -0.9), (1.0, 1.0, 0.32, 0.0), (1.0, 0.0, 0.5, 1.0), (-1.0, 1.0, 2.0, -2.0))
    # log-ratio (here of 1.5 and 0.5), advantage, loss −min(r A, clip(r) A), slope by the log-ratio
    up, down = torch.tensor([1.5, 0.5], dtype=torch.float64).log().tolist()
    policy = ((up, 1.0, -1.2, 0.0), (up, -1.0, 1.5, 1.5), (down, 1.0, -0.5, -0.5), (down, -1.0, 0.8, 0.0))
    measured = []
    for what, loss, cases in (("values", ppo_value_loss, values), ("ratio", clipped_policy_loss, policy)):
        moved, target, wanted, slopes = torch.tensor(cases, device=device).T[:, None]
        moved = moved.clone().requires_grad_()
        found = loss(moved, torch.zeros_like(moved), target, torch.ones_like(moved).bool(), clip_range=CLIP)
        (slope,) = torch.autograd.grad(found.sum(), moved)
        measured += [
            Measurement(f"clipped {what}: loss, off by", 0.0, largest_difference(found, wanted), 1e-6),
            Measurement(f"clipped {what}: slope, off by", 0.0, largest_difference(slope, slopes), 1e-6),
        ]
    return measured
