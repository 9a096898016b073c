"""What a run is warned of, and which weights it hands on: combinations that do not fit, or have no effect."""

from collections.abc import Callable, Iterator
from typing import Any

from llmtrain.config.plain import Finding
from llmtrain.config.schema import PAIR_METHODS
from llmtrain.config.view import View, finding, no_effect

# What is read of rollouts alone.
OF_ROLLOUTS = (
    "kl", "length_growth", "entropy", "clip_fraction", "updates", "explained_variance", "truncated", "flat_groups",
)  # fmt: skip
# What is read of a policy that is rewarded for its answers, or for preferring one of two.
OF_POLICIES = ("overoptimised", "held_out_metric")


def final_model(view: View) -> Iterator[Finding]:
    """Where the best checkpoint is handed on, every one of them is measured."""
    every, measured = view["checkpoint.every_steps"], view["eval.every_steps"]
    if view["checkpoint.final"] != "best" or measured is None:
        return
    if every is None:
        problem = f"best has nothing to choose from; set checkpoint.every_steps, to eval.every_steps={measured} say"
        yield finding(problem, "checkpoint.final", "checkpoint.every_steps")
    elif every % measured:
        problem = f"{every} is no multiple of eval.every_steps={measured}: checkpoint.final=best wants all measured"
        yield finding(problem, "checkpoint.every_steps", "eval.every_steps", "checkpoint.final")


def warnings(view: View) -> Iterator[Finding]:
    """Each warning belongs to some stages; a run stops for those that are on."""
    without_effect = dict(_without_effect(view))
    for key, why in without_effect.items():
        yield from no_effect(view, f"health.{key}", why)
    for rule in view["health.stop_on"]:
        if rule in without_effect:
            yield finding(f"{rule} has no effect: {without_effect[rule]}", "health.stop_on")
        elif view[f"health.{rule}"] is None:
            yield finding(f"{rule} is switched off: health.{rule}=null", "health.stop_on", f"health.{rule}")


def _without_effect(view: View) -> Iterator[tuple[str, str]]:
    """The keys that this stage, or its method, has no use for, and why."""
    method = view["method"] if view.command == "align" else {}
    samples = "max_new_tokens" in method
    if view.command not in ("pretrain", "sft"):
        yield "loss_spike", "only the loss on text is steady enough"
    if not samples:
        yield from ((key, "nothing is sampled here: it is for reinforcement learning") for key in OF_ROLLOUTS)
    else:
        yield from _not_measured(method)
    if view.command != "reward" and method.get("name") not in PAIR_METHODS:
        yield "stuck_loss", "nothing is learned from given pairs here"
    if view.command != "align":
        yield from ((key, "no policy is rewarded here: it is for align") for key in OF_POLICIES)
    elif view["health.overoptimised"] is None:
        yield "held_out_metric", "health.overoptimised is switched off"


def _not_measured(method: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The keys whose metric a method that samples never writes, or always with the same value, and why."""
    name, updates = method["name"], method.get("epochs", 1) * method.get("minibatches", 1)
    if "kl_coefficient" not in method:
        yield from ((key, f"method={name} does not measure it") for key in ("kl", "entropy", "clip_fraction"))
    else:
        if name != "ppo" and method["kl_coefficient"] == 0:  # PPO's reference is read in any case
            yield "kl", "method.kl_coefficient=0 has no reference to measure it to"
        if updates == 1:
            yield "clip_fraction", "a rollout is used for one update, whose ratio is 1"
    if method.get("kl_limit") is None:
        yield "updates", "no method.kl_limit ends the updates of a rollout"
    elif updates == 1:
        yield "updates", "a rollout is used for one update, which is always made"
    if name != "ppo":
        yield "explained_variance", f"method={name} has no value model"
    if "samples_per_prompt" not in method:
        yield "flat_groups", f"method={name} samples one answer to each prompt"


def gradient_norm(view: View) -> Iterator[Finding]:
    """A range has its lower end first."""
    limits = view["health.grad_norm"]
    if limits is not None and not 0 <= limits[0] < limits[1]:
        yield finding(f"{list(limits)} is no range: the lower limit comes first, [0.001, 10]", "health.grad_norm")


def spikes(view: View) -> Iterator[Finding]:
    """What is done about spikes belongs to text; going back needs checkpoints that do not depend on the clock."""
    remedy = view["health.on_spike"]
    if remedy is None:
        for key in ("health.spike_deviations", "health.spike_window"):
            yield from no_effect(view, key, "health.on_spike is not set", "health.on_spike")
        return
    if view.command not in ("pretrain", "sft"):
        yield finding(f"{remedy} has no effect: only the loss on text is steady enough", "health.on_spike")
    if remedy == "rollback" and view["checkpoint.every_steps"] is None:
        yield finding("needs a value: health.on_spike=rollback goes back to a checkpoint", "checkpoint.every_steps")
    if remedy == "rollback" and view["checkpoint.every_minutes"] is not None:
        problem = "leave it away with health.on_spike=rollback: the clock would decide which rows are left out"
        yield finding(problem, "checkpoint.every_minutes", "health.on_spike")


HEALTH_CHECKS: tuple[Callable[[View], Iterator[Finding]], ...] = (final_model, warnings, gradient_norm, spikes)
