"""Answers of a step with their rewards, and what each method makes of them."""

import dataclasses
import unittest.mock
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from llmtrain.config.errors import UserError
from llmtrain.config.schema import ModelConfig, PpoConfig, SampledAnswersConfig
from llmtrain.config.seeds import derive_seed
from llmtrain.data.encoding import PromptRow
from llmtrain.engine.distributed import Layout
from llmtrain.generation.engines import OwnEngine
from llmtrain.generation.estimators import AnswerEstimator, PpoEstimator, answer_token_logprobs
from llmtrain.generation.rollouts import SHOWN_CHARACTERS, Rollouts, SampledAnswers, shortened, shown_rows
from llmtrain.generation.sampler import generate
from llmtrain.generation.selection import best_and_worst, best_answers
from llmtrain.models.heads import ActorCritic, LanguageModel, ScalarModel
from llmtrain.objectives.advantages import leave_one_out_advantages
from llmtrain.objectives.kl import AdaptiveKL
from llmtrain.objectives.pairs import PairBatch
from llmtrain.objectives.preference import OnTheFly, Preference, dpo_loss
from llmtrain.rewards.answers import Answer
from llmtrain.rewards.sums import WeightedSum

VOCAB, ROWS, GROUP, STEP = 19, 8, 2, 3
STOP = frozenset((1, 2))
ALONE = Layout(rank=0, world=1, device=torch.device("cpu"))
CONFIG = ModelConfig(num_layers=1, hidden_size=16, num_heads=2, max_sequence_length=64)


def no_autocast() -> torch.autocast:
    return torch.autocast("cpu", enabled=False)


