"""`llmtrain align` with a method that learns from answers which the policy samples."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.config.errors import ConfigError
from llmtrain.config.schema import (
    AlignConfig,
    GrpoConfig,
    LoraConfig,
    OnlineDpoConfig,
    PpoConfig,
    ReinforceConfig,
    RejectionSamplingConfig,
    RlooConfig,
    SamplingMethod,
    VllmRolloutConfig,
)
from llmtrain.config.seeds import derive_seed
from llmtrain.data.batches import PromptBatches
from llmtrain.data.encoding import PromptRow, load_prompts
from llmtrain.data.records import Split
from llmtrain.data.tokenizers import Tokenizer, load_tokenizer
from llmtrain.engine.distributed import Layout, spread, total
from llmtrain.engine.steps import Objective
from llmtrain.engine.trainer import Evaluator
from llmtrain.generation.engines import Engine, OwnEngine, Replica
from llmtrain.generation.estimators import AnswerEstimator, PpoEstimator
from llmtrain.generation.rollouts import Rollouts, SampledAnswers
from llmtrain.generation.selection import best_and_worst, best_answers
from llmtrain.generation.vllm_engine import VllmEngine, check_fits
from llmtrain.models.formats import read_config
from llmtrain.models.heads import ActorCritic, LanguageModel, ScalarModel, SharedActorCritic
from llmtrain.models.lora import VALUE_SET, AdaptedActorCritic, initialise_adapters
from llmtrain.objectives.advantages import batch_advantages, group_advantages, leave_one_out_advantages, whiten
from llmtrain.objectives.batch import Batch
from llmtrain.objectives.kl import AdaptiveKL, KLStop
from llmtrain.objectives.next_token import NextToken
from llmtrain.objectives.policy_gradient import Grpo, Reinforce
from llmtrain.objectives.ppo import Ppo
from llmtrain.objectives.preference import OnTheFly, Preference, dpo_loss
from llmtrain.rewards.sums import WeightedSum
from llmtrain.stages import handover, starts
from llmtrain.stages.assembly import AnyActorCritic, Run, Samples
from llmtrain.stages.evaluators import BestOf, HeldOutPrompts, Problems, build_problems
from llmtrain.stages.judging import build_reward, check_expected
from llmtrain.stages.planning import row_digests


@dataclasses.dataclass(kw_only=True)
class Learner:
    """A method's own parts: what it trains, what it makes of judged answers, what it minimises."""

    trained: LanguageModel | AnyActorCritic
    model: nn.Module
    """`trained` as spread over the processes."""
    learn_from: Callable[[SampledAnswers], Batch]
    objective: Objective
    parts: Mapping[str, nn.Module] = dataclasses.field(default_factory=dict)
    """What adapts during the run."""
    group_rows: int = 1
    """Answers to each prompt."""
    minibatches: int = 1
    replacements: int = 0
    """How many times, at most, a prompt is replaced that has nothing to tell."""
    first_steps: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """From which step on weights of `trained` are trained, by name, where it is not from the first."""


def align(run: Run[AlignConfig], policy: LanguageModel, tokenizer: Tokenizer) -> None:
    """Prompts in, answers sampled and judged by the reward model and the rewards."""
    config, method = run.config, run.config.method
    assert isinstance(method, SamplingMethod)
    assert config.train.batch_rows is not None
    if config.reward_model is not None:
        check_same_tokenizer(config.reward_model, tokenizer)
        check_same_length(config, policy)
    engine = build_engine(run, policy)
    reward = build_reward(config, pad_id=tokenizer.pad_id, device=run.layout.device, say=run.say)
    rows = load_rows(run, method, policy, tokenizer, "train")
    check_expected(reward, rows)
    learner = LEARNERS[type(method)](run, method, run.adapt(policy))
    said = row_digests(config.data, rows)
    plan = run.plan(config.data, {name: len(each) for name, each in rows.items()}, said)
    if max(learner.first_steps.values(), default=0) >= plan.steps:
        raise ConfigError(f"method.value_warmup_steps: the policy would learn in none of {plan.steps} steps; lower it")
    others = [plan.order(derive_seed(config.seed, "replacement", number)) for number in range(learner.replacements)]
    rollouts = Rollouts(
        engine=engine, prompts=PromptBatches(rows, plan.order(config.seed), others), reward=reward,
        learn_from=learner.learn_from, decode=tokenizer.decode, stop_tokens=tokenizer.stop_ids,
        pad_id=tokenizer.pad_id, settings=method, batch_rows=config.train.batch_rows, group_rows=learner.group_rows,
        minibatches=learner.minibatches, replacements=learner.replacements, shown_rows=config.tracker.samples,
        importance_limit=config.rollout.importance_limit if isinstance(config.rollout, VllmRolloutConfig) else None,
        seed=config.seed, layout=run.layout, autocast=run.autocast,
    )  # fmt: skip
    run.say(
        f"{method.name}: {plan.steps} steps of {config.train.batch_rows} answers "
        f"to {sum(map(len, rows.values())):,} prompts"
    )
    evaluators, samples = build_evaluators(run, method, policy, tokenizer, reward)
    run.write_samples("before", samples)
    run.fit(
        model=learner.model, trained=learner.trained, batches=rollouts, objective=learner.objective,
        tokenizer=tokenizer, plan=plan, evaluators=evaluators, score=held_out_score(evaluators), parts=learner.parts,
        first_steps=learner.first_steps,
    )  # fmt: skip
    run.write_samples("after", samples)
    run.finish(policy, tokenizer, data=said, plan=plan)


