"""Processes: where this one stands, how the model is spread over all of them, and how they agree on numbers.

torch does the parallel work (`DistributedDataParallel`, `fully_shard`), on CPU processes (gloo) as on GPUs, so the
same code is tested where there is no GPU. accelerate tells how the process was started: `engine.processes=`,
`torchrun` and `accelerate launch` all arrive here as environment variables.
"""

import contextlib
import dataclasses
import datetime
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import ProcessExitedException, start_processes
from torch.nn.parallel import DistributedDataParallel

from llmtrain.config.errors import ConfigError, Preempted, UserError
from llmtrain.engine.memory import keep_freed_memory


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where this process stands among all processes of the run."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0


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


def be_deterministic() -> None:
    """From here on, use only algorithms that give the same bits each time; others raise. Before the first of the GPU.

    Memory that is not written yet stays as it is: what reads it would be a fault of ours, and filling it costs time.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)


def launched_by_others() -> bool:
    """Whether a launcher (torchrun, accelerate launch, ours) started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def goes_first() -> bool:
    """Whether this process is the run's main one, as its launcher numbered it; known before they have joined."""
    return int(os.environ.get("RANK", "0")) == 0


def launch(function: Callable[..., Any], arguments: tuple[Any, ...], processes: int) -> None:
    """Run `function(*arguments)` in `processes` new processes on this machine; the first failure ends all.

    Raises what ended the process that failed first: its UserError or OSError, else RuntimeError with its traceback.
    """
    # how it stops the others is of no interest
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    failures = multiprocessing.get_context("spawn").SimpleQueue()
    arguments_of_all = (function, arguments, processes, _free_port(), failures)
    running = start_processes(_run_as, arguments_of_all, nprocs=processes, join=False, start_method="spawn")
    try:
        with _handed_on([each.pid for each in running.processes]) as signals:
            while not running.join():
                pass
    except ProcessExitedException as ended:
        failure = None if failures.empty() else failures.get()
        killed = [number for number, each in enumerate(running.processes) if each.exitcode == -signal.SIGKILL]
        if isinstance(failure, UserError) or (failure and not killed):
            raise failure from None
        if signal.SIGTERM in signals:
            raise Preempted("stopped by SIGTERM before training had begun. The same command begins again.") from None
        # it had no time to say why; what the others said is only that they lost it
        number, reason = (killed[0], "SIGKILL") if killed else (ended.error_index, f"exit code {ended.exit_code}")
        raise UserError(
            f"process {number} of {processes} was ended from outside ({reason}); the others were stopped. "
            "Was there too little memory? The same command goes on from the last checkpoint."
        ) from None


# Where a process that `launch` has started puts what ended it.
_failures: Any = None


def tell_launcher(error: UserError) -> None:
    """Say why this process is about to end, from any of its threads: `launch` raises it; without, it is printed."""
    if _failures is not None:
        _failures.put(error)
    else:
        print(f"error: {error}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _handed_on(processes: list[int]) -> Iterator[set[int]]:
    """Within, what a scheduler tells this process is told to all that it started; the signals that came."""
    came: set[int] = set()

    def hand_on(number: int, frame: FrameType | None) -> None:
        came.add(number)
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run_as(
    rank: int, function: Callable[..., Any], arguments: tuple[Any, ...], processes: int, port: int, failures: Any
) -> None:
    """What a new process does. Failures reach the parent in the order in which they happen: the cause comes first."""
    global _failures
    _failures = failures
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        function(*arguments)
        leave()
    except Exception as error:
        seen = f"in process {rank}:\n{traceback.format_exc()[-20_000:]}"
        if isinstance(error, OSError):
            error.add_note(seen)
        failures.put(error if isinstance(error, UserError | OSError) else RuntimeError(seen))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # at once: taking leave of the others in good order could wait for them for ever


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def as_launched() -> Iterator[None]:
    """Within, the environment says where this process stands even if no launcher has set it: alone, that is."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    added = {name: value for name, value in alone.items() if name not in os.environ}
    os.environ |= added
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def spread(model: nn.Module, layout: Layout, sharding: Literal["ddp", "fsdp"]) -> nn.Module:
    """Replicate (DDP) or shard (FSDP2) a model over all processes; alone, it stays as it is.

    The units of sharding are the elements of every `nn.ModuleList` (the blocks), each submodule that holds such a
    list, and the whole.
    """
    model.to(layout.device)
    if layout.world == 1:
        return model
    if sharding == "ddp":
        # buffers are the same everywhere by construction: sending them at each pass would be for nothing
        return DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
    mesh = init_device_mesh(layout.device.type, (layout.world,))
    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList):
            for block in module:
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


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
    """The sum of `value` over all processes."""
    if layout.world > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def largest(value: Tensor, layout: Layout) -> Tensor:
    """The largest of `value` over all processes, element by element."""
    if layout.world > 1:
        value = value.clone()
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


def agree(value: Any, layout: Layout) -> Any:
    """The main process's `value`, on every process."""
    if layout.world == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gathered(values: Sequence[Any], layout: Layout) -> list[Any]:
    """The values of all processes, in the order of processes, on every one of them."""
    if layout.world == 1:
        return list(values)
    boxes: list[Any] = [None] * layout.world
    dist.all_gather_object(boxes, list(values))
    return [value for box in boxes for value in box]


def barrier(layout: Layout) -> None:
    """Wait for all processes."""
    if layout.world > 1:
        dist.barrier()


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """The module's whole state, gathered from its shards, detached, on every process."""
    state = bare(module).state_dict()
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach() for name, value in state.items()
    }


def is_sharded(module: nn.Module) -> bool:
    """Whether the module's parameters are spread over processes."""
    return isinstance(module, FSDPModule) or any(isinstance(parameter, DTensor) for parameter in module.parameters())


def num_trained_here(module: nn.Module) -> int:
    """The trained weights that this process holds."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return sum((each.to_local() if isinstance(each, DTensor) else each).numel() for each in trained)


def leave() -> None:
    """Leave the process group, if this process is in one, together with the others."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        PartialState._reset_state()
