"""What `llmtrain align` makes of each key of its methods: all of them off their defaults, up to the first step."""

import dataclasses
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.config.compose import load_config
from llmtrain.config.schema import PreferenceMethod, SamplingMethod
from llmtrain.generation.rollouts import SampledAnswers
from llmtrain.generation.selection import best_and_worst
from llmtrain.models.formats import load_language_model, load_scalar_model
from llmtrain.models.heads import ActorCritic, SharedActorCritic
from llmtrain.objectives.kl import KLStop
from llmtrain.objectives.kto import Kto
from llmtrain.objectives.next_token import NextToken
from llmtrain.objectives.policy_gradient import Grpo, Reinforce
from llmtrain.objectives.ppo import Ppo
from llmtrain.objectives.preference import OnTheFly, precomputed
from llmtrain.stages import align
from llmtrain.stages.assembly import Run

METHODS = {method.name: method for method in (*get_args(PreferenceMethod), *get_args(SamplingMethod))}
ROWS = 16
SAMPLED = {"max_new_tokens": 5, "temperature": 0.7, "missing_eos_penalty": 0.5, "reward_clip": 3.0}
GROUPS = {**SAMPLED, "samples_per_prompt": 2}
UPDATES = {"epochs": 3, "minibatches": 4, "clip_range": 0.3, "kl_limit": 0.02}
WITH_REFERENCE = {"beta": 0.3, "reference": "precomputed", "sft_weight": 0.5}
KEYS: dict[str, dict[str, Any]] = {
    "ppo": {
        **SAMPLED, **UPDATES, "gamma": 0.9, "gae_lambda": 0.8, "value_model": "policy", "value_clip_range": 0.4,
        "value_weight": 0.6, "value_warmup_steps": 7, "kl_coefficient": 0.06, "kl_estimator": "k3", "kl_target": 1.5,
        "kl_horizon": 100, "whiten_rewards": False, "whiten_advantages": False,
    },
    "grpo": {
        **GROUPS, **UPDATES, "clip_range_high": 0.4, "scale_rewards": "batch", "loss_average": "constant",
        "kl_coefficient": 0.06, "unbiased_kl": False, "dynamic_sampling": 3, "mask_unfinished": True,
    },
    "rloo": {**GROUPS, **UPDATES, "kl_coefficient": 0.06, "whiten_advantages": True},
    "reinforce": {**SAMPLED, "baseline": "none", "kl_coefficient": 0.06, "whiten_advantages": True},
    "online_dpo": {**SAMPLED, "samples_per_prompt": 4, "beta": 0.3, "label_smoothing": 0.2},
    "rejection_sampling": {**GROUPS, "minimum_reward": -0.5},
    "dpo": {**WITH_REFERENCE, "length_normalised": True, "label_smoothing": 0.2},
    "ipo": {**WITH_REFERENCE, "length_normalised": False},
    "hinge": {**WITH_REFERENCE, "length_normalised": True},
    "robust": {**WITH_REFERENCE, "length_normalised": True, "label_smoothing": 0.2},
    "orpo": {"odds_ratio_weight": 0.4},
    "simpo": {"beta": 0.3, "gamma": 0.7, "sft_weight": 0.5},
    "cpo": {"beta": 0.3, "sft_weight": 0.5},
    "kto": {"beta": 0.3, "reference": "precomputed", "desirable_weight": 1.5, "undesirable_weight": 0.5},
}  # fmt: skip


class Begun(Exception):
    """Training would begin now, with these arguments of `Run.fit`."""


Begin = Callable[..., SimpleNamespace]