def language_model(seed: int) -> LanguageModel:
    model = LanguageModel(CONFIG, VOCAB).initialise(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    return model.eval()


class Prompts:
    """Prompt `p` of a step is [p + 5, 6], and its text its number; a replacement asks others, with numbers from 100."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def __call__(self, step: int, replacement: int = 0) -> list[PromptRow]:
        self.asked.append((step, replacement))
        first = 100 * replacement
        return [PromptRow([5 + number + replacement, 6], str(first + number), "right") for number in range(ROWS)]

    def counts(self, step: int) -> dict[str, float]:
        return {"data/a/rows": step}


def number_of(answer: Answer) -> int:
    return int(answer.prompt)


def odd_ones_fail(answers: Sequence[Answer]) -> list[float]:
    """Of an even prompt's answers the first is better; those of an odd one are all alike."""
    seen: dict[str, int] = {}
    rewards = []
    for answer in answers:
        place = seen[answer.prompt] = seen.get(answer.prompt, -1) + 1
        rewards.append(float(place == 0 and number_of(answer) % 2 == 0))
    return rewards


def length(answers: Sequence[Answer]) -> list[float]:
    return [float(len(answer.tokens)) for answer in answers]


def sampled(rewards: dict[str, Any], weights: dict[str, float] | None = None, **options: Any) -> SampledAnswers:
    """The answers of a step, before any method has them."""
    kept: list[SampledAnswers] = []
    source(rewards, weights, learn_from=lambda a: kept.append(a) or a, **options)(STEP)
    return kept[0]


def source(rewards: dict[str, Any], weights: dict[str, float] | None = None, **options: Any) -> Rollouts:
    settings = options.pop("settings", SampledAnswersConfig(max_new_tokens=6))
    return Rollouts(
        engine=OwnEngine(options.pop("policy", language_model(0))), prompts=options.pop("prompts", Prompts()),
        reward=WeightedSum(rewards, weights or dict.fromkeys(rewards, 1.0)),
        decode=lambda ids: " ".join(map(str, ids)), stop_tokens=STOP, pad_id=0, settings=settings, batch_rows=ROWS,
        group_rows=options.pop("group_rows", GROUP), seed=7, layout=options.pop("layout", ALONE),
        autocast=no_autocast, **options,
    )  # fmt: skip


def mean(metrics: dict[str, Any], name: str) -> float:
    return float(metrics[name][0] / metrics[name][1])


def test_answers_are_those_of_the_sampler_for_the_rows_own_seeds() -> None:
    answers = sampled({"length": length})
    prompts = [[5 + row // GROUP, 6] for row in range(ROWS)]
    wanted = generate(
        language_model(0), prompts, max_new_tokens=6, stop_tokens=set(STOP),
        seeds=[derive_seed(7, "rollout", STEP, row) for row in range(ROWS)],
    )  # fmt: skip
    found = [tokens[mask].tolist() for tokens, mask in zip(answers.tokens, answers.response_mask, strict=True)]
    assert found == wanted
    assert answers.finished.tolist() == [each[-1] in STOP for each in wanted]
    assert 0 < answers.finished.sum() < ROWS
    assert mean(answers.measured, "align/answer_tokens") == sum(map(len, wanted)) / ROWS
    assert mean(answers.measured, "align/unfinished") == 1 - answers.finished.float().mean()


def test_scores_are_weighted_clipped_and_penalised() -> None:
    settings = SampledAnswersConfig(max_new_tokens=6, reward_clip=2.5, missing_eos_penalty=0.25)
    answers = sampled(
        {"length": length, "one": lambda a: [1.0] * len(a)}, {"length": 1.0, "one": -0.5}, settings=settings
    )
    lengths = answers.response_mask.sum(dim=1)
    wanted = (lengths - 0.5).clamp(-2.5, 2.5) - 0.25 * (~answers.finished)
    torch.testing.assert_close(answers.rewards, wanted)
    torch.testing.assert_close(answers.scores, lengths - 0.5)
    assert mean(answers.measured, "align/reward") == pytest.approx(float(lengths.float().mean()) - 0.5)
    assert mean(answers.measured, "align/reward/length") == pytest.approx(float(lengths.float().mean()))
    assert mean(answers.measured, "align/reward/one") == 1.0


def test_the_mean_of_large_rewards_is_a_number() -> None:
    settings = SampledAnswersConfig(max_new_tokens=6, reward_clip=2.5, missing_eos_penalty=0.0)
    answers = sampled({"large": lambda a: [1e38] * len(a)}, settings=settings)
    assert answers.rewards.tolist() == [2.5] * ROWS
    assert mean(answers.measured, "align/reward") == pytest.approx(1e38)


@pytest.mark.parametrize("reward", [1e25, -2e15])
def test_rewards_too_large_to_square_are_refused(reward: float) -> None:
    with pytest.raises(UserError, match=r"rewards is -?\de\+\d+, .*rewards.<name>.weight, .*or set method.reward_clip"):
        sampled({"large": lambda a: [reward] * len(a)})
    assert sampled({"large": lambda a: [1e15] * len(a)}).rewards.isfinite().all()


def test_prompts_with_nothing_to_tell_are_replaced() -> None:
    calm = SampledAnswersConfig(max_new_tokens=6, missing_eos_penalty=0.0)
    prompts = Prompts()
    plain = sampled({"rule": odd_ones_fail}, settings=calm, prompts=prompts)
    assert mean(plain.measured, "align/flat_groups") == 0.5
    replaced = sampled({"rule": odd_ones_fail}, settings=calm, prompts=prompts, replacements=2)
    # groups 0 and 2 stay; 1 and 3 are odd again, as 101 and 103 and as 201 and 203
    assert prompts.asked == [(STEP, 0), (STEP, 0), (STEP, 1), (STEP, 2)]
    width = plain.tokens.shape[1]
    for group in (0, 2):
        assert torch.equal(replaced.tokens[2 * group : 2 * group + 2, :width], plain.tokens[2 * group : 2 * group + 2])
    assert replaced.tokens[::GROUP, 0].tolist() == [5, 5 + 1 + 2, 7, 5 + 3 + 2]
    assert mean(replaced.measured, "align/replacements") == 1.0
    for name in ("align/reward", "align/reward/rule", "align/answer_tokens", "align/unfinished"):
        assert mean(replaced.measured, name) == mean(plain.measured, name), "of the policy, not of what is left"
    assert mean(replaced.measured, "align/flat_groups") == 0.5


def test_replacing_ends_when_every_group_tells() -> None:
    def first_time(answers: Sequence[Answer]) -> list[float]:
        better = [number_of(answer) >= 100 or number_of(answer) == 0 for answer in answers]
        return [float(each and row % GROUP == 0) for row, each in enumerate(better)]

    prompts, calm = Prompts(), SampledAnswersConfig(max_new_tokens=6, missing_eos_penalty=0.0)
    answers = sampled({"rule": first_time}, settings=calm, prompts=prompts, replacements=5)
    assert prompts.asked == [(STEP, 0), (STEP, 1)]
    assert mean(answers.measured, "align/flat_groups") == 0.0
    assert mean(answers.measured, "align/replacements") == 0.75


# --- what people are shown ---


def test_shown_answers_say_what_the_batch_and_its_metrics_say() -> None:
    rewards = {"length": length, "one": lambda a: [1.0] * len(a)}
    answers = sampled(rewards, {"length": 0.5, "one": 2.0})
    batch = source(rewards, {"length": 0.5, "one": 2.0}, learn_from=estimator(kl_in_reward=0.1), shown_rows=ROWS)(STEP)
    kept = [tokens[mask].tolist() for tokens, mask in zip(answers.tokens, answers.response_mask, strict=True)]
    assert [each["row"] for each in batch.samples] == list(range(ROWS))
    for each, tokens in zip(batch.samples, kept, strict=True):
        assert each["prompt"] == str(each["row"] // GROUP)
        assert each["answer"] == " ".join(map(str, tokens))
        assert each["expected"] == "right"
        assert (each["tokens"], each["finished"]) == (len(tokens), tokens[-1] in STOP)
        assert (each["reward/length"], each["reward/one"]) == (len(tokens), 1.0)
        assert each["reward"] == 0.5 * len(tokens) + 2.0
    for name, key in (("align/reward", "reward"), ("align/kl", "kl"), ("align/answer_tokens", "tokens")):
        wanted = mean(batch.metrics(), name)
        assert sum(each[key] for each in batch.samples) / ROWS == pytest.approx(wanted, rel=1e-5), name


def test_methods_without_a_reference_show_no_kl() -> None:
    for learn_from in (best_and_worst, best_answers, dataclasses.replace(estimator(), reference=None)):
        batch = source({"length": length}, learn_from=learn_from, shown_rows=2)(STEP)
        assert [each["kl"] for each in batch.samples] == [None, None]


@torch.no_grad()
def test_ppo_shows_the_kl_of_each_answer() -> None:
    value = ScalarModel.from_language_model(language_model(2), torch.Generator().manual_seed(3))
    ppo = PpoEstimator(
        model=ActorCritic(language_model(0), value), reference=language_model(1), settings=PpoConfig(),
        kl=AdaptiveKL(0.2), kl_stop=None, micro_batch_rows=None, layout=ALONE, autocast=no_autocast,
    )  # fmt: skip
    batch = source({"length": length}, learn_from=ppo, group_rows=1, minibatches=2, shown_rows=3)(STEP)
    both = [answer_token_logprobs(language_model(n), batch.tokens, batch.response_mask, 1.0).double() for n in (0, 1)]
    wanted = (both[0] - both[1]).sum(dim=1)
    assert [each["row"] for each in batch.samples] == [0, 2, 4]
    for each in batch.samples:
        assert each["kl"] == pytest.approx(float(wanted[each["row"]]), rel=1e-4, abs=1e-5)


def test_the_same_answers_are_shown_whatever_shares_the_rows() -> None:
    alone = source({"length": length}, learn_from=best_answers, shown_rows=3, minibatches=2)(STEP).samples
    layouts = [Layout(rank=rank, world=2, device=torch.device("cpu")) for rank in (0, 1)]
    parts = [
        source({"length": length}, learn_from=best_answers, shown_rows=3, minibatches=2, layout=each)(STEP).samples
        for each in layouts
    ]
    assert sorted([*parts[0], *parts[1]], key=lambda each: each["row"]) == alone
    assert [each["row"] for each in alone] == [0, 2, 4]
    assert parts[1], "the other process has some of them"


def test_no_answer_is_shown_unless_asked_for() -> None:
    assert source({"length": length}, learn_from=best_answers)(STEP).samples is None


def test_shown_rows_are_spread_over_the_step_and_are_never_more_than_there_are() -> None:
    assert list(shown_rows(64, 4)) == [0, 16, 32, 48]
    assert list(shown_rows(64, 5)) == [0, 12, 24, 36, 48]
    assert list(shown_rows(3, 8)) == [0, 1, 2]
    assert list(shown_rows(8, 0)) == []


def test_long_texts_keep_their_beginning_and_their_end() -> None:
    text = "a" * SHOWN_CHARACTERS + "b" * SHOWN_CHARACTERS
    half = SHOWN_CHARACTERS // 2
    assert shortened(text) == f"{'a' * half} [... {SHOWN_CHARACTERS} characters ...] {'b' * half}"
    assert shortened(text[:SHOWN_CHARACTERS]) == text[:SHOWN_CHARACTERS]


# --- estimators ---


def estimator(**options: Any) -> AnswerEstimator:
    return AnswerEstimator(
        model=language_model(0), reference=language_model(1), temperature=1.0, micro_batch_rows=None,
        autocast=no_autocast, advantages=partial(leave_one_out_advantages, group_rows=GROUP), **options,
    )  # fmt: skip


@torch.no_grad()
def test_the_kl_of_an_answer_is_taken_from_its_reward() -> None:
    answers = sampled({"length": length})
    batch = estimator(kl_in_reward=0.3)(answers)
    mask = answers.response_mask[:, 1:]
    both = [answer_token_logprobs(language_model(n), answers.tokens, answers.response_mask, 1.0) for n in (0, 1)]
    kl = (both[0] - both[1]).double().mul(mask).sum(dim=1)
    rewards = answers.rewards.double() - 0.3 * kl
    wanted = [float(rewards[row] - rewards[row ^ 1]) for row in range(ROWS)]
    torch.testing.assert_close(batch.advantages.double(), torch.tensor(wanted).double(), rtol=1e-5, atol=1e-5)
    assert mean(batch.metrics(), "align/kl") == pytest.approx(float(kl.mean()), rel=1e-5)
    assert batch.reference_logprobs is None
    torch.testing.assert_close(estimator(kl_in_loss=True)(answers).reference_logprobs, both[1])


@torch.no_grad()
def test_without_a_reference_there_is_no_kl() -> None:
    batch = dataclasses.replace(estimator(kl_in_loss=True), reference=None)(sampled({"length": length}))
    assert batch.reference_logprobs is None
    assert "align/kl" not in batch.metrics()


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"kl_in_loss": True}, False), ({"kl_in_loss": True, "epochs": 2}, True), ({"minibatches": 2}, True),
        ({"kl_in_reward": 0.1}, True), ({"mask_unfinished": True}, False),
        ({"kl_in_reward": 0.1, "reference": None}, False),
    ],
)  # fmt: skip
def test_the_policy_is_read_before_the_update_only_where_that_counts(options: dict[str, Any], wanted: bool) -> None:
    made = dataclasses.replace(estimator(), **options)
    model = made.model = unittest.mock.Mock(wraps=made.model)
    batch = made(sampled({"length": length}))
    assert model.called == (batch.logprobs is not None) == wanted
    assert ("align/kl" in batch.metrics()) == (wanted and made.reference is not None)


