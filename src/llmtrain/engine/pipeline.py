"""Pipeline parallelism: each process keeps some of a model's layers, and the micro-batches of a step go through all.

torch's schedules say who computes what when, and send hidden states on and their gradients back
(`torch.distributed.pipelining`). An objective stays what it is, a function of a model and a batch: every process calls
it. On the last stage the model that it is given begins with the hidden states that have come; on the others it ends the
call as soon as the layers of the stage are done. So what a stage needs beside hidden states (tokens, documents) it has
from the batch, which all processes of a pipeline read.

A stage's gradients are complete when its micro-batches have gone through, and its optimizer knows its parameters alone.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.utils._pytree import tree_map_only

from llmtrain.config.errors import ConfigError

Schedule = Literal["gpipe", "1f1b", "interleaved"]
# GPipe: Huang et al. 2019 (arXiv 1811.06965). 1F1B: Narayanan et al. 2019 (arXiv 1806.03377, section 3.2), and several
# stages in each process: Narayanan et al. 2021 (arXiv 2104.04473, section 2.2).
SCHEDULES: dict[str, Any] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, "interleaved": ScheduleInterleaved1F1B}
INTERLEAVED_STAGES = 2


class Divisible(Protocol):
    """A model, as a pipeline sees it. Its forward takes `layers` and `hidden`: which to go through, and from where."""

    forward: Callable[..., Any]

    @property
    def config(self) -> Any: ...
    @property
    def blocks(self) -> Sequence[nn.Module]: ...
    @property
    def shared_by_ends(self) -> Sequence[nn.Parameter]: ...
    def keep(self, layers: Sequence[range]) -> None: ...
    def parameters(self) -> Iterable[nn.Parameter]: ...


@dataclasses.dataclass
class Portions:
    """What goes through a pipeline in one update."""

    objective: Callable[[nn.Module, Any], tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]]
    micro_batches: Sequence[Any]
    scale: Tensor
    """What each term of the summed loss is multiplied by."""
    seed: Callable[[int, int], int]
    """Of the draws of a stage in a micro-batch, by their numbers."""
    autocast: Callable[[], AbstractContextManager[Any]]


class Pipeline:
    """The stages of a model, one or several on each process of a group.

    Made from the whole model, of which it leaves this process its own layers (`keep`), in place, as `fully_shard` does:
    the names of parameters stay. Outside of `train` the model's forward is still that of the whole one, for all
    processes of the group together and without gradients.

    Raises ConfigError where there are fewer layers than stages.
    """

    def __init__(self, model: Divisible, schedule: Schedule, group: dist.ProcessGroup, device: torch.device) -> None:
        self.model, self.schedule, self.group, self.device = model, schedule, group, device
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        per_process = INTERLEAVED_STAGES if schedule == "interleaved" else 1
        stages, layers = self.size * per_process, len(model.blocks)
        if layers < stages:
            raise ConfigError(
                f"engine.pipeline_parallel={self.size} with engine.pipeline_schedule={schedule} is {stages} stages, "
                f"and the model has {layers} layers; take fewer processes, or another schedule"
            )
        self.layers = [range(n * layers // stages, (n + 1) * layers // stages) for n in range(stages)]
        self.own = range(self.rank, stages, self.size)
        model.keep([self.layers[number] for number in self.own])
        self.compute, model.forward = model.forward, self.forward
        self.shape: tuple[int, ...] = ()  # that the runner is made for: micro-batches, rows, positions
        self.runner: Any = None

    @property
    def is_last(self) -> bool:
        """Whether this process has the last stage."""
        return self.rank == self.size - 1

    def forward(self, tokens: Tensor, **options: Any) -> Any:
        """What the whole model makes of tokens, on every process of the group; without gradients."""
        assert not torch.is_grad_enabled(), "a pipeline learns by `train`"
        made: Any = None
        for number in self.own:
            hidden = None
            if number > 0:
                hidden = torch.empty(*self._hidden_shape(tokens), dtype=self._dtype, device=self.device)
                dist.recv(hidden, group=self.group, group_src=(number - 1) % self.size)
            made = self.compute(tokens, layers=self.layers[number], hidden=hidden, **options)
            if number + 1 < len(self.layers):
                dist.send(made, group=self.group, group_dst=(number + 1) % self.size)
        return self._from_last(made)

    def train(self, portions: Portions) -> list[dict[str, tuple[Tensor, Tensor]]]:
        """Adds the gradients of all micro-batches to this process's parameters; the metrics of each.

        Raises ConfigError where micro-batches differ in shape.
        """
        numbers = torch.arange(len(portions.micro_batches))
        shape = (len(numbers), *self._shape_of(portions))
        if shape != self.shape:
            self.shape, self.runner = shape, self._make_runner(shape)
        self.portions, self.metrics = portions, list[dict[str, tuple[Tensor, Tensor]]]()
        self.runner.step(numbers, number=numbers, target=numbers, return_outputs=False)
        self._sum_shared()
        found: list[dict[str, tuple[Tensor, Tensor]]] = self._from_last(self.metrics)
        return found

    def counted(self) -> list[nn.Parameter]:
        """This process's parameters but for those that are counted on the first: each of the model's, once."""
        again = {id(each) for each in self.model.shared_by_ends} if self.is_last else set()
        return [each for each in self.model.parameters() if id(each) not in again]

    def compute_stage(self, number: int, micro_batch: int, received: Tensor) -> Tensor:
        """One stage's share in one micro-batch: hidden states, or the loss of the last."""
        part = self.portions
        torch.manual_seed(part.seed(number, micro_batch))
        view = StageView(self.compute, self.layers[number], received, is_last=number + 1 == len(self.layers))
        try:
            with part.autocast():
                loss, metrics = part.objective(view, part.micro_batches[micro_batch])
        except HandedOnError as done:
            return done.hidden
        self.metrics.append({name: (value.detach(), weight.detach()) for name, (value, weight) in metrics.items()})
        return (loss * part.scale).sum()

    def _shape_of(self, portions: Portions) -> tuple[int, ...]:
        """Rows and positions of what the objective asks the model for: the same for all micro-batches."""
        shapes = {self._asked(portions.objective, each) for each in portions.micro_batches}
        if len(shapes) != 1:
            told = " and ".join("x".join(map(str, shape)) for shape in sorted(shapes))
            raise ConfigError(
                f"train.micro_batch_rows: micro-batches of a pipeline have one shape, and these have {told} tokens; "
                "let it divide the rows of each process"
            )
        return shapes.pop()

    def _asked(self, objective: Callable[[nn.Module, Any], Any], micro_batch: Any) -> tuple[int, ...]:
        try:
            objective(StageView(lambda tokens, **options: tokens, range(0), None, is_last=False), micro_batch)
        except HandedOnError as asked:
            return tuple(asked.hidden.shape)
        raise AssertionError("an objective asks the model for something")

    def _make_runner(self, shape: tuple[int, ...]) -> Any:
        """torch's schedule for so many micro-batches of such hidden states: it keeps memory for them."""
        hidden = torch.empty(*shape[1:], self.model.config.hidden_size, dtype=self._dtype, device="meta")
        hidden.requires_grad_()
        number, loss = torch.empty(1, dtype=torch.int64, device="meta"), torch.empty((), device="meta")
        last = len(self.layers) - 1
        stages = [
            PipelineStage(
                Stage(self, each), each, len(self.layers), self.device, group=self.group,
                input_args=hidden if each else number, output_args=loss if each == last else hidden,
            )
            for each in self.own
        ]  # fmt: skip
        return SCHEDULES[self.schedule](
            stages if self.schedule == "interleaved" else stages[0], shape[0], loss_fn=lambda loss, _: loss,
            scale_grads=False,
        )  # fmt: skip

    def _sum_shared(self) -> None:
        """Let the first and the last process have the sum of their gradients of what both hold."""
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

    def _from_last(self, made: Any) -> Any:
        """What the process with the last stage has made, on all."""
        box = [tree_map_only(Tensor, Tensor.cpu, made) if self.is_last else None]
        dist.broadcast_object_list(box, group=self.group, group_src=self.size - 1, device=self.device)
        return tree_map_only(Tensor, lambda each: each.to(self.device), box[0])

    def _hidden_shape(self, tokens: Tensor) -> tuple[int, ...]:
        return (*tokens.shape, self.model.config.hidden_size)

    @property
    def _dtype(self) -> torch.dtype:
        return next(iter(self.model.parameters())).dtype


