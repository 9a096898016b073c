"""How processes share out the work: meshes that cannot be, and parts of models that cannot be shared out so."""

import os
from collections.abc import Callable, Iterator, Mapping

from llmtrain.config.errors import ConfigError
from llmtrain.config.plain import Finding
from llmtrain.config.process_mesh import SAME_ROWS, MeshShape, mesh_shape
from llmtrain.config.schema import EngineConfig
from llmtrain.config.view import NotValid, View, finding, no_effect


def num_processes(view: View) -> int:
    """Of the whole run: as many as a launcher has started, or as are to be."""
    return int(os.environ.get("WORLD_SIZE", view["engine.processes"]))


def _engine(view: View) -> EngineConfig:
    """What there is of it at the top; the groups in it say nothing of processes."""
    return EngineConfig(**{name: each for name, each in view["engine"].items() if not isinstance(each, Mapping)})


def _mesh(view: View) -> MeshShape:
    try:
        return mesh_shape(_engine(view), num_processes(view))
    except ConfigError as problem:
        raise NotValid("engine") from problem


def data_processes(view: View) -> int:
    """How many processes, or groups of them, take different rows."""
    return _mesh(view).data


def launched(view: View) -> Iterator[Finding]:
    """A launcher counts the processes itself."""
    if "WORLD_SIZE" in os.environ and view["engine.processes"] != 1:
        problem = "leave at 1 here: a launcher (WORLD_SIZE is set) has started the processes already"
        yield finding(problem, "engine.processes")


def mesh(view: View) -> Iterator[Finding]:
    """The dimensions divide the processes."""
    keys = [f"engine.{name}" for name in (*SAME_ROWS, "expert_parallel", "shard_processes") if view[f"engine.{name}"]]
    try:
        mesh_shape(_engine(view), num_processes(view))
    except ConfigError as problem:
        changed = [key for key in keys if view.changed(key)]
        yield finding(str(problem), *changed, "engine.processes")


def sharding(view: View) -> Iterator[Finding]:
    """Sharding needs several processes that take different rows; hsdp has both sharding and replicas."""
    kind, shard = view["engine.sharding"], view["engine.shard_processes"]
    if kind != "hsdp":
        why = f"engine.sharding={kind} has no replicas of what is sharded; hsdp has"
        yield from no_effect(view, "engine.shard_processes", why, "engine.sharding")
    if kind == "hsdp" and shard is None:
        yield finding("needs a value: how many processes share one copy of the model", "engine.shard_processes")
    data = data_processes(view)
    if kind != "ddp" and data == 1:
        among = "processes" if num_processes(view) == 1 else "processes that take different rows"
        problem = f"has no effect: {kind} shards over {among} and there is one; set engine.processes or use torchrun"
        yield finding(problem, "engine.sharding", "engine.processes")
    elif kind == "hsdp" and shard == data:
        problem = f"has no effect: {shard} are all processes that take different rows; use engine.sharding=fsdp"
        yield finding(problem, "engine.shard_processes", "engine.sharding")


def cpu_offload(view: View) -> Iterator[Finding]:
    """What is sharded can rest elsewhere than on the GPU."""
    key = "engine.cpu_offload"
    if view[key] and view["engine.device"] == "cpu":
        yield finding("has no effect: the CPU's memory holds everything already", key, "engine.device")
    if view[key] and view["engine.sharding"] == "ddp":
        yield finding("goes with engine.sharding=fsdp or hsdp; ddp shards nothing", key, "engine.sharding")


def _knows_architecture(view: View) -> bool:
    return view.command == "pretrain" and view["model.init_from"] is None


def tensor_parallel(view: View) -> Iterator[Finding]:
    """Heads and inner sizes are shared out evenly; some parts are not shared out."""
    key, size = "engine.tensor_parallel", view["engine.tensor_parallel"]
    if size == 1:
        return
    if view["adapter.name"] != "none":
        yield finding("adapters are not shared out: leave one of them away", key, "adapter")
    if view["engine.sharding"] == "ddp" and data_processes(view) > 1:
        problem = "with processes that take different rows it goes with engine.sharding=fsdp or hsdp, not with ddp"
        yield finding(problem, key, "engine.sharding")
    if not _knows_architecture(view):
        return
    heads = view["model.num_heads"]
    divided = {
        "model.num_heads": heads, "model.num_kv_heads": view["model.num_kv_heads"] or heads,
        "model.ffn_hidden_size": view["model.ffn_hidden_size"] or size,
    }  # fmt: skip
    for name, number in divided.items():
        if number % size:
            yield finding(f"{size} does not divide {name}={number}", key, name)
            break
    yield from _not_shared_out(view, key)


def _not_shared_out(view: View, key: str) -> Iterator[Finding]:
    parts = {
        "model.positions": (view["model.positions"] in ("alibi", "relative"), "their biases belong to single heads"),
        "model.qk_norm": (view["model.qk_norm"] == "full", "it is over the heads of all processes"),
        "model.attention_sinks": (view["model.attention_sinks"], "they belong to single heads"),
        "model.dropout": (view["model.dropout"] > 0, "heads of different processes would drop the same"),
        "model.experts": (view["model.experts"] is not None, "experts go with engine.expert_parallel"),
    }
    for name, (present, why) in parts.items():
        if present:
            value = "" if name == "model.experts" else f"={view[name]}"
            yield finding(f"does not go with {name}{value}: {why}", key, name)


def expert_parallel(view: View) -> Iterator[Finding]:
    """There are experts, as many on each process, and nothing else shares out the same rows."""
    key, size = "engine.expert_parallel", view["engine.expert_parallel"]
    if size == 1:
        return
    for name in SAME_ROWS:
        if view[f"engine.{name}"] > 1:
            yield finding(f"does not go with engine.{name}: leave one of them at 1", key, f"engine.{name}")
    if not _knows_architecture(view):
        return
    if view["model.experts"] is None:
        yield finding("has no effect: the model has no experts", key, "model.experts")
    elif view["model.experts.num_experts"] % size:
        number = view["model.experts.num_experts"]
        yield finding(f"{size} does not divide model.experts.num_experts={number}", key, "model.experts.num_experts")


LAYOUT_CHECKS: tuple[Callable[[View], Iterator[Finding]], ...] = (
    launched, mesh, sharding, cpu_offload, tensor_parallel, expert_parallel,
)  # fmt: skip