@torch.no_grad()
def test_cut_off_answers_can_be_left_out_of_the_loss() -> None:
    answers = sampled({"length": length})
    batch = estimator(mask_unfinished=True)(answers)
    assert torch.equal(batch.response_mask, answers.response_mask)
    assert torch.equal(batch.learned_mask(), answers.response_mask[:, 1:] & answers.finished[:, None])
    assert torch.equal(batch.advantages, estimator()(answers).advantages)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_ppos_estimates_against_a_loop(kind: str) -> None:
    """Rewards with the KL, advantages and explained variance again, token by token in double precision."""
    answers = sampled({"length": length}, group_rows=1)
    policy, reference = language_model(0), language_model(1)
    value = ScalarModel.from_language_model(language_model(2), torch.Generator().manual_seed(3))
    settings = PpoConfig(
        kl_estimator=kind, kl_coefficient=0.2, whiten_rewards=False, whiten_advantages=False, gamma=0.9, gae_lambda=0.8,
        minibatches=2,
    )  # fmt: skip
    batch = PpoEstimator(
        model=ActorCritic(policy, value), reference=reference, settings=settings, kl=AdaptiveKL(0.2), kl_stop=None,
        micro_batch_rows=3, layout=ALONE, autocast=no_autocast,
    )(answers)  # fmt: skip
    tokens, mask = answers.tokens, answers.response_mask
    logs = [answer_token_logprobs(model, tokens, mask, 1.0).double().numpy() for model in (policy, reference)]
    values = value(tokens)[:, :-1].double().numpy()
    returns, residues = [], []
    for row in range(ROWS):
        places, running = mask[row, 1:].nonzero()[:, 0].tolist(), 0.0
        for t in reversed(places):
            difference = logs[0][row, t] - logs[1][row, t]
            kl = difference if kind == "k1" else np.exp(-difference) - 1 + difference
            reward = (float(answers.rewards[row]) if t == places[-1] else 0.0) - 0.2 * kl
            after = values[row, t + 1] if t != places[-1] else 0.0
            running = reward + 0.9 * after - values[row, t] + 0.9 * 0.8 * running
            assert float(batch.advantages[row, t]) == pytest.approx(running, rel=1e-4, abs=1e-5)
            returns.append(running + values[row, t])
            residues.append(running)
    wanted = 1 - np.var(residues) / np.var(returns)
    assert mean(batch.metrics(), "align/explained_variance") == pytest.approx(wanted, rel=1e-4)


