"""How the processes of a run stand to each other: the mesh that `engine` asks for, as numbers.

    processes = pipeline x replicate x shard x context x tensor

Processes along `replicate` and `shard` take different rows; along the others they share the work on the same ones.
"""

from typing import NamedTuple

from llmtrain.config.errors import ConfigError
from llmtrain.config.schema import EngineConfig

SAME_ROWS = ("pipeline_parallel", "context_parallel", "tensor_parallel")


class MeshShape(NamedTuple):
    """The size of each dimension of the mesh, the outermost first: neighbours talk most."""

    pipeline: int
    replicate: int
    shard: int
    context: int
    tensor: int

    @property
    def data(self) -> int:
        """How many processes, or groups of them, take different rows."""
        return self.replicate * self.shard


def mesh_shape(engine: EngineConfig, processes: int) -> MeshShape:
    """The mesh of so many processes; raises ConfigError where they cannot be arranged as `engine` says."""
    sizes = {name: getattr(engine, name) for name in SAME_ROWS}
    pipeline, context, tensor = sizes.values()
    if processes % (pipeline * context * tensor):
        product = " x ".join(f"engine.{name}={size}" for name, size in sizes.items() if size > 1)
        raise ConfigError(f"{product} does not divide the number of processes, {processes}")
    data = processes // (pipeline * context * tensor)
    shard = {"ddp": 1, "fsdp": data, "hsdp": engine.shard_processes or data}[engine.sharding]
    for name, size in (("shard_processes", shard), ("expert_parallel", engine.expert_parallel)):
        if data % size:
            raise ConfigError(
                f"engine.{name}={size} does not divide the number of processes that take different rows, {data}"
            )
    return MeshShape(pipeline, data // shard, shard, context, tensor)
