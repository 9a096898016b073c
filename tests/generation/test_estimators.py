"""What PPO makes of judged answers, with rewards and advantages whitened over those of all processes."""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from tests.generation.test_rollouts import ALONE, ROWS, language_model, length, no_autocast, sampled
from torch import Tensor

from llmtrain.config.schema import PpoConfig
from llmtrain.engine.distributed import Layout
from llmtrain.generation import estimators
from llmtrain.generation.estimators import PpoEstimator
from llmtrain.generation.rollouts import SampledAnswers
from llmtrain.models.heads import ActorCritic, LanguageModel, ScalarModel
from llmtrain.objectives.kl import AdaptiveKL
from llmtrain.objectives.trajectories import Trajectory, rows_of_process

KL, GAMMA, LAMBDA, TEMPERATURE, TARGET = 0.2, 0.9, 0.8, 0.7, 0.7


def value_model() -> ScalarModel:
    return ScalarModel.from_language_model(language_model(2), torch.Generator().manual_seed(3))


def estimated(
    answers: SampledAnswers, rewards: bool, advantages: bool, layout: Layout = ALONE
) -> tuple[Trajectory, AdaptiveKL]:
    """What the estimator makes of a process's answers, and the coefficient as it is afterwards."""
    kl = AdaptiveKL(KL, TARGET, horizon=100)
    settings = PpoConfig(
        whiten_rewards=rewards, whiten_advantages=advantages, gamma=GAMMA, gae_lambda=LAMBDA, temperature=TEMPERATURE,
        minibatches=2,
    )  # fmt: skip
    estimator = PpoEstimator(
        model=ActorCritic(language_model(0), value_model()), reference=language_model(1), settings=settings, kl=kl,
        kl_stop=None, micro_batch_rows=3, layout=layout, autocast=no_autocast,
    )  # fmt: skip
    with torch.no_grad():
        return estimator(answers), kl


def scaled(rows: list[dict[int, float]], shift_mean: bool) -> list[dict[int, float]]:
    """All values divided by their standard deviation, around their mean, which is kept or taken off."""
    every = [value for row in rows for value in row.values()]
    mean, deviation = np.mean(every), np.std(every)
    return [{t: (value - mean) / deviation + (0.0 if shift_mean else mean) for t, value in row.items()} for row in rows]


@torch.no_grad()
def looped(answers: SampledAnswers, whiten_rewards: bool, whiten_advantages: bool) -> list[list[dict[int, float]]]:
    """Advantages and returns of each row by position, token by token in double precision."""

    def table(model: LanguageModel) -> Any:
        return (model(answers.tokens).double() / TEMPERATURE).log_softmax(-1).numpy()

    policy, reference = table(language_model(0)), table(language_model(1))
    values = value_model()(answers.tokens).double().numpy()
    places = [mask[1:].nonzero()[:, 0].tolist() for mask in answers.response_mask]
    rewards: list[dict[int, float]] = []
    for row, positions in enumerate(places):
        chosen = answers.tokens[row, 1:].tolist()
        kl = {t: policy[row, t, chosen[t]] - reference[row, t, chosen[t]] for t in positions}
        rewards.append({t: -KL * kl[t] + float(answers.rewards[row]) * (t == positions[-1]) for t in positions})
    if whiten_rewards:
        rewards = scaled(rewards, shift_mean=False)
    advantages: list[dict[int, float]] = [{} for _ in places]
    for row, positions in enumerate(places):
        running = 0.0
        for t in reversed(positions):
            after = values[row, t + 1] if t != positions[-1] else 0.0
            running = rewards[row][t] + GAMMA * after - values[row, t] + GAMMA * LAMBDA * running
            advantages[row][t] = running
    returns = [{t: value + values[row, t] for t, value in each.items()} for row, each in enumerate(advantages)]
    return [scaled(advantages, shift_mean=True) if whiten_advantages else advantages, returns]


def assert_as_looped(found: Tensor, wanted: list[dict[int, float]]) -> None:
    """Each value at its place, and zeros everywhere else."""
    expected = torch.zeros(found.shape, dtype=torch.float64)
    for row, values in enumerate(wanted):
        for t, value in values.items():
            expected[row, t] = value
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("rewards", "advantages"), [(True, True), (True, False), (False, True)])
def test_whitened_estimates_against_a_loop(rewards: bool, advantages: bool) -> None:
    answers = sampled({"length": length}, group_rows=1)
    batch, _ = estimated(answers, rewards, advantages)
    wanted = looped(answers, rewards, advantages)
    assert_as_looped(batch.advantages, wanted[0])
    assert_as_looped(batch.returns, wanted[1])


def shared_by_two(answers: SampledAnswers) -> list[tuple[list[int], Trajectory, AdaptiveKL]]:
    """The rows of two processes, of which two threads are the stand-in, and what each makes of its own."""

    def process(rank: int) -> tuple[list[int], Trajectory, AdaptiveKL]:
        rows = rows_of_process(rank, 2, ROWS, minibatches=2)
        own = dataclasses.replace(answers[rows], first_slot=rank * ROWS // 4)
        return rows.tolist(), *estimated(own, True, True, Layout(rank=rank, world=2, device=torch.device("cpu")))

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(process, (0, 1)))


@pytest.fixture
def _two_threads_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    shares: dict[int, Tensor] = {}
    together = threading.Barrier(2, timeout=30)

    def total(own: Tensor, layout: Layout) -> Tensor:
        shares[layout.rank] = own
        together.wait()
        summed = shares[0] + shares[1]
        together.wait()
        return summed

    monkeypatch.setattr(estimators, "total", total)


@pytest.mark.usefixtures("_two_threads_add_up")
def test_processes_whiten_over_the_answers_of_all() -> None:
    answers = sampled({"length": length}, group_rows=1)
    advantages, returns = looped(answers, True, True)
    for rows, batch, _ in shared_by_two(answers):
        assert_as_looped(batch.advantages, [advantages[row] for row in rows])
        assert_as_looped(batch.returns, [returns[row] for row in rows])


@pytest.mark.usefixtures("_two_threads_add_up")
def test_the_coefficient_adapts_to_the_answers_of_all_processes() -> None:
    both = shared_by_two(sampled({"length": length}, group_rows=1))
    error = float(torch.cat([batch.kl for _, batch, _ in both]).mean()) / TARGET - 1
    assert abs(error) < 0.2, "the test wants an error that is not clipped"
    for _, batch, kl in both:
        assert abs(float(batch.kl.mean()) / TARGET - 1 - error) > 0.01, "and processes that differ"
        assert float(kl.coefficient) == pytest.approx(KL * (1 + error * ROWS / 100), rel=1e-6)
