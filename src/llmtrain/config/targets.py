"""Import paths in a config (`_target_`): the one place where they are looked up and their options checked.

A target is imported when it is asked for, so nothing here loads torch by itself.
"""

import importlib
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from llmtrain.config.errors import ConfigError
from llmtrain.config.faults import suggestion

Kind = TypeVar("Kind")
KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def resolve_target(path: str, kind: type[Kind], key: str) -> type[Kind]:
    """The class at the import path, such as `torch.optim.AdamW` or `my_package.MyOptimizer`.

    Args:
        path: module and name, joined by a dot; the module must be importable (installed, or on PYTHONPATH).
        kind: the class that it must be derived from.
        key: the config key that holds the path, for messages.

    Raises:
        ConfigError: if there is no such module or name, or it is something else.
    """
    target = _imported(path, key, lambda value: isinstance(value, type) and issubclass(value, kind))
    if not (isinstance(target, type) and issubclass(target, kind)):
        raise ConfigError(f"{key}={path!r}: expected a class derived from {kind.__module__}.{kind.__qualname__}")
    return target


def resolve_callable(path: str, key: str) -> Callable[..., Any]:
    """The class or function at the import path; arguments and errors as `resolve_target`."""
    target = _imported(path, key, _is_class_or_function)
    if not _is_class_or_function(target):
        raise ConfigError(f"{key}={path!r}: expected a class or a function")
    found: Callable[..., Any] = target
    return found


def _imported(path: str, key: str, fits: Callable[[Any], bool]) -> Any:
    """What stands at the import path; names of the module that fit are suggested where it does not."""
    module_name, _, name = path.rpartition(".")
    if not all(path.split(".")) or not module_name:
        raise ConfigError(f"{key}={path!r}: expected an import path such as package.module.Name")
    try:
        module = importlib.import_module(module_name)
    except ImportError as problem:
        raise ConfigError(
            f"{key}={path!r}: cannot import {module_name!r} ({problem}); install it or add its folder to PYTHONPATH"
        ) from problem
    except Exception as problem:  # what a module of the user's own does when it is imported
        raise ConfigError(f"{key}={path!r}: {module_name} fails: {type(problem).__name__}: {problem}") from problem
    names = [name for name, value in vars(module).items() if fits(value)]
    if not hasattr(module, name):
        raise ConfigError(f"{key}={path!r}: {module_name} has no {name!r}{suggestion(name, names)}")
    return getattr(module, name)


def _is_class_or_function(value: Any) -> bool:
    return inspect.isclass(value) or inspect.isfunction(value)


def check_options(
    target: Callable[..., Any], options: Mapping[str, Any], key: str, reserved: Collection[str] = ()
) -> None:
    """Refuses options that the target's signature does not know.

    Args:
        target: a class or function, as from `resolve_target` or `resolve_callable`.
        options: keyword arguments that the user gave.
        key: the config key that holds them, for messages.
        reserved: arguments that are set elsewhere in the config or by the program.

    Raises:
        ConfigError: naming the unknown options, all allowed ones and the nearest spelling.
    """
    allowed = accepted_options(target)
    names = sorted((allowed or set()) - set(reserved))
    for option in options:
        if option in reserved:
            raise ConfigError(f"{key}.{option}: is set by a key of its own, not among the options")
        if allowed is not None and option not in allowed:
            raise ConfigError(
                f"{key}.{option}: {target.__qualname__} knows no such option{suggestion(option, names) or '.'} "
                f"Allowed: {', '.join(names)}"
            )


def accepted_options(target: Callable[..., Any]) -> set[str] | None:
    """Names of the keyword arguments that a class or function takes; None if it takes any (`**kwargs`)."""
    parameters = inspect.signature(target).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return {parameter.name for parameter in parameters if parameter.kind in KEYWORD}


def missing_options(target: Callable[..., Any], options: Collection[str], reserved: Collection[str] = ()) -> list[str]:
    """Keyword arguments without a default that `options` do not give, and that are not `reserved`."""
    parameters = inspect.signature(target).parameters.values()
    needed = [each.name for each in parameters if each.kind in KEYWORD and each.default is inspect.Parameter.empty]
    return [name for name in needed if name not in {*options, *reserved}]
