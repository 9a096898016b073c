"""Updates that go wrong: what is noticed before one is made, and what is done then.

An update is judged by its loss and by the norm of its gradient before clipping, over all processes, so that all of them
come to the same verdict. One of which either is not finite is not made: neither weights nor moments are touched, and
the next step has other rows. What the verdict depends on is part of the run's state, so a run that is resumed leaves
out what it left out before.

A spike lies far above the last updates by robust deviations: from their median, in units of 1.4826 times the median of
the distances from it, which is the standard deviation where values are normal and is not moved by a few that are not.
PaLM (Chowdhery et al. 2022, arXiv 2204.02311, section 5.1) goes back to a checkpoint before a spike and leaves out the
batches around it; `health.on_spike=rollback` does that in place.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from llmtrain.config.schema import HealthConfig

Remedy = Literal["warn", "skip", "rollback", "stop", "give_up"]
# The state's name in checkpoints; those of older runs have none.
PART = "guard"
# A robust standard deviation is this many medians of distances.
NORMAL = 1.4826
# A spike is also this share above the median: where values hardly vary, many deviations are little.
LOSS_SHARE, NORM_SHARE = 0.1, 1.0


class Fault(NamedTuple):
    """What was noticed of an update, and what is done."""

    kind: Literal["not_finite", "spike"]
    remedy: Remedy
    text: str
    """What was noticed, in words."""
    loss: float
    grad_norm: float


class Guard(nn.Module):
    """Judges updates. Its buffers are state of the run: counts, and what the last updates were like."""

    skipped: Tensor
    in_a_row: Tensor
    returns: Tensor
    losses: Tensor
    norms: Tensor

    def __init__(self, config: HealthConfig, *, steps: int) -> None:
        """`steps`: the length of the run; it does not end well if no update at all was made."""
        super().__init__()
        self.config, self.limit = config, min(config.max_skipped_in_a_row, steps - 1)
        # updates of the run that were not made; of these, those since the last one that was
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64))
        self.register_buffer("in_a_row", torch.zeros((), dtype=torch.int64))
        # the step of the last checkpoint that was gone back to, and how often
        self.register_buffer("returns", torch.zeros(2, dtype=torch.int64))
        if config.on_spike:
            for name in ("losses", "norms"):  # of the last updates, the newest at the end
                self.register_buffer(name, torch.zeros(config.spike_window, dtype=torch.float64))
        self.reset()

    def reset(self) -> None:
        """As at the start of a run."""
        for name, buffer in self.named_buffers():
            buffer.fill_(math.nan if name in ("losses", "norms") else 0)

    def judge(self, loss: float, grad_norm: float) -> Fault | None:
        """What is wrong with an update, if anything is; both numbers are the same on all processes."""
        fault = self._fault(loss, grad_norm)
        if fault is not None and fault.remedy != "warn":
            self.skipped += 1
            self.in_a_row += 1
            if int(self.in_a_row) > self.limit:
                return fault._replace(remedy="give_up", text=f"{fault.text}, the {int(self.in_a_row)}. in a row")
            return fault
        self.in_a_row.zero_()
        if self.config.on_spike:
            _push(self.losses, loss)
            _push(self.norms, grad_norm)
        return fault

    def went_back(self, checkpoint: int, step: int, counted: Mapping[str, Tensor]) -> bool:
        """Count the steps from `checkpoint` to `step` as left out; False where it was gone back to too often.

        Call it with the state of the checkpoint loaded; `counted` are the buffers from before that.
        """
        for name in ("skipped", "in_a_row", "returns"):
            self.get_buffer(name).copy_(counted[name])
        self.skipped += step - checkpoint - 1  # the update that was judged is counted already
        times = int(self.returns[1]) + 1 if int(self.returns[0]) == checkpoint else 1
        self.returns.copy_(torch.tensor([checkpoint, times]))
        return times <= max(self.limit, 1)

    def values(self) -> dict[str, float]:
        """Metrics: how many updates have not been made, in runs that have any."""
        return {"train/skipped_steps": float(self.skipped)} if int(self.skipped) else {}

    def _fault(self, loss: float, grad_norm: float) -> Fault | None:
        named = {"train/loss": loss, "train/grad_norm": grad_norm}
        wrong = [name for name, value in named.items() if not math.isfinite(value)]
        if wrong:
            return Fault("not_finite", "skip", f"{' and '.join(wrong)} became {named[wrong[0]]}", loss, grad_norm)
        if self.config.on_spike is None:
            return None
        said = "; ".join(self._spikes(named))
        return Fault("spike", self.config.on_spike, said, loss, grad_norm) if said else None

    def _spikes(self, named: Mapping[str, float]) -> Iterator[str]:
        for (name, value), last, share in zip(
            named.items(), (self.losses, self.norms), (LOSS_SHARE, NORM_SHARE), strict=True
        ):
            known: list[float] = last.tolist()
            if any(map(math.isnan, known)):
                continue
            median = statistics.median(known)
            deviation = NORMAL * statistics.median(abs(each - median) for each in known)
            if value - median > max(self.config.spike_deviations * deviation, share * abs(median)):
                yield f"{name} jumped to {value:.4g}, from {median:.4g} ± {deviation:.2g} over {len(known)} updates"


# What is done, and what the user can do.
WORDS: dict[Remedy, str] = {
    "warn": "the update was made all the same.",
    "skip": "the update was not made.",
    "rollback": "there is no checkpoint to go back to yet: the update was not made.",
    "stop": (
        "stopped before the update, as health.on_spike says. The same command with health.on_spike=skip goes on from "
        "the last checkpoint and leaves these rows out."
    ),
    "give_up": (
        "stopped before it could be saved (health.max_skipped_in_a_row). Lower optimizer.lr or train.max_grad_norm, "
        "or lengthen schedule.warmup_steps."
    ),
}
TOO_OFTEN = (
    "was gone back to more often than health.max_skipped_in_a_row: every way from it ends in a spike. Lower "
    "optimizer.lr or train.max_grad_norm, or raise health.spike_deviations."
)


def in_words(remedy: Remedy, back_to: int | None) -> str:
    """What is done about a fault; `back_to`: the step of the checkpoint that was gone back to, if there was one."""
    if back_to is not None:
        return f"went back to the checkpoint of step {back_to}; the rows since then are left out."
    return WORDS[remedy]


def as_row(fault: Fault, back_to: int | None, rows: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """A line of `faults.jsonl`; `rows` are those of the step's batch by source."""
    return fault._asdict() | ({} if back_to is None else {"back_to": back_to}) | {"rows": dict(rows)}


def _push(window: Tensor, value: float) -> None:
    window.copy_(torch.cat([window[1:], window.new_tensor([value])]))