@pytest.fixture
def begin(parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Begin:
    """What a run of a method, its keys as in `KEYS` unless told otherwise, gives to the loop."""

    def fit(self: Run[Any], **given: Any) -> None:
        raise Begun(given)

    def begin(method: str, *overrides: str, **keys: Any) -> SimpleNamespace:
        line = [
            f"method={method}", f"train.batch_rows={ROWS}", "train.micro_batch_rows=3", "eval.problems=null",
            "data.sources.arithmetic.max_rows=24", f"model.init_from={parent}", f"runs_dir={tmp_path}",
        ]  # fmt: skip
        line += ["rewards=length"] if METHODS[method] in get_args(SamplingMethod) else []
        line += [f"method.{key}={'null' if value is None else value}" for key, value in (KEYS[method] | keys).items()]
        with pytest.raises(Begun) as begun:
            align.run(load_config("align", [*line, *overrides]))
        return SimpleNamespace(**begun.value.args[0])

    monkeypatch.setattr(Run, "fit", fit)
    return begin


def made_up() -> SampledAnswers:
    """Answers to prompts of three tokens, every third of them cut off."""
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(10) >= 3) & (torch.arange(10) < torch.randint(4, 11, (ROWS, 1), generator=generator))
    tokens, rewards = torch.randint(1, 256, (ROWS, 10), generator=generator), torch.randn(ROWS, generator=generator)
    return SampledAnswers(
        tokens=tokens, response_mask=mask, scores=rewards, rewards=rewards, finished=torch.arange(ROWS) % 3 > 0,
        group_rows=2, first_slot=0, seed=0, step=0, measured={},
    )  # fmt: skip


@torch.no_grad()
def moved_away(trained: nn.Module) -> None:
    """Another policy than the reference."""
    for parameter in trained.parameters():
        parameter.mul_(1.1)


@torch.no_grad()
def logprobs(model: nn.Module, answers: SampledAnswers, temperature: float = 0.7) -> Tensor:
    """[B, T], from all logits."""
    table = (model(answers.tokens)[:, :-1] / temperature).log_softmax(-1)
    chosen = table.gather(2, answers.tokens[:, 1:, None])[..., 0]
    return torch.where(answers.response_mask[:, 1:], chosen, 0.0)


def whitened(values: Tensor) -> Tensor:
    return (values - values.mean()) / values.std(correction=0)


def stops_above(stop: KLStop | None, limit: float) -> bool:
    """Whether just above the limit, and not just below it, a rollout's updates end."""
    found = []
    for kl in (0.99 * limit, 1.01 * limit):
        stop.begin()
        stop.add(torch.tensor(10 * kl), torch.tensor(10.0))
        found.append(stop.is_reached())
    return found == [False, True]


@pytest.mark.parametrize("method", METHODS)
def test_no_key_of_a_method_is_at_its_default_here(method: str) -> None:
    defaults = dataclasses.asdict(METHODS[method]())
    assert {"name", *KEYS[method]} == defaults.keys()
    assert not [name for name, value in KEYS[method].items() if value == defaults[name]]


# --- methods that sample ---


@pytest.mark.parametrize("method", [each.name for each in get_args(SamplingMethod)])
def test_rollouts_have_the_keys_of_the_method(begin: Begin, method: str) -> None:
    rollouts, keys = begin(method).batches, KEYS[method]
    assert {name: getattr(rollouts.settings, name) for name in SAMPLED} == SAMPLED
    assert rollouts.group_rows == keys.get("samples_per_prompt", 1)
    assert rollouts.minibatches == keys.get("minibatches", 1)
    assert rollouts.replacements == keys.get("dynamic_sampling", 0)


def test_ppo(begin: Begin) -> None:
    begun = begin("ppo")
    assert vars(begun.objective) == vars(
        Ppo(clip_range=0.3, value_clip_range=0.4, value_weight=0.6, temperature=0.7, value_warmup_steps=7)
    )
    batch = begun.batches(0)
    assert (batch.epochs, batch.minibatches) == (3, 4)
    assert stops_above(batch.kl_stop, 0.02)
    # policy and reference are one as yet, so the KL is 0 and the coefficient falls as fast as it may
    assert float(begun.parts["kl"].coefficient) == pytest.approx(0.06 * (1 - 0.2 * ROWS / 100))
    estimator = begun.batches.learn_from
    assert {name: getattr(estimator.settings, name) for name in KEYS["ppo"]} == KEYS["ppo"]
    assert estimator.micro_batch_rows == 3


def test_ppo_without_a_target_or_a_limit(begin: Begin) -> None:
    begun = begin("ppo", kl_target=None, kl_horizon=10_000, kl_limit=None)
    assert begun.batches(0).kl_stop is None
    assert float(begun.parts["kl"].coefficient) == pytest.approx(0.06)


