"""Processes: where this one stands, how the model is spread over all of them, and how they agree on numbers.

torch does the parallel work (`DistributedDataParallel`, `fully_shard`), on CPU processes (gloo) as on GPUs, so the
same code is tested where there is no GPU. accelerate tells how the process was started: `engine.processes=`
(`launching.py`), `torchrun` and `accelerate launch` all arrive here as environment variables.
"""

import contextlib
import dataclasses
import datetime
import functools
import inspect
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from llmtrain.config.errors import ConfigError
from llmtrain.config.process_mesh import MeshShape, mesh_shape
from llmtrain.config.schema import EngineConfig, PipelineSchedule
from llmtrain.engine.memory import keep_freed_memory
from llmtrain.engine.pipeline import Divisible, Pipeline, pipeline_of
from llmtrain.engine.row_orders import row_orders, whole


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where this process stands among all processes of the run.

    Of those along the mesh's dimensions `replicate` and `shard` each takes different rows: these are the data
    processes. Those along the other ones work on the same rows, and draw and count the same, but for those along
    `context`: they take different positions of them. With these the data processes are the token processes: each counts
    other tokens, so sums and gradients are over all of them.
    """

    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh | None = None
    """All processes, in the dimensions of `MeshShape`. None: each takes rows of its own and nothing is shared out."""
    data_mesh: DeviceMesh | None = None
    """The data processes that this one is among, in one dimension. None: those are all."""
    token_mesh: DeviceMesh | None = None
    """The token processes that this one is among. None: those are all."""
    pipeline_schedule: PipelineSchedule = "1f1b"
    """The order in which the stages of a pipeline take micro-batches."""
    experts: DeviceMesh | None = None
    """The data processes in two dimensions: those with the same experts, those that share all. None: all have all."""
    cpu_offload: bool = False
    """Whether what is sharded rests in the CPU's memory."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0

    @functools.cached_property
    def data_rank(self) -> int:
        """Which of the different rows this process takes, from 0."""
        if self.mesh is None:
            return self.rank
        return self.mesh["replicate"].get_local_rank() * self.size("shard") + self.mesh["shard"].get_local_rank()

    @property
    def data_world(self) -> int:
        """How many different shares of rows there are."""
        return self.world if self.mesh is None else self.size("replicate") * self.size("shard")

    @functools.cached_property
    def data_group(self) -> dist.ProcessGroup | None:
        """The data processes that this one is among; None where those are all."""
        return None if self.data_mesh is None else self.data_mesh.get_group()

    @property
    def token_rank(self) -> int:
        """Which of the different tokens this process counts, from 0."""
        if self.mesh is None:
            return self.rank
        return self.data_rank * self.size("context") + self.mesh["context"].get_local_rank()

    @property
    def token_world(self) -> int:
        """How many different shares of the tokens there are."""
        return self.data_world * self.size("context")

    @property
    def token_group(self) -> dist.ProcessGroup | None:
        """The token processes that this one is among; None where those are all."""
        return None if self.token_mesh is None else self.token_mesh.get_group()

    def size(self, dimension: str) -> int:
        """How many processes there are along a dimension of the mesh."""
        return 1 if self.mesh is None else self.mesh[dimension].size()


def join(device: Literal["auto", "cpu", "cuda"] = "auto", threads: int | None = None) -> Layout:
    """Join the other processes of this run, if there are any, and say where this process stands.

    Raises ConfigError where there is no GPU for this process.
    """
    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if not on_cpu and local_rank >= gpus:
        raise ConfigError(
            f"engine.device={device}: process {local_rank + 1} of this machine has no GPU of its own ({gpus} in all). "
            "Set engine.device=cpu, or start as many processes as there are GPUs."
        )
    if on_cpu:
        keep_freed_memory()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it chooses a number of threads and says so; the number is set below
        # the others wait that long while the main process prepares data; a process that dies is noticed at once
        state = PartialState(cpu=on_cpu, timeout=datetime.timedelta(days=1))
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    assert state.num_processes == wanted, f"{wanted} processes were started, {state.num_processes} found each other"
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
    if threads or state.num_processes > 1:
        torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // local_world))
    return Layout(state.process_index, state.num_processes, torch.device("cpu") if on_cpu else state.device)