def build_engine(run: Run[AlignConfig], policy: LanguageModel) -> Engine:
    """What answers the prompts of rollouts; what is measured is answered by the policy itself in any case."""
    settings = run.config.rollout
    if not isinstance(settings, VllmRolloutConfig):
        return OwnEngine(policy)
    check_fits(policy, run.layout.device)
    return VllmEngine(
        policy, settings, run.layout, run.folder / ".vllm", max_length=starts.fitting_length(run.config, policy),
        dtype=run.autocast_dtype or torch.float32,
    )  # fmt: skip


def build_evaluators(
    run: Run[AlignConfig], method: SamplingMethod, policy: LanguageModel, tokenizer: Tokenizer, reward: WeightedSum
) -> tuple[list[Evaluator], Callable[[], Samples]]:
    """What is measured of problems and held-out prompts, and the answers that the report shows.

    Raises ConfigError where `eval.max_prompts` asks for held-out prompts and there are none.
    """
    config, replica = run.config, Replica(policy)
    problems = build_problems(config, tokenizer, replica, run.cache)
    evaluators, samples = problems.evaluators, problems.samples
    asked: list[PromptRow] = []
    if config.eval.max_prompts:
        rows = load_rows(run, method, policy, tokenizer, "validation", config.eval.max_prompts)
        check_expected(reward, rows)
        asked = [row for each in rows.values() for row in each]
        if not asked:
            raise ConfigError("eval.max_prompts: no prompt is held out; name some: data.sources.NAME.validation_path")
        prompts = HeldOutPrompts(replica, tokenizer, asked, reward, method, config.seed)
        evaluators.append(prompts)
        samples = samples if problems.problems else prompts.samples
    if config.eval.best_of and (each := problems.problems or asked):
        evaluators.append(BestOf(replica, tokenizer, each, reward, method, config.eval.best_of, config.seed))
    return evaluators, samples


def held_out_score(evaluators: Sequence[Evaluator]) -> str | None:
    """What says best how good answers are, higher is better; null where nothing does."""
    if any(isinstance(each, Problems) for each in evaluators):
        return "eval/exact_match"
    return next((each.score for each in evaluators if isinstance(each, HeldOutPrompts)), None)


def load_rows(
    run: Run[AlignConfig], method: SamplingMethod, policy: LanguageModel, tokenizer: Tokenizer, split: Split,
    limit: int | None = None,
) -> dict[str, list[PromptRow]]:  # fmt: skip
    """The prompts by source, the first `limit` that leave room for an answer. Raises ConfigError where none could."""
    config = run.config
    length = starts.fitting_length(config, policy)
    room = length - method.max_new_tokens
    if room < 1:
        raise ConfigError(
            f"method.max_new_tokens={method.max_new_tokens} leaves no room for a prompt in {length} tokens "
            "(train.sequence_length, or the model's max_sequence_length): lower it."
        )
    return run.main_first(
        lambda: load_prompts(config.data, tokenizer, split=split, max_length=room, cache_dir=run.cache, limit=limit)
    )


