"""Pipeline parallelism: each process keeps some of a model's layers, and the micro-batches of a step go through all.

torch's schedules say who computes what when, and send hidden states on and their gradients back
(`torch.distributed.pipelining`). An objective stays what it is, a function of a model and a batch: every process calls
it. On the last stage the model that it is given begins with the hidden states that have come; on the others it ends the
call as soon as the layers of the stage are done. So what a stage needs beside hidden states (tokens, documents) it has
from the batch, which all processes of a pipeline read. What travels is flat and as long as the largest micro-batch's,
for their shapes may differ.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.utils._pytree import tree_map_only

from llmtrain.config.errors import ConfigError
from llmtrain.config.schema import PipelineSchedule

Metrics = dict[str, tuple[Tensor, Tensor]]
Objective = Callable[[nn.Module, Any], tuple[Tensor, Metrics]]

# Huang et al. 2019 (arXiv 1811.06965); Narayanan et al. 2019 (arXiv 1806.03377, section 3.2); with several stages in a
# process Narayanan et al. 2021 (arXiv 2104.04473, section 2.2).
SCHEDULES: dict[str, Any] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, "interleaved": ScheduleInterleaved1F1B}
STAGES_OF_PROCESS = {"gpipe": 1, "1f1b": 1, "interleaved": 2}


class Divisible(Protocol):
    """A model, as a pipeline sees it; its forward takes `layers`, those to go through, and the `hidden` before them."""

    forward: Callable[..., Any]

    @property
    def config(self) -> Any: ...
    @property
    def blocks(self) -> Sequence[nn.Module]: ...
    @property
    def shared_by_ends(self) -> Sequence[Tensor]: ...
    def keep(self, layers: Sequence[range]) -> None: ...
    def parameters(self) -> Iterable[nn.Parameter]: ...


@dataclasses.dataclass
class Portions:
    """What goes through a pipeline in one update."""

    objective: Objective
    micro_batches: Sequence[Any]
    scale: Tensor
    """What the terms of the summed loss are multiplied by."""
    seed: Callable[[int, int], int]
    """Of the draws of a stage in a micro-batch, by their numbers."""
    autocast: Callable[[], AbstractContextManager[Any]]


class Pipeline:
    """The stages of a model, one or several on each process of a group.

    Made from the whole model, of which this process keeps its own layers, in place, as with `fully_shard`: parameters
    keep their names. Outside of `train`, the model's forward is still that of the whole one, without gradients, which
    all processes of the group call together.

    Raises ConfigError where there are fewer layers than stages.
    """

    def __init__(
        self, model: Divisible, schedule: PipelineSchedule, group: dist.ProcessGroup, device: torch.device,
        replicas: dist.ProcessGroup | None = None,
    ) -> None:  # fmt: skip
        self.model, self.schedule, self.group, self.device = model, schedule, group, device
        self.replicas = replicas  # the processes with the same layers, which take other rows
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.hidden_size = int(model.config.hidden_size)
        stages, layers = self.size * STAGES_OF_PROCESS[schedule], len(model.blocks)
        if layers < stages:
            raise ConfigError(
                f"engine.pipeline_parallel={self.size} with engine.pipeline_schedule={schedule} makes {stages} stages, "
                f"and the model has {layers} layers; use fewer processes or another schedule"
            )
        self.layers = [range(n * layers // stages, (n + 1) * layers // stages) for n in range(stages)]
        self.own = range(self.rank, stages, self.size)
        model.keep([self.layers[number] for number in self.own])
        self.compute, model.forward = model.forward, self.forward
        self.traffic = (0, 0)  # what the runner is made for: micro-batches, and numbers that travel for each
        self.runner: Any = None

    @property
    def is_last(self) -> bool:
        """Whether this process has the last stage."""
        return self.rank == self.size - 1

    def forward(self, tokens: Tensor, **options: Any) -> Any:
        """What the whole model makes of tokens, on every process of the group; without gradients."""
        assert not torch.is_grad_enabled(), "a pipeline learns in `train`"
        made: Any = None
        for number in self.own:
            hidden = None
            if number > 0:
                hidden = torch.empty(*tokens.shape, self.hidden_size, dtype=self._dtype, device=self.device)
                dist.recv(hidden, group=self.group, group_src=(number - 1) % self.size)
            made = self.compute(tokens, layers=self.layers[number], hidden=hidden, **options)
            if number + 1 < len(self.layers):
                dist.send(made.to(self._dtype), group=self.group, group_dst=(number + 1) % self.size)
        return self._from_last(made)

    def train(self, portions: Portions) -> list[tuple[Tensor, Metrics]]:
        """Adds the gradients of all micro-batches to this process's parameters.

        What the objective makes of each, on all processes of the group: the summed loss and the metrics, detached.
        """
        numbers = torch.arange(len(portions.micro_batches))
        positions = max(_positions(portions.objective, each) for each in portions.micro_batches)
        traffic = (len(numbers), positions * self.hidden_size)
        if traffic != self.traffic:
            self.traffic, self.runner = traffic, self._make_runner(*traffic)
        self.portions, self.made = portions, list[tuple[Tensor, Metrics]]()
        try:
            self.runner.step(numbers, number=numbers, target=numbers, return_outputs=False)
        except RuntimeError as failure:  # which tells the arguments of the stage that failed; why, tells its cause
            raise failure.__cause__ or failure from None
        self._sum_shared()
        self._average()
        found: list[tuple[Tensor, Metrics]] = self._from_last(self.made)
        return found

    def compute_stage(self, number: int, micro_batch: int, received: Tensor) -> Tensor:
        """One stage's share of one micro-batch: hidden states, flat, or the loss of the last."""
        part = self.portions
        torch.manual_seed(part.seed(number, micro_batch))
        try:
            with part.autocast():
                loss, metrics = part.objective(StageModel(self, number, received), part.micro_batches[micro_batch])
        except HandedOnError as done:
            return F.pad(done.made.flatten().to(self._dtype), (0, self.traffic[1] - done.made.numel()))
        self.made.append(tree_map_only(Tensor, Tensor.detach, (loss, metrics)))
        return (loss * part.scale).sum()

    def counted(self) -> list[nn.Parameter]:
        """This process's parameters, but for those that are counted on the first: over all, each once."""
        again = {id(each) for each in self.model.shared_by_ends} if self.is_last else set()
        return [each for each in self.model.parameters() if id(each) not in again]

    def clip(self, limit: float) -> Tensor:
        """Scales the gradients so that the norm of the whole model's is `limit` at most; returns the norm it was."""
        gradients = [each.grad for each in self.counted() if each.grad is not None]
        square = nn.utils.get_total_norm(gradients).square()
        dist.all_reduce(square, group=self.group)
        norm = square.sqrt()
        nn.utils.clip_grads_with_norm_(self.model.parameters(), limit, norm)
        return norm

    def whole(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of all processes of the group by name, on each of them; of those of one name, the first's."""
        owned: list[Any] = [None] * self.size
        dist.all_gather_object(owned, {name: (each.shape, each.dtype) for name, each in state.items()}, self.group)
        found: dict[str, Tensor] = {}
        for owner, theirs in enumerate(owned):
            for name, (shape, dtype) in theirs.items():
                if name not in found:
                    mine = state[name] if owner == self.rank else torch.empty(shape, dtype=dtype, device=self.device)
                    dist.broadcast(mine, group=self.group, group_src=owner)
                    found[name] = mine
        return found

    def _make_runner(self, micro_batches: int, numbers: int) -> Any:
        """torch's schedule for so many micro-batches and as many numbers that travel; it keeps memory for them."""
        hidden = torch.empty(numbers, dtype=self._dtype, device="meta", requires_grad=True)
        micro_batch, loss = torch.empty(1, dtype=torch.int64, device="meta"), torch.empty((), device="meta")
        last = len(self.layers) - 1
        stages = [
            PipelineStage(
                Stage(self, each), each, len(self.layers), self.device, group=self.group,
                input_args=hidden if each else micro_batch, output_args=loss if each == last else hidden,
            )
            for each in self.own
        ]  # fmt: skip
        return SCHEDULES[self.schedule](
            stages if self.schedule == "interleaved" else stages[0], micro_batches, loss_fn=lambda loss, _: loss,
            scale_grads=False,
        )  # fmt: skip

    def _sum_shared(self) -> None:
        """Gives the first and the last process the sum of their gradients of what both hold."""
        if self.rank not in (0, self.size - 1):
            return
        other = self.size - 1 - self.rank
        for parameter in self.model.shared_by_ends:
            assert parameter.grad is not None
            theirs = torch.empty_like(parameter.grad)
            exchange = [
                dist.P2POp(dist.isend, parameter.grad, group=self.group, group_peer=other),
                dist.P2POp(dist.irecv, theirs, group=self.group, group_peer=other),
            ]
            for work in dist.batch_isend_irecv(exchange):
                work.wait()
            parameter.grad += theirs

    def _average(self) -> None:
        """Makes gradients the mean over the processes with the same layers."""
        if self.replicas is None:
            return
        gradients = [each.grad for each in self.model.parameters() if each.grad is not None]
        for work in [dist.all_reduce(each, group=self.replicas, async_op=True) for each in gradients]:
            work.wait()
        torch._foreach_div_(gradients, dist.get_world_size(self.replicas))

    def _from_last(self, made: Any) -> Any:
        """What the process with the last stage has made, on all."""
        box = [tree_map_only(Tensor, Tensor.cpu, made) if self.is_last else None]
        dist.broadcast_object_list(box, group=self.group, group_src=self.size - 1, device=self.device)
        return tree_map_only(Tensor, lambda each: each.to(self.device), box[0])

    @property
    def _dtype(self) -> torch.dtype:
        return next(iter(self.model.parameters())).dtype


def pipeline_of(module: nn.Module) -> Pipeline | None:
    """The pipeline that a module's layers are in."""
    owner = getattr(vars(module).get("forward"), "__self__", None)
    return owner if isinstance(owner, Pipeline) else None


class Stage(nn.Module):
    """One stage, as torch's schedules call it: with what has come and the number of the micro-batch."""

    def __init__(self, pipeline: Pipeline, number: int) -> None:
        super().__init__()
        self.pipeline, self.number = pipeline, number

    def forward(self, received: Tensor, number: Tensor) -> Tensor:
        return self.pipeline.compute_stage(self.number, int(number), received)


class HandedOnError(Exception):
    """Ends the call of an objective; `made` goes on without it."""

    def __init__(self, made: Tensor) -> None:
        super().__init__()
        self.made = made


class StageModel(nn.Module):
    """The model, as an objective is given it on one stage; `received`: the hidden states before it, flat."""

    def __init__(self, pipeline: Pipeline, number: int, received: Tensor) -> None:
        super().__init__()
        self.pipeline, self.number, self.received = pipeline, number, received

    def forward(self, tokens: Tensor, **options: Any) -> Any:
        """What the model makes of tokens; on a stage before the last, nothing comes back."""
        whole, hidden = self.pipeline, None
        if self.number > 0:
            hidden = self.received[: tokens.numel() * whole.hidden_size].view(*tokens.shape, whole.hidden_size)
        made = whole.compute(tokens, layers=whole.layers[self.number], hidden=hidden, **options)
        if self.number + 1 < len(whole.layers):
            raise HandedOnError(made)
        return made


class Question(nn.Module):
    """A model that only hears what it is asked for."""

    def forward(self, tokens: Tensor, **options: Any) -> Any:
        """Nothing comes back."""
        raise HandedOnError(tokens)


def _positions(objective: Objective, micro_batch: Any) -> int:
    """How many positions the objective asks the model for."""
    try:
        objective(Question(), micro_batch)
    except HandedOnError as asked:
        return asked.made.numel()
    raise AssertionError("an objective asks the model for something")
