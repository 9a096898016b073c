"""Combinations of keys of adapters that do not fit together, or of which one has no effect; see `checks.py`."""

import re
from collections.abc import Callable, Iterator

from llmtrain.config.plain import Finding
from llmtrain.config.view import View, finding, no_effect


def weights_to_adapt(view: View) -> Iterator[Finding]:
    """Adapters stand beside weights that are there."""
    if view.command != "pretrain" or view["model.init_from"] is not None:
        return
    yield from no_effect(view, "model.adapter_from", "name the weights that it belongs to with model.init_from")
    if view["adapter.name"] != "none":
        yield finding("random weights are nothing to adapt: name some with model.init_from", "adapter.name")


def adapter_dropout(view: View) -> Iterator[Finding]:
    """Alignment is without dropout."""
    if view.command == "align":
        why = "align is without dropout: policy and reference are one at the start"
        yield from no_effect(view, "adapter.dropout", why)


def adapter_patterns(view: View) -> Iterator[Finding]:
    """Modules are named by regular expressions, at least one."""
    for key in ("adapter.targets", "adapter.also_train"):
        for pattern in view[key]:
            try:
                re.compile(pattern)
            except re.error as problem:
                yield finding(f"{pattern!r} is no regular expression: {problem}", key)
    if not view["adapter.targets"]:
        yield finding("needs at least one module, such as attention.qkv", "adapter.targets")


ADAPTER_CHECKS: tuple[Callable[[View], Iterator[Finding]], ...] = (weights_to_adapt, adapter_dropout, adapter_patterns)