def test_grpo(begin: Begin, parent: Path) -> None:
    begun, answers = begin("grpo"), made_up()
    assert vars(begun.objective) == vars(
        Grpo(
            clip_range=0.3, clip_range_high=0.4, kl_coefficient=0.06, loss_average="constant", max_new_tokens=5,
            temperature=0.7, unbiased_kl=False,
        )
    )  # fmt: skip
    moved_away(begun.trained)
    batch = begun.batches.learn_from(answers)
    assert (batch.epochs, batch.minibatches) == (3, 4)
    assert stops_above(batch.kl_stop, 0.02)
    assert torch.equal(batch.learned, answers.finished)
    torch.testing.assert_close(batch.logprobs, logprobs(begun.trained, answers))
    torch.testing.assert_close(batch.reference_logprobs, logprobs(load_language_model(parent), answers))
    rewards = answers.rewards.view(-1, 2)
    wanted = (rewards - rewards.mean(dim=1, keepdim=True)).flatten() / statistics.stdev(answers.rewards.tolist())
    torch.testing.assert_close(batch.advantages, wanted, rtol=1e-3, atol=1e-6)  # beside an epsilon of 1e-4


@pytest.mark.parametrize("scale", ["group", "none"])
def test_grpo_scales_rewards_as_told(begin: Begin, scale: str) -> None:
    estimator = begin("grpo", scale_rewards=scale, kl_limit=None).batches.learn_from
    wanted = 5.0 / math.sqrt(50.0) if scale == "group" else 5.0
    assert estimator.advantages(torch.tensor([0.0, 10.0, -2.0, -2.0])).tolist() == pytest.approx(
        [-wanted, wanted, 0.0, 0.0], rel=1e-4
    )
    assert estimator.kl_stop is None


def test_rloo(begin: Begin, parent: Path) -> None:
    begun, answers = begin("rloo"), made_up()
    assert vars(begun.objective) == vars(Reinforce(clip_range=0.3, temperature=0.7))
    moved_away(begun.trained)
    batch = begun.batches.learn_from(answers)
    assert (batch.epochs, batch.minibatches) == (3, 4)
    assert stops_above(batch.kl_stop, 0.02)
    kl = (logprobs(begun.trained, answers) - logprobs(load_language_model(parent), answers)).sum(dim=1)
    rewards = (answers.rewards - 0.06 * kl).view(-1, 2)
    torch.testing.assert_close(batch.advantages, whitened((rewards - rewards.flip(1)).flatten()))


def test_rloo_without_whitening_or_kl(begin: Begin) -> None:
    estimator = begin("rloo", whiten_advantages=False, kl_coefficient=0.0).batches.learn_from
    assert estimator.reference is None
    assert estimator.advantages(torch.tensor([0.0, 10.0, -2.0, -2.0])).tolist() == [-10.0, 10.0, 0.0, 0.0]


@pytest.mark.parametrize(("baseline", "whiten"), [("none", True), ("none", False), ("batch", False)])
def test_reinforce(begin: Begin, parent: Path, baseline: str, whiten: bool) -> None:
    begun, answers = begin("reinforce", baseline=baseline, whiten_advantages=whiten), made_up()
    assert vars(begun.objective) == vars(Reinforce(temperature=0.7))
    moved_away(begun.trained)
    kl = (logprobs(begun.trained, answers) - logprobs(load_language_model(parent), answers)).sum(dim=1)
    wanted = answers.rewards - 0.06 * kl
    wanted = wanted - wanted.mean() if baseline == "batch" else wanted
    torch.testing.assert_close(
        begun.batches.learn_from(answers).advantages, whitened(wanted) if whiten else wanted, rtol=1e-5, atol=1e-5
    )


def test_rejection_sampling(begin: Begin) -> None:
    begun = begin("rejection_sampling")
    rewards = torch.tensor([-2.0, -0.6, -0.5, -3.0, 1.0, 2.0, -0.7, -0.7])
    batch = begun.batches.learn_from(dataclasses.replace(made_up()[:8], rewards=rewards))
    assert batch.loss_mask.any(dim=1).tolist() == [False, True, True, False]
    assert isinstance(begun.objective, NextToken)


