"""`rewards.<name>` of the config → rewards."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from llmtrain.config.errors import ConfigError
from llmtrain.config.schema import RewardFunctionConfig
from llmtrain.config.targets import check_options, missing_options, resolve_callable
from llmtrain.rewards.answers import Reward


def check_functions(functions: Mapping[str, RewardFunctionConfig]) -> None:
    """Looks up every reward and holds its options against its signature; nothing is called yet.

    Raises ConfigError for what cannot be found, is no reward, or does not know or lacks an option.
    """
    for name, config in functions.items():
        _check(name, config)


def build_functions(functions: Mapping[str, RewardFunctionConfig]) -> dict[str, Reward]:
    """The rewards by name. Raises ConfigError as `check_functions`, and for options that a class refuses."""
    return {name: _build(name, config) for name, config in functions.items()}


def _build(name: str, config: RewardFunctionConfig) -> Reward:
    target = _check(name, config)
    if not isinstance(target, type):
        return functools.partial(target, **config.options)
    try:
        reward: Reward = target(**config.options)
    except (ValueError, TypeError) as problem:
        raise ConfigError(f"rewards.{name}.options: {config.target} refuses them: {problem}") from problem
    return reward


def _check(name: str, config: RewardFunctionConfig) -> Callable[..., Any]:
    key, options = f"rewards.{name}._target_", f"rewards.{name}.options"
    target = resolve_callable(config.target, key)
    call = _call_of(target)
    takes = [each for each in inspect.signature(call).parameters.values() if each.kind in POSITIONAL] if call else []
    own = 1 if isinstance(target, type) else 0  # self
    if len(takes) <= own:
        raise ConfigError(
            f"{key}={config.target!r}: expected a function f(answers, **options), or a class whose instances are "
            "called with the answers (llmtrain.rewards.answers)"
        )
    reserved = () if isinstance(target, type) else (takes[0].name,)
    check_options(target, config.options, options, reserved)
    missing = missing_options(target, config.options, reserved)
    if missing:
        raise ConfigError(f"{options}.{missing[0]}: needs a value: {config.target} has no default for it")
    return target


def _call_of(target: Callable[..., Any]) -> Callable[..., Any] | None:
    """What is called with the answers: the function, or the `__call__` of a class's instances, if they have one."""
    if not isinstance(target, type):
        return target
    found: Callable[..., Any] | None = next(
        (vars(c)["__call__"] for c in target.__mro__ if "__call__" in vars(c)), None
    )
    return found


POSITIONAL = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.VAR_POSITIONAL,
)
