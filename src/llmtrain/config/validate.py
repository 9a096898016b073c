"""A plain container against the schema: the frozen object, or every fault in words."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from llmtrain.config.faults import nearest, suggestion
from llmtrain.config.fields import (
    Path,
    accepted,
    alternatives,
    below,
    choose,
    defaults,
    entries,
    fields_of,
    find,
    is_block,
    literals,
    tag_of,
)
from llmtrain.config.plain import Finding
from llmtrain.config.schema import AlignConfig, PretrainConfig

# What other programs call these keys.
SYNONYMS = {
    "learning_rate": "optimizer.lr",
    "batch_size": "train.batch_rows",
    "max_steps": "train.steps",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "gradient_clipping": "train.max_grad_norm",
    "num_processes": "engine.processes",
    "dtype": "engine.precision",
    "center_rewards_coefficient": "objective.centring_weight",
}


def validate(schema: type, values: dict[str, Any]) -> tuple[Any, list[Finding]]:
    """The frozen object of `schema`, or None and the findings, one for each faulty key."""
    try:
        # JSON mode is strict on types and yet takes a dict for a dataclass and a list for a tuple.
        return TypeAdapter(schema).validate_json(json.dumps(values)), _not_finite(values, ())
    except ValidationError as error:
        findings = [_finding(schema, values, problem) for problem in error.errors(include_url=False)]
        return None, list({finding.path: finding for finding in findings}.values()) + _not_finite(values, ())


def _not_finite(value: Any, path: Path) -> list[Finding]:
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [finding for key, item in items for finding in _not_finite(item, (*path, str(key)))]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return [Finding(path, f"{value} is no finite number")]
    return []


def _finding(schema: type, values: dict[str, Any], problem: Mapping[str, Any]) -> Finding:
    path = _path(schema, problem["loc"])
    annotation, field = find(schema, path, values)
    if problem["type"] == "unexpected_keyword_argument":
        return Finding(path, f"unknown key{_nearest_key(schema, path, values)}")
    if problem["type"] == "missing":
        return Finding(path, f"needs a value: {accepted(annotation, field)}")
    if problem["type"].startswith("union_tag"):
        names = [tag_of(member) for member in alternatives(annotation)]
        tag = str(problem.get("ctx", {}).get("tag", ""))
        allowed = f"{path[-1]}.name wants {' or '.join(names)}"
        return Finding(path, f"{tag!r}: {allowed}{suggestion(tag, names)}" if tag else allowed)
    return Finding(path, _wrong_value(annotation, field, problem["input"]))


def _wrong_value(annotation: Any, field: Any, value: Any) -> str:
    words = literals(annotation)
    text = f"{_shown(value)} is not allowed; it takes {accepted(annotation, field)}"
    if words and isinstance(value, str):
        return text + suggestion(value, words)
    if isinstance(value, float) and value.is_integer() and int in alternatives(annotation):
        return f"{text}; write {int(value)}"
    if isinstance(value, str) and {int, float} & set(alternatives(annotation)) and _is_number(value):
        return f"{text}; write {value} without quotes"
    return text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    text = json.dumps(value) if isinstance(value, dict | list) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _path(schema: type, location: Iterable[str | int]) -> Path:
    """Pydantic's location without the words it puts in for members of unions: ("method", "dpo", "beta")."""
    annotation: Any = schema
    path: list[str] = []
    for part in location:
        members = alternatives(annotation) if annotation is not None else []
        if len(members) > 1:
            named = [member for member in members if is_block(member) and tag_of(member) == part]
            annotation = named[0] if named else None
        else:
            path.append(str(part))
            annotation, _ = below(annotation, part)
    return tuple(path)


def _nearest_key(schema: type, path: Path, values: Any) -> str:
    """`; did you mean a.b?` from the same block or from anywhere in the schema, else the keys of the block."""
    *above, leaf = path
    keys = [".".join(entry.path) for entry in entries(schema)]
    block, _ = find(schema, tuple(above), values)
    siblings = list(fields_of(choose(block, _at(values, above)))) if block is not None and is_block(block) else []
    elsewhere = [key for key in keys if key.split(".")[-1] == leaf and "<name>" not in key]
    close = nearest(leaf, siblings)
    if not above and "overrides" in siblings and leaf in {*fields_of(PretrainConfig), *fields_of(AlignConfig)}:
        return f", a stage's: overrides=[{leaf}...=VALUE]; the keys here are {', '.join(siblings)}"
    if ".".join(path) in keys:  # a key of another member of the union
        return f"; {'.'.join(above)}={tag_of(choose(block, _at(values, above)))} has the keys {', '.join(siblings)}"
    if SYNONYMS.get(leaf) in keys:
        return f"; did you mean {SYNONYMS[leaf]}?"
    if elsewhere:
        return f"; did you mean {' or '.join(dict.fromkeys(elsewhere[:3]))}?"
    if close:
        return f"; did you mean {'.'.join([*above, close])}?"
    leaves = {key.split(".")[-1]: key for key in reversed(keys) if "<name>" not in key}
    far = nearest(leaf, leaves)
    where = f"{'.'.join(above)} has" if above else "there are"
    return f"; did you mean {leaves[far]}?" if far else f"; {where} the keys {', '.join(siblings)}"


def _at(values: Any, path: Iterable[str]) -> Any:
    for part in path:
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def filled(annotation: Any, value: Any) -> Any:
    """`value` with the defaults of the schema wherever it says nothing."""
    chosen = choose(annotation, value)
    if not isinstance(value, Mapping):
        return value
    if not is_block(chosen):
        return {key: filled(below(chosen, key)[0], item) for key, item in value.items()}
    whole = {**defaults(chosen), **value}
    types = {key: field.annotation for key, field in fields_of(chosen).items()}
    return {key: filled(types[key], item) if key in types else item for key, item in whole.items()}