def arrange(layout: Layout, engine: EngineConfig) -> Layout:
    """The same process in the mesh that `engine` asks for; raises ConfigError where so many processes make none."""
    shape = mesh_shape(engine, layout.world)
    if engine.cpu_offload and layout.device.type == "cpu":
        raise ConfigError("engine.cpu_offload: there is no GPU, and the CPU's memory holds everything already.")
    if layout.world == 1:
        return layout
    mesh = init_device_mesh(layout.device.type, tuple(shape), mesh_dim_names=MeshShape._fields)
    data = mesh["replicate", "shard"]._flatten("data") if shape.data < layout.world else None
    tokens = data
    if data is not None and shape.context > 1:
        everywhere = shape.data * shape.context == layout.world
        tokens = None if everywhere else mesh["replicate", "shard", "context"]._flatten("tokens")
    experts = None
    if engine.expert_parallel > 1:
        sizes = (shape.data // engine.expert_parallel, engine.expert_parallel)
        experts = init_device_mesh(layout.device.type, sizes, mesh_dim_names=("same_experts", "experts"))
    return dataclasses.replace(
        layout,
        mesh=mesh,
        data_mesh=data,
        token_mesh=tokens,
        experts=experts,
        pipeline_schedule=engine.pipeline_schedule,
        cpu_offload=engine.cpu_offload,
    )


def be_deterministic() -> None:
    """From here on, use only algorithms that give the same bits each time; others raise. Before the first of the GPU.

    Memory that is not written yet stays as it is: what reads it would be a fault of ours, and filling it costs time.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)


def spread(model: nn.Module, layout: Layout) -> nn.Module:
    """The model with this process's share of what several have together; alone, it stays as it is.

    First modules with `split_tensors`, `split_positions` or `split_experts` keep their part. Then what is left is
    replicated (DDP) over the token processes or sharded (FSDP2) over the data processes. The units of sharding are the
    elements of every `nn.ModuleList` (the blocks), each submodule that holds such a list, and the whole. With both
    replicas and shards, gradients are summed over replicas after they are in shards. In a pipeline, the model keeps
    this process's layers.

    Raises ConfigError for a model that cannot be shared out so.
    """
    model.to(layout.device)
    if layout.mesh is not None and layout.size("pipeline") > 1:
        replicas = layout.data_group if layout.data_world > 1 else None
        group = layout.mesh["pipeline"].get_group()
        Pipeline(cast(Divisible, model), layout.pipeline_schedule, group, layout.device, replicas)
        return model
    if layout.mesh is not None and layout.size("tensor") > 1:
        _split(model, "split_tensors", layout.mesh["tensor"])
    if layout.mesh is not None and layout.size("context") > 1:
        _split(model, "split_positions", layout.mesh["context"])
    if layout.experts is not None:
        _split(model, "split_experts", layout.experts)
    if layout.token_world == 1:
        return model
    shared = {
        name: each for name, each in model.named_parameters()
        if isinstance(each, DTensor) and each.device_mesh == layout.experts
    }  # fmt: skip
    if layout.mesh is None or layout.size("shard") == 1:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(shared))
        # buffers are the same everywhere by construction: sending them at each pass would be for nothing
        known = inspect.signature(DistributedDataParallel).parameters
        # torch 2.11 has the older name alone, 2.13 complains of it
        sync: Any = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
        return DistributedDataParallel(model, process_group=layout.token_group, gradient_as_bucket_view=True, **sync)
    options: dict[str, Any] = {
        "mesh": layout.mesh["shard"] if layout.size("replicate") == 1 else layout.mesh["replicate", "shard"],
        "ignored_params": set(shared.values()),
        "offload_policy": CPUOffloadPolicy() if layout.cpu_offload else OffloadPolicy(),
    }
    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList):
            for block in module:
                fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def _split(model: nn.Module, method: str, mesh: DeviceMesh) -> None:
    parts = [module for module in model.modules() if hasattr(module, method)]
    if not parts:
        raise ConfigError(f"engine: this model has no part that can be shared out by {method.replace('_', 'ting ')}.")
    for part in parts:
        getattr(part, method)(mesh)


def bare(model: nn.Module) -> nn.Module:
    """The model inside a DDP wrapper, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextlib.contextmanager
def gradient_sync(model: nn.Module, now: bool) -> Iterator[None]:
    """Within a step, exchange gradients only in the last micro-batch (DDP); FSDP2 reduces into its shards each time."""
    if isinstance(model, DistributedDataParallel) and not now:
        with model.no_sync():
            yield
    else:
        yield


def total(value: Tensor, layout: Layout) -> Tensor:
    """The sum of `value` over the token processes."""
    if layout.token_world > 1:
        value = value.clone()
        dist.all_reduce(value, group=layout.token_group)
    return value


def largest(value: Tensor, layout: Layout) -> Tensor:
    """The largest of `value` over the token processes, element by element."""
    if layout.token_world > 1:
        value = value.clone()
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=layout.token_group)
    return value


def agree(value: Any, layout: Layout) -> Any:
    """The main process's `value`, on every process."""
    if layout.world == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gathered(values: Sequence[Any], layout: Layout) -> list[Any]:
    """The values of all data processes, in their order, on every one of them."""
    if layout.data_world == 1:
        return list(values)
    boxes: list[Any] = [None] * layout.data_world
    dist.all_gather_object(boxes, list(values), group=layout.data_group)
    return [value for box in boxes for value in box]


def of_every(value: Any, layout: Layout) -> list[Any]:
    """Every process's `value`, data process or not, in the order of ranks, on every one of them."""
    if layout.world == 1:
        return [value]
    values: list[Any] = [None] * layout.world
    dist.all_gather_object(values, value)
    return values


@functools.cache
def group_beside() -> dist.ProcessGroup:
    """All processes once more, on the CPU: what they ask each other here makes no GPU wait. Made once in a run."""
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))


def barrier(layout: Layout) -> None:
    """Wait for all processes."""
    if layout.world > 1:
        dist.barrier()


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """The module's whole state, gathered from its shards, detached, on every process."""
    orders = row_orders(bare(module))
    state = {
        name: (whole(value, orders.get(name)) if isinstance(value, DTensor) else value).detach()
        for name, value in bare(module).state_dict().items()
    }
    pipeline = pipeline_of(module)
    return pipeline.whole(state) if pipeline else state


def is_sharded(module: nn.Module) -> bool:
    """Whether the module's parameters are spread over processes."""
    if isinstance(module, FSDPModule) or pipeline_of(module):
        return True
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def num_trained_here(module: nn.Module) -> int:
    """The trained weights that this process holds."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return sum(local(each).numel() for each in trained)


def local(value: Tensor) -> Tensor:
    """What this process holds of a tensor; changing it changes the tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


def leave() -> None:
    """Leave the process group, if this process is in one, together with the others."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        group_beside.cache_clear()
        PartialState._reset_state()
