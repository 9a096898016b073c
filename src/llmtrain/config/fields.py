"""Questions about the schema: which keys there are, what they accept, what they default to.

A path is a tuple of key parts as written in YAML: ("optimizer", "lr"). Fields go by their alias (`_target_`).
"""

import re
import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

Path = tuple[str, ...]

NOUNS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


class Entry(NamedTuple):
    """One key of a schema; `block` is true where further keys lie below it."""

    path: Path
    field: FieldInfo
    block: bool


def parts(key: str) -> Path:
    """`a.b[0]` as ("a", "b", "0")."""
    return tuple(part for part in re.split(r"[.\[\]]+", key) if part)


def fields_of(schema: type) -> dict[str, FieldInfo]:
    """The fields of a schema class by the names used in YAML."""
    fields: dict[str, FieldInfo] = schema.__pydantic_fields__  # type: ignore[attr-defined]
    return {field.alias or name: field for name, field in fields.items()}


def meaning(schema: type, key: str) -> str:
    """The doc string of a field, also of an inherited one (pydantic reads those of the class itself only)."""
    inherited = (base for base in schema.__mro__ if hasattr(base, "__pydantic_fields__"))
    found = (fields_of(base)[key].description for base in inherited if key in fields_of(base))
    return next((text for text in found if text), "")


def alternatives(annotation: Any) -> list[Any]:
    """The members of a union without None; a plain type is its only member."""
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return [member for member in members if member is not type(None)]


def is_block(annotation: Any) -> bool:
    """Whether a value of this type is a block of keys."""
    return all(hasattr(member, "__pydantic_fields__") for member in alternatives(annotation))


def blocks_of(annotation: Any) -> list[type]:
    """The blocks below a key, also those that the user names (`data.sources.<name>`); none for a plain value."""
    members = [get_args(annotation)[1]] if get_origin(annotation) is dict else alternatives(annotation)
    return [member for member in members if member is not Any and is_block(member)]


def tag_of(schema: type) -> str:
    """The `name` that selects this class among the members of a union (method: dpo, ppo)."""
    return str(fields_of(schema)["name"].default)


def choose(annotation: Any, value: Any) -> Any:
    """The member of a union that `value` selects by its `name`; the first where it selects none."""
    members = alternatives(annotation)
    name = value.get("name") if isinstance(value, Mapping) else None
    named = [member for member in members if len(members) > 1 and is_block(member) and tag_of(member) == name]
    return (named or members)[0]


def below(annotation: Any, key: str | int, value: Any = None) -> tuple[Any, FieldInfo | None]:
    """The type (and the field, in a block) that `key` has inside a value of type `annotation`; (None, None) if none."""
    if annotation is None:
        return None, None
    chosen = choose(annotation, value)
    if is_block(chosen):
        field = fields_of(chosen).get(str(key))
        return (field.annotation, field) if field else (None, None)
    arguments = get_args(chosen)
    if get_origin(chosen) is dict:
        return arguments[1], None
    return (arguments[0], None) if get_origin(chosen) in (list, tuple) else (None, None)


def find(schema: type, path: Path, values: Any = None) -> tuple[Any, FieldInfo | None]:
    """The type and field at a path; `values` decide between the members of a union. (None, None) if no such key."""
    annotation: Any = schema
    field: FieldInfo | None = None
    for part in path:
        annotation, field = below(annotation, part, values)
        values = values.get(part) if isinstance(values, Mapping) else None
    return annotation, field


def entries(schema: type, prefix: Path = ()) -> Iterator[Entry]:
    """All keys of a schema, depth first; `<name>` stands for the keys that the user names."""
    for key, field in fields_of(schema).items():
        path = (*prefix, key)
        inner = blocks_of(field.annotation)
        path = (*path, "<name>") if inner and get_origin(field.annotation) is dict else path
        yield Entry(path, field, bool(inner))
        for member in inner:
            yield from entries(member, path)


def default(field: FieldInfo) -> Any:
    """The default as a plain value (blocks as dicts); `PydanticUndefined` for a field that must be given."""
    value = field.get_default(call_default_factory=True, validated_data={})
    if hasattr(value, "__pydantic_fields__"):
        return defaults(type(value))
    return list(value) if isinstance(value, tuple) else value


def defaults(schema: type) -> dict[str, Any]:
    """All defaults of a schema as a plain dict, fields without a default left out."""
    found = {key: default(field) for key, field in fields_of(schema).items()}
    return {key: value for key, value in found.items() if value is not PydanticUndefined}


def accepted(annotation: Any, field: FieldInfo | None = None) -> str:
    """What a value of this type may be, in words: "a whole number >= 1, or null"."""
    words = [_accepted(member) for member in alternatives(annotation)]
    limits = [
        f"{sign} {limit if isinstance(limit, int) else format(limit, 'g')}"
        for item in (field.metadata if field else [])
        for name, sign in BOUNDS.items()
        if (limit := getattr(item, name, None)) is not None
    ]
    text = " or ".join(dict.fromkeys(words)) + (" " + " and ".join(limits) if limits else "")
    return text + (", or null" if type(None) in get_args(annotation) else "")


def _accepted(member: Any) -> str:
    origin, arguments = get_origin(member), get_args(member)
    if origin is Literal:
        return (", ".join(map(str, arguments[:-1])) + " or " if len(arguments) > 1 else "") + str(arguments[-1])
    if origin is tuple:
        return f"[{', '.join(NOUNS[argument] for argument in arguments)}]"
    if origin is list:
        return f"a list of {_accepted(arguments[0])}"
    if origin is dict:
        return "a block of named entries" + (
            f", each with {_keys(arguments[1])}" if hasattr(arguments[1], "__pydantic_fields__") else ""
        )
    if hasattr(member, "__pydantic_fields__"):
        return f"a block with {_keys(member)}"
    return NOUNS.get(member, "any value")


def _keys(schema: type) -> str:
    return "the keys " + ", ".join(fields_of(schema))


def literals(annotation: Any) -> list[str]:
    """The words that a value of this type may be."""
    members = [member for member in alternatives(annotation) if get_origin(member) is Literal]
    return [str(word) for member in members for word in get_args(member)]