class Stage(nn.Module):
    """One stage, as torch's schedules call it: with what has come, and the number of the micro-batch."""

    def __init__(self, pipeline: Pipeline, number: int) -> None:
        super().__init__()
        self.pipeline, self.number = pipeline, number

    def forward(self, received: Tensor, number: Tensor) -> Tensor:
        return self.pipeline.compute_stage(self.number, int(number), received)


class HandedOnError(Exception):
    """Ends the call of an objective where the layers of a stage are done."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class StageView(nn.Module):
    """The model that an objective is given on one stage."""

    def __init__(
        self, compute: Callable[..., Any], layers: range, received: Tensor | None, *, is_last: bool
    ) -> None:  # fmt: skip
        super().__init__()
        self.compute, self.layers, self.received, self.is_last = compute, layers, received, is_last

    def forward(self, tokens: Tensor, **options: Any) -> Any:
        """What the model makes; on a stage before the last, nothing comes back."""
        made = self.compute(tokens, layers=self.layers, hidden=self.received if self.layers.start else None, **options)
        if not self.is_last:
            raise HandedOnError(made)
        return made


def pipeline_of(module: nn.Module) -> Pipeline | None:
    """The pipeline that the module is a part of."""
    owner = getattr(module.__dict__.get("forward"), "__self__", None)
    return owner if isinstance(owner, Pipeline) else None
