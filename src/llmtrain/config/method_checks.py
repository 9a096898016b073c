"""Combinations of keys of the methods of `align` that sample answers, which do not fit together; see `checks.py`."""

from collections.abc import Callable, Iterator

from llmtrain.config.fields import alternatives, tag_of
from llmtrain.config.layout_checks import data_processes
from llmtrain.config.plain import Finding
from llmtrain.config.schema import SamplingMethod
from llmtrain.config.view import View, finding, no_effect

VLLM_TEMPERATURES = (0.01, 2.0)  # it refuses what is above and raises what is below
SAMPLING = [tag_of(member) for member in alternatives(SamplingMethod)]


def groups(view: View) -> Iterator[Finding]:
    """Answers come in groups for one prompt, and minibatches of whole groups are equal, also over processes."""
    rows, method = view["train.batch_rows"], view["method"]
    samples, count = method.get("samples_per_prompt", 1), method.get("minibatches", 1)
    processes = data_processes(view)
    if rows is None or view["method.name"] not in SAMPLING:
        return
    if rows % samples:
        yield finding(
            f"{samples} does not divide train.batch_rows={rows}", "method.samples_per_prompt", "train.batch_rows"
        )
        return
    prompts = rows // samples
    if prompts % count:
        of = f"the {prompts} prompts of train.batch_rows={rows}" if samples > 1 else f"train.batch_rows={rows}"
        yield finding(f"{count} does not divide {of}", "method.minibatches", "train.batch_rows")
    elif samples * count > 1 and (prompts // count) % processes:  # plain rows: `rows_per_process`
        unit = f"{prompts // count} {'prompts' if samples > 1 else 'rows'}"
        problem = f"{f'minibatches of {unit}' if count > 1 else unit} cannot be shared evenly by {processes} processes"
        key = "method.minibatches" if count > 1 else "method.samples_per_prompt"
        yield finding(problem, key, "train.batch_rows", "engine.processes")


def kl_penalty(view: View) -> Iterator[Finding]:
    """Without a coefficient there is no penalty; the horizon belongs to the adaptive one."""
    if view["method.kl_coefficient"] == 0:
        for key in ("kl_estimator", "kl_target", "kl_horizon", "unbiased_kl"):
            if key in view["method"]:
                yield from no_effect(view, f"method.{key}", "the KL counts for nothing", "method.kl_coefficient")
    elif view["method.kl_target"] is None:
        yield from no_effect(view, "method.kl_horizon", "the KL coefficient is fixed; set method.kl_target")


def one_update(view: View) -> Iterator[Finding]:
    """At the first update the policy is the one that has sampled: there is nothing to clip, nothing to stop."""
    if view["method.epochs"] * view["method.minibatches"] > 1:
        return
    why = "a rollout is used for one update, whose ratio is 1; raise method.epochs or method.minibatches"
    if view["method.kl_limit"] is not None:
        yield from no_effect(view, "method.kl_limit", why)
    for key in ("clip_range", "clip_range_high"):
        if key in view["method"] and view["method.name"] != "ppo":
            yield from no_effect(view, f"method.{key}", why)


def value_model(view: View) -> Iterator[Finding]:
    """A copy needs an original; a head on the policy cannot learn alone."""
    kind = view["method.value_model"]
    if kind == "reward_model" and view["reward_model"] is None and view["rewards"]:
        problem = "there is no reward model to copy: name one with reward_model=, or choose policy or shared"
        yield finding(problem, "method.value_model", "rewards")
    if kind == "shared":
        why = "values and policy share their weights, so the value cannot learn alone"
        yield from no_effect(view, "method.value_warmup_steps", why, "method.value_model")
    warmup, steps = view["method.value_warmup_steps"], view["train.steps"]
    if warmup is not None and steps is not None and warmup >= steps:
        problem = f"the policy would learn in none of {steps} steps"
        yield finding(problem, "method.value_warmup_steps", "train.steps")


def judged_answers(view: View) -> Iterator[Finding]:
    """Held-out answers are judged where there are rewards; the best of several is the one with the highest."""
    for key in ("eval.max_prompts", "eval.best_of"):
        if view[key] is None:
            continue
        if view.command != "align" or view["method.name"] not in SAMPLING:
            yield finding(f"has no effect: only align with method={', '.join(SAMPLING)} has rewards", key)
        elif key == "eval.best_of" and view["eval.problems"] is None and view["eval.max_prompts"] is None:
            yield from no_effect(view, key, "set eval.problems or eval.max_prompts, for something to answer")


def samples(view: View) -> Iterator[Finding]:
    """Answers are kept where they are sampled."""
    key, every = "tracker.samples", "tracker.samples_every_steps"
    count, why = view[key], f"only align with method={', '.join(SAMPLING)} samples answers"
    if view.command != "align" or view["method.name"] not in SAMPLING:
        yield from no_effect(view, key, why)
        yield from no_effect(view, every, why)
    elif count == 0:
        yield from no_effect(view, every, "tracker.samples=0 keeps none", key)


def rollout(view: View) -> Iterator[Finding]:
    """vLLM needs something to sample, and a GPU; pairs and the best answers are learned whoever has sampled them."""
    name, method = view["rollout.name"], view["method.name"]
    if name != "vllm":
        return
    if method not in SAMPLING:
        yield finding(f"vllm has no effect: method={method} samples nothing", "rollout.name", "method.name")
        return
    if view["engine.device"] == "cpu":
        yield finding("vllm needs a GPU: set engine.device=cuda, or rollout=llmtrain", "rollout.name", "engine.device")
    low, high = VLLM_TEMPERATURES
    if not low <= view["method.temperature"] <= high:
        problem = f"vLLM samples at {low} to {high}; choose one of these, or rollout=llmtrain"
        yield finding(problem, "method.temperature", "rollout.name")
    if method in ("online_dpo", "rejection_sampling"):
        why = f"method={method} takes no ratio to the policy that sampled"
        yield from no_effect(view, "rollout.importance_limit", why, "method.name")


METHOD_CHECKS: tuple[Callable[[View], Iterator[Finding]], ...] = (
    groups,
    kl_penalty,
    one_update,
    value_model,
    judged_answers,
    samples,
    rollout,
)