def ppo(run: Run[AlignConfig], method: PpoConfig, policy: LanguageModel) -> Learner:
    """Proximal policy optimisation, with a value model."""
    config, layout = run.config, run.layout
    trained = with_values(run, policy, method.value_model)
    model = spread(trained, layout)
    kl = AdaptiveKL(method.kl_coefficient, method.kl_target, method.kl_horizon).to(layout.device)
    estimator = PpoEstimator(
        model=model, reference=starts.load_reference(run, model, values=False), settings=method, kl=kl,
        kl_stop=kl_stop(method.kl_limit, layout), micro_batch_rows=config.train.given_micro_batch_rows, layout=layout,
        autocast=run.autocast,
    )  # fmt: skip
    warmup = value_warmup(method, config.train.steps)
    objective = Ppo(
        method.clip_range, method.value_clip_range, method.value_weight, method.temperature, warmup
    )  # fmt: skip
    return Learner(
        trained=trained, model=model, learn_from=estimator, objective=objective, parts={"kl": kl},
        minibatches=method.minibatches, first_steps={name: warmup for name in policy_weights(trained) if warmup},
    )  # fmt: skip


# A value model that has just begun makes advantages of noise; runs too short to spare the steps do without.
VALUE_WARMUP_STEPS, SHORT_RUN_STEPS = 2, 20


def value_warmup(method: PpoConfig, steps: int | None) -> int:
    """Steps in which the value model learns alone, in a run of so many steps (null: of epochs)."""
    if method.value_warmup_steps is not None:
        return method.value_warmup_steps
    is_short = steps is not None and steps < SHORT_RUN_STEPS
    return 0 if is_short or method.value_model == "shared" else VALUE_WARMUP_STEPS


def policy_weights(trained: AnyActorCritic) -> list[str]:
    """The names of the weights that make answers, not values."""
    names = [name for name, _ in trained.named_parameters()]
    return [name for name in names if not name.startswith("value.") and f".adapters.{VALUE_SET}." not in name]


def with_values(run: Run[AlignConfig], policy: LanguageModel, kind: str | None) -> AnyActorCritic:
    """The policy with a value model; `kind` is `method.value_model`."""
    adapter, reward_model = run.config.adapter, run.config.reward_model
    if kind == "shared":
        return SharedActorCritic(policy)
    if isinstance(adapter, LoraConfig) and kind != "reward_model":
        trained = AdaptedActorCritic(policy, adapter)
        initialise_adapters(policy, run.config.seed, "value adapter", adapters=VALUE_SET)
        return trained
    if reward_model is not None and kind != "policy":
        return ActorCritic(policy, run.adapt(starts.load_reward_model(reward_model)))
    # the generator is for a score head whose weights are set to zero at once
    return ActorCritic(policy, ScalarModel.from_language_model(policy, torch.Generator()).zero_score())


def grpo(run: Run[AlignConfig], method: GrpoConfig, policy: LanguageModel) -> Learner:
    """Group relative policy optimisation: the KL is in the loss."""
    advantages = functools.partial(
        group_advantages, group_rows=method.samples_per_prompt, scale=method.scale_rewards,
        reduce=functools.partial(total, layout=run.layout),
    )  # fmt: skip
    objective = Grpo(
        method.clip_range, method.clip_range_high, method.kl_coefficient, method.loss_average, method.max_new_tokens,
        method.temperature, unbiased_kl=method.unbiased_kl,
    )  # fmt: skip
    learner = several_updates(
        run, method, policy, advantages, objective, kl_in_loss=True, mask_unfinished=method.mask_unfinished
    )
    return dataclasses.replace(learner, replacements=method.dynamic_sampling)


def rloo(run: Run[AlignConfig], method: RlooConfig, policy: LanguageModel) -> Learner:
    """REINFORCE with the other answers to the prompt as baseline: the KL is in the reward."""
    baseline = functools.partial(leave_one_out_advantages, group_rows=method.samples_per_prompt)
    advantages = whitened(baseline, run.layout) if method.whiten_advantages else baseline
    objective = Reinforce(method.clip_range, method.temperature)
    return several_updates(run, method, policy, advantages, objective, kl_in_reward=method.kl_coefficient)


def several_updates(
    run: Run[AlignConfig], method: GrpoConfig | RlooConfig, policy: LanguageModel,
    advantages: Callable[[Tensor], Tensor], objective: Objective, **options: Any,
) -> Learner:  # fmt: skip
    """What GRPO and RLOO share: groups, and several updates for each rollout."""
    model = spread(policy, run.layout)
    estimator = AnswerEstimator(
        model=model, reference=reference_if(method.kl_coefficient, run, model), advantages=advantages,
        temperature=method.temperature, epochs=method.epochs, minibatches=method.minibatches,
        kl_stop=kl_stop(method.kl_limit, run.layout), micro_batch_rows=run.config.train.given_micro_batch_rows,
        autocast=run.autocast, **options,
    )  # fmt: skip
    return Learner(
        trained=policy, model=model, learn_from=estimator, objective=objective, minibatches=method.minibatches,
        group_rows=method.samples_per_prompt,
    )  # fmt: skip


