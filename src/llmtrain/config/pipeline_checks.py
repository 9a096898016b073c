"""Pipelines: what cannot go through one, and steps that are not cut into enough micro-batches for one."""

import math
from collections.abc import Callable, Iterator

from llmtrain.config.layout_checks import data_processes
from llmtrain.config.method_checks import SAMPLING
from llmtrain.config.plain import Finding
from llmtrain.config.view import View, finding, no_effect

KEY, SCHEDULE = "engine.pipeline_parallel", "engine.pipeline_schedule"
# Why a model cannot be divided by layers, by a key and its value.
INDIVISIBLE = {
    ("model.architecture", "encoder_decoder"): "all layers of a decoder beside an encoder read the encoder's states",
    ("model.positions", "relative"): "its biases are shared by all layers",
}


def pipeline(view: View) -> Iterator[Finding]:
    """What does not go with a pipeline."""
    if view[KEY] == 1:
        yield from no_effect(view, SCHEDULE, f"there is no pipeline; set {KEY}")
        return
    for name in ("context_parallel", "tensor_parallel", "expert_parallel"):
        if view[f"engine.{name}"] > 1:
            yield finding(f"does not go with engine.{name}: leave one of them at 1", KEY, f"engine.{name}")
    if view["engine.sharding"] != "ddp":
        problem = "each process of a pipeline holds its layers whole: use engine.sharding=ddp"
        yield finding(problem, KEY, "engine.sharding")
    if view["engine.compile"] is True:
        yield finding("the stages of a pipeline are not compiled: set it to auto or false", "engine.compile", KEY)
    if view["adapter.name"] != "none":
        yield finding("adapters are not divided by layers: leave one of them away", KEY, "adapter.name")


def sampled(view: View) -> Iterator[Finding]:
    """A pipeline writes no answers while it learns."""
    if view[KEY] > 1 and view["method.name"] in SAMPLING:
        problem = f"does not go with method={view['method.name']}, which samples answers while it trains"
        yield finding(problem, KEY, "method.name")


def layers(view: View) -> Iterator[Finding]:
    """A new model can be divided by layers, and has enough of them."""
    size, schedule = view[KEY], view[SCHEDULE]
    if size == 1 or view.command != "pretrain" or view["model.init_from"] is not None:
        return
    for (key, value), why in INDIVISIBLE.items():
        if view[key] == value:
            yield finding(f"does not go with {key}={value}: {why}", KEY, key)
    if view["model.experts"] is not None:
        yield finding("does not go with experts, whose auxiliary losses are made of all layers", KEY, "model.experts")
    stages = 2 * size if schedule == "interleaved" else size
    if view["model.num_layers"] < stages:
        problem = f"{size} with {SCHEDULE}={schedule} makes {stages} stages, and there are fewer layers"
        yield finding(f"{problem}: model.num_layers={view['model.num_layers']}", KEY, "model.num_layers")


def micro_batches(view: View) -> Iterator[Finding]:
    """A step is cut into as many micro-batches as keep all stages at work."""
    size, key = view[KEY], "train.micro_batch_rows"
    if size == 1:
        return
    if view.command == "pretrain":
        tokens, length = view["train.batch_tokens"], view["train.sequence_length"]
        rows = None if tokens is None else tokens // length
    else:
        rows = view["train.batch_rows"]
    if rows is None or rows % data_processes(view):
        return
    rows //= data_processes(view)
    if view[key] == "auto":
        yield finding("auto finds the rows that memory suffices for, not those that keep stages at work", key, KEY)
        return
    portions = math.ceil(rows / (view[key] or rows))
    if portions < size:
        problem = f"{rows} rows are {portions} micro-batches, and a pipeline of {size} wants {size} at least"
        yield finding(f"{problem}: set it to {rows // size} or lower" if rows >= size else problem, key, KEY)
    elif view[SCHEDULE] == "interleaved" and portions % size:
        problem = f"{rows} rows are {portions} micro-batches, and {SCHEDULE}=interleaved wants a multiple of {size}"
        yield finding(problem, key, SCHEDULE)


PIPELINE_CHECKS: tuple[Callable[[View], Iterator[Finding]], ...] = (pipeline, sampled, layers, micro_batches)
