"""`key=value` on the command line: told apart into group choices and keys, checked against what exists.

Hydra's own grammar is used throughout. Two things differ from its habits: a key need not be named in the YAML
(every key of the schema has a default), and a key that takes text takes the text as it stands.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode

from llmtrain.config.faults import Fault, choices
from llmtrain.config.fields import Path, alternatives, blocks_of, fields_of, find, parts
from llmtrain.config.schema import ShowConfig

BROKEN = "not of the form key=value; quote text that holds any of , : [ ] { } ( ) ' \" like key=\"'a, b'\""


class KeyOverride(NamedTuple):
    """One key set, or with `delete` taken back to its default, on the command line."""

    key: str
    path: Path
    value: Any
    delete: bool
    text: str


@dataclass
class Overrides:
    """The command line, told apart. `groups` maps a group to (option, text); a faulty choice is in `faults` instead."""

    groups: dict[str, tuple[Any, str]] = field(default_factory=dict)
    keys: list[KeyOverride] = field(default_factory=list)
    hydra: list[str] = field(default_factory=list)
    sweeps: list[Override] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    faulty_groups: set[str] = field(default_factory=set)


def for_stage(texts: Sequence[str]) -> list[str]:
    """The command line of `show`: its own keys, and all others as overrides of the stage that it shows."""
    own = [text for text in texts if text.lstrip("+~").split("=")[0] in fields_of(ShowConfig)]
    others = [text for text in texts if text not in own and not text.startswith("hydra")]
    if not others:
        return list(texts)
    quoted = ", ".join('"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"' for text in others)
    return [*(text for text in texts if text not in others), f"overrides=[{quoted}]"]


def _is_text(schema: type, key: str) -> bool:
    annotation, _ = find(schema, parts(key))
    return annotation is not None and alternatives(annotation) == [str]


def _texts(schema: type, key: str, value: str) -> list[str] | None:
    """The items of `[method=ppo, train.steps=3]` for a key that takes a list of text: Hydra wants each in quotes."""
    annotation, _ = find(schema, parts(key))
    if annotation != list[str] or not (value.startswith("[") and value.endswith("]")):
        return None
    items = re.findall(r"(?:[^,\[\](){}'\"]|\[[^\]]*\]|\([^)]*\)|\{[^}]*\}|'[^']*'|\"[^\"]*\")+", value[1:-1])
    return [item.strip() for item in items if item.strip()]


def parse(text: str, schema: type, sweep: bool) -> Override | KeyOverride | Fault:
    """One override: Hydra's parse of it, or the plain text for a key that takes text, or a fault."""
    key, equals, value = text.lstrip("+").partition("=")
    takes_text = bool(equals) and _is_text(schema, key)
    try:
        [override] = OverridesParser.create().parse_overrides([text])
    except HydraException:
        plain = value if takes_text else _texts(schema, key, value) if equals else None
        return Fault("", BROKEN, f"`{text}`") if plain is None else KeyOverride(key, parts(key), plain, False, text)
    if override.value_type is None and not override.is_delete():
        return Fault("", BROKEN, f"`{text}`")
    if override.is_sweep_override():
        return override if sweep or not takes_text else KeyOverride(key, parts(key), value, False, text)
    if takes_text and not isinstance(override.value(), str | None):
        return KeyOverride(key, parts(key), value, False, text)
    return override


def is_group(name: str, schema: type, loader: ConfigLoader) -> bool:
    """Whether `name=` chooses a group's option: a folder of that name is there, and the key is not a plain value."""
    field_here = fields_of(schema).get(name)
    plain = field_here is not None and not blocks_of(field_here.annotation)
    return not plain and bool(loader.get_group_options(name))


def read(texts: Sequence[str], schema: type, loader: ConfigLoader, sweep: bool = False) -> Overrides:
    """All overrides of a command line, with every fault that can be told before composing.

    With `sweep`, several values for one key are kept in `sweeps`; without, they are a fault.
    """
    result = Overrides()
    for text in texts:
        parsed = parse(text, schema, sweep)
        if isinstance(parsed, Fault):
            result.faults.append(parsed)
        elif isinstance(parsed, KeyOverride):
            result.keys.append(parsed)
        else:
            _sort_in(parsed, text, schema, loader, result, sweep)
    return result


def _sort_in(override: Override, text: str, schema: type, loader: ConfigLoader, result: Overrides, sweep: bool) -> None:
    key, origin = override.key_or_group, f"the override {text}"
    value = None if override.is_sweep_override() else override.value()
    if override.is_hydra_override():
        result.hydra.append(text)
    elif override.is_sweep_override() and sweep:
        result.sweeps.append(override)
    elif override.is_sweep_override():
        result.faults.append(
            Fault(key, "several values: a sweep needs -m; one list is written key=[a,b], a text in quotes", origin)
        )
    elif isinstance(value, dict) or not is_group(key, schema, loader):
        name = key if override.package is None else f"{key}@{override.package}"
        result.keys.append(KeyOverride(name, parts(name), value, override.is_delete(), text))
    else:
        name = key if override.package is None else f"{key}@{override.package}"
        result.groups[name] = (None if override.is_delete() else value, text)


def wrong_option(group: str, value: Any, loader: ConfigLoader) -> str:
    """What is wrong with the choice `group=value`, or nothing. Null is a choice: none of the options."""
    options = loader.get_group_options(group.split("@")[0])
    chosen = value if isinstance(value, list) else [value]
    unknown = [str(option) for option in chosen if option is not None and str(option) not in options]
    return f"no option {unknown[0]}{choices(unknown[0], options)}" if unknown else ""


def for_hydra(overrides: Overrides, command: str, schema: type, loader: ConfigLoader, config_name: str) -> list[str]:
    """The group choices as Hydra wants them: `+` for a group that the root's defaults list does not name, else none.

    A choice that cannot be made is added to `overrides.faults` and left out.
    """
    experiment = overrides.groups.get("experiment", (None, ""))[0]
    if not overrides.groups:
        return overrides.hydra
    known = known_groups(loader, config_name, None if wrong_option("experiment", experiment, loader) else experiment)
    texts = []
    for group, (option, text) in overrides.groups.items():
        name = group.split("@")[0].split("/")[0]
        if group not in known and name not in fields_of(schema):
            problem = f"llmtrain {command} has no such group{choices(group, known, 'groups')}"
        else:
            problem = wrong_option(group, option, loader)
        if problem:
            overrides.faults.append(Fault(group, problem, f"the override {text}"))
            overrides.faulty_groups.add(name)
        elif option is None:
            texts += [f"~{group}"] * (group in known)
        else:
            texts.append(f"{'' if group in known else '+'}{group}={_written(option)}")
    return texts + overrides.hydra


def _written(option: Any) -> str:
    return f"[{','.join(map(str, option))}]" if isinstance(option, list) else str(option)


def known_groups(loader: ConfigLoader, config_name: str, experiment: Any) -> set[str]:
    """The groups that the root's defaults list names, with those that the experiment adds."""
    chosen = [] if experiment is None else [f"experiment={_written(experiment)}"]
    try:
        found = loader.compute_defaults_list(config_name, chosen, RunMode.RUN)
    except HydraException:
        found = loader.compute_defaults_list(config_name, [], RunMode.RUN)
    return {group for group in found.overrides.known_choices if not group.startswith("hydra")}
