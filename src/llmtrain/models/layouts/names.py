"""Tensors from our names to a layout's and back, by its rules; no bit of a tensor changes."""

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from llmtrain.config.schema import ModelConfig
from llmtrain.models.layouts.table import Layout, Rule

Shapes = Mapping[str, tuple[int, ...]]


def their_shapes(layout: Layout, config: ModelConfig, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the layout of tensors that have these names and shapes here."""
    theirs: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        names, rule = _their_names(layout, name)
        one = shape[1:] if rule.stacked else shape
        for parts in _by_expert(config, rule, names):
            for part, rows in zip(parts, _rows(config, parts, one), strict=True):
                split = (rows, *one[1:])
                theirs[part] = split[::-1] if rule.transposed else split
    return theirs


def their_parts(layout: Layout, config: ModelConfig, module: str, rows: int) -> dict[str, int]:
    """The modules that a module of ours with so many rows is in the layout, and the rows of each, in their order."""
    names, _ = _their_names(layout, f"{module}.weight")
    parts = zip(names, _rows(config, names, (rows,)), strict=True)
    return {name.removesuffix(".weight"): part_rows for name, part_rows in parts}


def to_theirs(layout: Layout, config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors by the layout's names, contiguous and on the CPU, each with memory of its own."""
    return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in their_tensors(layout, config, state)}


def their_tensors(layout: Layout, config: ModelConfig, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The layout's names, each with its part of our tensor where that lies: a view, unless rows change their order."""
    for name, tensor in state.items():
        names, rule = _their_names(layout, name)
        tensor = in_their_order(layout, config, name, tensor.detach())
        for parts, one in zip(_by_expert(config, rule, names), tensor if rule.stacked else [tensor], strict=True):
            values = one.split(_rows(config, parts, tuple(one.shape)))
            for part, value in zip(parts, values, strict=True):
                yield part, value.T if rule.transposed and value.ndim == 2 else value


def in_their_order(layout: Layout, config: ModelConfig, name: str, rows: Tensor) -> Tensor:
    """The rows [O, ...] of a tensor of ours, or as many that belong to them, in the layout's order."""
    _, rule = _their_names(layout, name)
    return rows[_grouped_rows(config).to(rows.device)] if rule.grouped else rows


def to_ours(layout: Layout, config: ModelConfig, names: list[str], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of these names of ours, float32, each with memory of its own."""
    state: dict[str, Tensor] = {}
    for name in names:
        parts, rule = _their_names(layout, name)
        each = [_one_of_ours(config, rule, [theirs[part] for part in own]) for own in _by_expert(config, rule, parts)]
        state[name] = torch.stack(each) if rule.stacked else each[0]
    return state


def _one_of_ours(config: ModelConfig, rule: Rule, theirs: list[Tensor]) -> Tensor:
    values = [value.T if rule.transposed and value.ndim == 2 else value for value in theirs]
    if rule.grouped:
        values = [values[0][_grouped_rows(config).argsort()]]
    return torch.cat(values).float() if len(values) > 1 else _own_float(values[0])


def _own_float(tensor: Tensor) -> Tensor:
    # A copy always: tensors of a safetensors file are windows onto the file.
    return tensor.to(torch.float32, copy=True).contiguous()


def _their_names(layout: Layout, name: str) -> tuple[list[str], Rule]:
    module, _, leaf = name.rpartition(".")
    layer = re.search(r"\.blocks\.(\d+)\.", name)
    pattern = re.sub(r"\.blocks\.\d+\.", ".blocks.{i}.", module)
    rule = next((rule for rule in layout.rules if rule.ours == pattern), Rule(pattern, (pattern,)))
    return [f"{part.replace('{i}', layer[1] if layer else '')}.{leaf}" for part in rule.theirs], rule


def _by_expert(config: ModelConfig, rule: Rule, names: list[str]) -> list[list[str]]:
    """The names of each expert's parts; of what is no stack, the names as they are."""
    if not rule.stacked:
        return [names]
    assert config.experts is not None, "a family with a stack of experts is written for no other architecture"
    return [[name.replace("{e}", str(expert)) for name in names] for expert in range(config.experts.num_experts)]


def _rows(config: ModelConfig, names: list[str], shape: tuple[int, ...]) -> list[int]:
    """How many rows of our tensor each of their parts has: all, query/key/value, or gate/up."""
    if len(names) == 1:
        return [shape[0]]
    if len(names) == 2:
        return [shape[0] // 2] * 2
    key = config.kv_heads * config.head_size
    return [shape[0] - 2 * key, key, key]


def _grouped_rows(config: ModelConfig) -> Tensor:
    """Which of our rows of queries, keys and values stands in each row of theirs: queries, key and value by group."""
    kv_heads = config.kv_heads
    heads = torch.arange(config.num_heads + 2 * kv_heads)
    queries, keys, values = heads.split((config.num_heads, kv_heads, kv_heads))
    order = torch.cat((queries.view(kv_heads, -1), keys[:, None], values[:, None]), dim=1).flatten()
    return (order[:, None] * config.head_size + torch.arange(config.head_size)).flatten()
