"""A composed Hydra config as a plain container, with every value that is missing or cannot be resolved."""

from typing import Any, NamedTuple

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from llmtrain.config.faults import Fault
from llmtrain.config.fields import Path
from llmtrain.config.overrides import KeyOverride


class Finding(NamedTuple):
    """A fault at a path, before it is known where the values came from. `also`: other keys that take part."""

    path: Path
    problem: str
    also: tuple[Path, ...] = ()


def apply(overrides: list[KeyOverride], config: DictConfig) -> list[Fault]:
    """Set the keys in `config`, in place, one after another; a fault for each that cannot be set, and taken out."""
    faults = []
    with open_dict(config):
        for override in list(overrides):
            try:
                problem = _delete(override, config) if override.delete else _set(override, config)
            except (OmegaConfBaseException, ValueError, TypeError, IndexError, AttributeError) as reason:
                problem = f"cannot be set: {str(reason).splitlines()[0]}"
            if problem:
                overrides.remove(override)
                faults.append(Fault(override.key, problem, f"the override {override.text}"))
    return faults


def _set(override: KeyOverride, config: DictConfig) -> str:
    for length in range(1, len(override.path)):
        above = ".".join(override.path[:length])
        node = OmegaConf.select(config, above, throw_on_missing=False)
        if node is not None and not isinstance(node, DictConfig | ListConfig):
            return f"{above} is a single value ({node!r}); it has no keys below it"
    OmegaConf.update(config, override.key, override.value, merge=True, force_add=True)
    return ""


def _delete(override: KeyOverride, config: DictConfig) -> str:
    node: Any = config
    for part in override.path[:-1]:
        node = node.get(part) if isinstance(node, DictConfig) else None
    if not isinstance(node, DictConfig) or override.path[-1] not in node:
        return "nothing to take back: no file sets it"
    del node[override.path[-1]]
    return ""


def plain(config: DictConfig) -> tuple[dict[str, Any], list[Finding]]:
    """The resolved values, without those that are missing or fail to resolve: these are the findings."""
    findings: list[Finding] = []
    values = _block(config, (), findings)
    values.pop("defaults", None)
    return values, findings


def _block(node: DictConfig, path: Path, findings: list[Finding]) -> dict[str, Any]:
    keys = [] if node._is_none() else list(node)
    found = {str(key): _value(node, key, (*path, str(key)), findings) for key in keys}
    return {key: value for key, value in found.items() if value is not _MISSING}


def _value(node: Any, key: Any, path: Path, findings: list[Finding]) -> Any:
    if OmegaConf.is_missing(node, key):
        findings.append(Finding(path, f"needs a value: {'.'.join(path)}=..."))
        return _MISSING
    try:
        value = node[key]
    except OmegaConfBaseException as reason:
        findings.append(Finding(path, f"cannot be resolved: {str(reason).splitlines()[0]}"))
        return _MISSING
    if isinstance(value, DictConfig):
        return _block(value, path, findings)
    if isinstance(value, ListConfig):
        items = [_value(value, index, (*path, str(index)), findings) for index in range(len(value))]
        return [item for item in items if item is not _MISSING]
    return value


_MISSING = object()
