"""`llmtrain align` with a method that learns from answers which the policy samples."""

from llmtrain.config.errors import ConfigError
from llmtrain.config.schema import AlignConfig, PpoConfig
from llmtrain.data.batches import PromptBatches
from llmtrain.data.encoding import load_prompts
from llmtrain.data.tokenizers import Tokenizer, load_tokenizer
from llmtrain.engine.distributed import spread
from llmtrain.generation.rollouts import Replica, Rollouts
from llmtrain.models.heads import ActorCritic, LanguageModel
from llmtrain.objectives.policy_gradient import AdaptiveKL, Ppo
from llmtrain.stages import assembly, handover
from llmtrain.stages.assembly import Run
from llmtrain.stages.evaluators import build_problems
from llmtrain.stages.planning import row_digests


def ppo(
    run: Run[AlignConfig], method: PpoConfig, policy: LanguageModel, reference: LanguageModel, tokenizer: Tokenizer
) -> None:
    """Proximal policy optimisation: prompts in, answers sampled and scored by the reward model.

    The value model has weights of its own and starts as a copy of the reward model.
    """
    config, folder = run.config, run.config.reward_model
    assert folder is not None
    check_same_tokenizer(folder, tokenizer)
    reward_model, value = assembly.load_reward_model(folder), assembly.load_reward_model(folder)
    reward_model.to(run.layout.device).eval().requires_grad_(False)
    room = min(config.train.sequence_length, policy.config.max_sequence_length) - method.max_new_tokens
    if room < 1:
        raise ConfigError(
            f"method.max_new_tokens={method.max_new_tokens} leaves no room for a prompt in "
            f"{room + method.max_new_tokens} tokens (train.sequence_length, or the model's max_sequence_length): "
            "lower it."
        )
    rows = run.main_first(
        lambda: load_prompts(config.data, tokenizer, split="train", max_length=room, cache_dir=run.cache)
    )
    trained = ActorCritic(policy, value)
    model = spread(trained, run.layout, config.engine.sharding)
    batch_rows = config.train.batch_rows or method.minibatches
    said = row_digests(config.data, rows)
    plan = run.plan(config.data, {name: len(each) for name, each in rows.items()}, said)
    prompts = PromptBatches(rows, plan.order(config.seed))
    kl = AdaptiveKL(method.kl_coefficient, method.kl_target, method.kl_horizon).to(run.layout.device)
    rollouts = Rollouts(
        model=model, policy=policy, reference=reference, reward_model=reward_model, prompts=prompts,
        counts=prompts.counts, stop_tokens=tokenizer.stop_ids, pad_id=tokenizer.pad_id, settings=method,
        batch_rows=batch_rows, micro_batch_rows=config.train.micro_batch_rows, kl=kl, seed=config.seed,
        layout=run.layout, autocast=run.autocast,
    )  # fmt: skip
    run.say(f"ppo: {plan.steps} steps of {batch_rows} answers to {sum(map(len, rows.values())):,} prompts")
    problems = build_problems(config, tokenizer, Replica(policy), run.cache)
    run.write_samples("before", problems.samples)
    run.fit(
        model=model, trained=trained, batches=rollouts,
        objective=Ppo(
            method.clip_range, method.value_clip_range, method.value_weight, method.temperature,
            method.value_warmup_steps,
        ),
        tokenizer=tokenizer, plan=plan, evaluators=problems.evaluators, parts={"kl": kl},
    )  # fmt: skip
    run.write_samples("after", problems.samples)
    run.finish(policy, tokenizer, data=said, plan=plan)


def check_same_tokenizer(reward_model: str, tokenizer: Tokenizer) -> None:
    """Raises ConfigError where the reward model reads other tokens than the policy writes."""
    other = load_tokenizer(handover.model_folder(reward_model))
    if other.encode_batch(PROBE) != tokenizer.encode_batch(PROBE) or other.vocab_size != tokenizer.vocab_size:
        raise ConfigError(
            f"reward_model: {reward_model} has another tokenizer than the policy. "
            "Train it from the policy's model, with llmtrain reward."
        )


PROBE = ["The quick brown fox, 12 + 34 = 46.", "def f(x):\n    return x"]