# --- selection ---


def made_up(rewards: list[float]) -> SampledAnswers:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, VOCAB, (len(rewards), 10), generator=generator)
    ends = torch.randint(4, 11, (len(rewards), 1), generator=generator)
    mask = (torch.arange(10) >= 3) & (torch.arange(10) < ends)
    return SampledAnswers(
        tokens=tokens, response_mask=mask, scores=torch.tensor(rewards) + 10, rewards=torch.tensor(rewards),
        finished=mask.any(dim=1), group_rows=3, first_slot=0, seed=0, step=0, measured={},
    )  # fmt: skip


REWARDS = [0.0, 2.0, 1.0, 5.0, 5.0, 5.0, -1.0, -3.0, -3.0]


def test_best_and_worst_are_a_pair_and_ties_teach_nothing() -> None:
    answers, policy = made_up(REWARDS), language_model(0)
    pairs = best_and_worst(answers)
    assert torch.equal(pairs.chosen, answers.tokens[[1, 3, 6]])
    assert torch.equal(pairs.rejected, answers.tokens[[0, 3, 7]])
    assert not pairs.chosen_mask[1].any()
    assert not pairs.rejected_mask[1].any()
    assert mean(pairs.metrics(), "align/reward_gap") == pytest.approx((2 + 0 + 2) / 3)
    objective = Preference(partial(dpo_loss, beta=0.3), OnTheFly(language_model(1)), beta=0.3)
    objective(policy, pairs)[0].backward()
    found = {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}
    policy.zero_grad()
    rows = ([1, 6], [0, 7])
    alone = PairBatch(
        *(answers.tokens[row] for row in rows), *(answers.response_mask[row] for row in rows), torch.zeros(2, dtype=int)
    )
    objective(policy, alone)[0].backward()
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("minimum", "kept"), [(None, [True, True, True]), (2.0, [True, True, False])])
def test_the_best_are_learned_if_they_are_good_enough(minimum: float | None, kept: list[bool]) -> None:
    answers = made_up(REWARDS)
    batch = best_answers(answers, minimum)
    assert torch.equal(batch.tokens, answers.tokens[[1, 3, 6]])
    assert batch.loss_mask.any(dim=1).tolist() == kept
    assert torch.equal(batch.loss_mask[0], answers.response_mask[1])
    assert mean(batch.metrics(), "align/best_reward") == pytest.approx(2.0 + 10)
    assert mean(batch.metrics(), "align/kept") == pytest.approx(sum(kept) / 3)