def reinforce(run: Run[AlignConfig], method: ReinforceConfig, policy: LanguageModel) -> Learner:
    """REINFORCE with the mean of the batch as baseline, or none: the KL is in the reward."""
    mean_of_all = functools.partial(batch_advantages, reduce=functools.partial(total, layout=run.layout))
    baseline: Callable[[Tensor], Tensor] = mean_of_all if method.baseline == "batch" else torch.clone
    model = spread(policy, run.layout)
    estimator = AnswerEstimator(
        model=model, reference=reference_if(method.kl_coefficient, run, model),
        advantages=whitened(baseline, run.layout) if method.whiten_advantages else baseline,
        temperature=method.temperature, kl_in_reward=method.kl_coefficient,
        micro_batch_rows=run.config.train.given_micro_batch_rows, autocast=run.autocast,
    )  # fmt: skip
    return Learner(
        trained=policy, model=model, learn_from=estimator, objective=Reinforce(temperature=method.temperature)
    )


def reference_if(kl_coefficient: float, run: Run[AlignConfig], model: nn.Module) -> nn.Module | None:
    """The reference, unless its KL counts for nothing."""
    return starts.load_reference(run, model) if kl_coefficient else None


def whitened(advantages: Callable[[Tensor], Tensor], layout: Layout) -> Callable[[Tensor], Tensor]:
    """Advantages [B] brought to mean 0 and standard deviation 1 over all processes."""

    def whiten_them(rewards: Tensor) -> Tensor:
        found = advantages(rewards)
        everything = torch.ones_like(found, dtype=torch.bool)
        return whiten(found, everything, reduce=functools.partial(total, layout=layout))

    return whiten_them


def kl_stop(limit: float | None, layout: Layout) -> KLStop | None:
    """What ends a rollout's updates at the limit, if there is one."""
    return None if limit is None else KLStop(limit, functools.partial(total, layout=layout))


def online_dpo(run: Run[AlignConfig], method: OnlineDpoConfig, policy: LanguageModel) -> Learner:
    """Direct preference optimisation on pairs of the policy's own answers."""
    loss = functools.partial(dpo_loss, beta=method.beta, label_smoothing=method.label_smoothing)
    model = spread(policy, run.layout)
    return Learner(
        trained=policy, model=model, learn_from=best_and_worst,
        objective=Preference(loss, OnTheFly(starts.load_reference(run, model)), beta=method.beta),
        group_rows=method.samples_per_prompt,
    )  # fmt: skip


def rejection_sampling(run: Run[AlignConfig], method: RejectionSamplingConfig, policy: LanguageModel) -> Learner:
    """Next-token training on the best of the policy's own answers."""
    return Learner(
        trained=policy, model=spread(policy, run.layout),
        learn_from=functools.partial(best_answers, minimum_reward=method.minimum_reward), objective=NextToken(),
        group_rows=method.samples_per_prompt,
    )  # fmt: skip


LEARNERS: dict[type, Callable[[Run[AlignConfig], Any, LanguageModel], Learner]] = {
    PpoConfig: ppo,
    GrpoConfig: grpo,
    RlooConfig: rloo,
    ReinforceConfig: reinforce,
    OnlineDpoConfig: online_dpo,
    RejectionSamplingConfig: rejection_sampling,
}


def check_same_tokenizer(reward_model: str, tokenizer: Tokenizer) -> None:
    """Raises ConfigError where the reward model reads other tokens than the policy writes."""
    other = load_tokenizer(handover.model_folder(reward_model))
    if other.encode_batch(PROBE) != tokenizer.encode_batch(PROBE) or other.vocabulary != tokenizer.vocabulary:
        raise ConfigError(
            f"reward_model: {reward_model} has another tokenizer than the policy. "
            "Train it from the policy's model, with llmtrain reward."
        )


def check_same_length(config: AlignConfig, policy: LanguageModel) -> None:
    """Raises ConfigError where the reward model was not built for rows as long as the policy may write."""
    assert config.reward_model is not None
    most = read_config(handover.model_folder(config.reward_model))[0].max_sequence_length
    longest = starts.fitting_length(config, policy)
    if most < longest:
        raise ConfigError(
            f"reward_model: {config.reward_model} reads {most} tokens, and prompts with their answers may have "
            f"{longest}. Set train.sequence_length={most}, or train a longer reward model."
        )


PROBE = ["The quick brown fox, 12 + 34 = 46.", "def f(x):\n    return x"]
