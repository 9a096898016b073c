"""`llmtrain COMMAND --help`: every key with its value, type and meaning, from the schema."""

import inspect
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_origin

import yaml
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from llmtrain.config import schema
from llmtrain.config.commands import COMMANDS
from llmtrain.config.fields import accepted, blocks_of, default, fields_of, meaning, tag_of
from llmtrain.config.folders import options, packaged_configs, user_folders

FLAGS = """\
flags
  --cfg job                     print the whole config, checked, with all defaults, and stop; -p KEY prints a part
  -m, --multirun                several values (optimizer.lr=1e-3,1e-4) make several runs: run/NUMBER-WHAT_DIFFERS
  --config-dir DIR              search DIR for YAML first; ./configs is searched before the packaged files anyway
  --config-name NAME            another root file than the command's own
  --cfg hydra|all, --info [WHAT]   what Hydra composed, and from where"""


def command_help(command: str, values: Mapping[str, Any], config_dirs: Sequence[str] = ()) -> str:
    """The help of one command; `values` are the defaults to show, where they are more than the schema's."""
    about = COMMANDS[command]
    kind = getattr(schema, about.schema)
    root = _read(_root_file(command, config_dirs))
    lines = [f"llmtrain {command}: {about.summary}", ""]
    lines += [f"usage: llmtrain {command} [key=value ...] [group=option ...] [flags]", "", "examples"]
    lines += [f"  {example}" for example in about.examples]
    lines += ["", *_groups(root, user_folders(config_dirs))]
    lines += ["keys: key = default (what it takes)", *_keys(kind, values, ""), "", FLAGS]
    return "\n".join(lines)


def _root_file(command: str, config_dirs: Sequence[str]) -> Path:
    folders = [*map(Path, user_folders(config_dirs)), packaged_configs()]
    return next(folder / f"{command}.yaml" for folder in folders if (folder / f"{command}.yaml").is_file())


def _read(file: Path) -> dict[str, Any]:
    with file.open(encoding="utf-8") as stream:
        return yaml.safe_load(stream) or {}


def _groups(root: Mapping[str, Any], folders: Sequence[str]) -> Iterator[str]:
    """The groups of the root's defaults list, with their options."""
    yield "groups: group=option, a YAML file in configs/GROUP/; * is the default"
    for item in root.get("defaults", []):
        if not isinstance(item, Mapping) or any("override" in str(key) for key in item):
            continue
        for key, chosen in item.items():
            name = str(key).split("/")[-1]
            words = [f"{option}*" if option == chosen else option for option in options(name, folders)]
            text = textwrap.fill(", ".join(words), 118, initial_indent=" " * 14, subsequent_indent=" " * 14)
            yield f"  {name:<12}{text.lstrip()}"
    yield ""


def _keys(kind: type, values: Any, prefix: str) -> Iterator[str]:
    """The plain keys of a block first, then its blocks with a heading each."""
    values = values if isinstance(values, Mapping) else {}
    blocks = {key: field for key, field in fields_of(kind).items() if blocks_of(field.annotation)}
    for key, field in fields_of(kind).items():
        if key not in blocks:
            yield from _key(f"{prefix}{key}", field, values.get(key, PydanticUndefined), meaning(kind, key))
    for key, field in blocks.items():
        members, inner = blocks_of(field.annotation), values.get(key)
        name = f"{prefix}{key}" + (".<name>" if get_origin(field.annotation) is dict else "")
        for member in members:
            chosen = len(members) == 1 or (isinstance(inner, Mapping) and inner.get("name") == tag_of(member))
            title = name if len(members) == 1 else f"{name}={tag_of(member)}"
            yield from ("", f"{title}: {meaning(kind, key) or inspect.getdoc(member)}")
            yield from _keys(member, inner if chosen else None, f"{name}.")


def _key(key: str, field: FieldInfo, value: Any, text: str) -> Iterator[str]:
    value = default(field) if value is PydanticUndefined else value
    shown = "must be given" if value is PydanticUndefined else _shown(value)
    yield f"  {key} = {shown}   ({accepted(field.annotation, field)})"
    yield textwrap.fill(text, 118, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _shown(value: Any) -> str:
    return str(yaml.safe_dump(value, default_flow_style=True, width=1000)).removesuffix("\n...\n").strip()