# --- methods that compare answers ---


def logistic(margin: Tensor) -> Tensor:
    return -F.logsigmoid(margin)


def conservative(chosen: Tensor, rejected: Tensor) -> Tensor:
    return 0.8 * logistic(0.3 * (chosen - rejected)) + 0.2 * logistic(0.3 * (rejected - chosen))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "online_dpo": conservative,
    "dpo": conservative,
    "ipo": lambda chosen, rejected: (chosen - rejected - 1 / 0.6).square(),
    "hinge": lambda chosen, rejected: torch.relu(1 - 0.3 * (chosen - rejected)),
    "robust": lambda chosen, rejected: (
        (0.8 * logistic(0.3 * (chosen - rejected)) - 0.2 * logistic(0.3 * (rejected - chosen))) / 0.6
    ),
    "orpo": lambda chosen, rejected: 0.4 * logistic(torch.logit(chosen.exp()) - torch.logit(rejected.exp())),
    "simpo": lambda chosen, rejected: logistic(0.3 * (chosen - rejected) - 0.7),
    "cpo": lambda chosen, rejected: logistic(0.3 * (chosen - rejected)),
}


@pytest.mark.parametrize("method", LOSSES)
def test_what_a_score_is_and_the_loss_of_two(begin: Begin, method: str) -> None:
    begun, fixed = begin(method), {"orpo": (1.0, True, 1.0), "simpo": (0.3, True, 0.5), "cpo": (0.3, False, 0.5)}
    objective, keys = begun.objective, KEYS[method]
    chosen, rejected = -4 * torch.rand(2, 9, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(objective.loss(chosen, rejected), LOSSES[method](chosen, rejected))
    assert (objective.beta, objective.length_normalised, objective.sft_weight) == fixed.get(
        method, (0.3, keys.get("length_normalised", False), keys.get("sft_weight", 0.0))
    )
    if method == "online_dpo":
        assert begun.batches.learn_from is best_and_worst
        assert isinstance(objective.reference, OnTheFly)
    else:
        assert objective.reference is (None if method in fixed else precomputed)


def test_kto(begin: Begin) -> None:
    begun = begin("kto")
    assert vars(begun.objective) == vars(Kto(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5))
    assert begun.batches.reference is None, "the rows bring it"


# --- value models ---


def assert_same_state(found: nn.Module, wanted: nn.Module) -> None:
    state = wanted.state_dict()
    assert found.state_dict().keys() == state.keys()
    for name, value in found.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("kind", ["reward_model", None])
def test_a_value_model_starts_as_the_reward_model(
    begin: Begin, parent: Path, reward_model: Path, kind: str | None
) -> None:
    trained = begin("ppo", f"reward_model={reward_model}", value_model=kind).trained
    assert isinstance(trained, ActorCritic)
    assert_same_state(trained.value, load_scalar_model(reward_model))
    assert_same_state(trained.policy, load_language_model(parent))


@pytest.mark.parametrize(("kind", "judged"), [("policy", True), ("policy", False), (None, False)])
def test_a_value_model_starts_as_the_policy(
    begin: Begin, parent: Path, reward_model: Path, kind: str | None, judged: bool
) -> None:
    trained = begin("ppo", *[f"reward_model={reward_model}"] * judged, value_model=kind).trained
    assert isinstance(trained, ActorCritic)
    assert_same_state(trained.value.trunk, load_language_model(parent).trunk)
    assert trained.value.trunk is not trained.policy.trunk
    assert not trained.value.score.weight.any()
    assert (trained.value.score_mean, trained.value.score_std) == (0.0, 1.0)


def test_a_value_model_may_be_the_policy_itself(begin: Begin, parent: Path, reward_model: Path) -> None:
    shared = begin("ppo", f"reward_model={reward_model}", value_model="shared", value_warmup_steps=None).trained
    assert isinstance(shared, SharedActorCritic)
    assert_same_state(shared.policy, load_language_model(parent))
    assert not shared.value.weight.any()
