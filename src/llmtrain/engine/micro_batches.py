"""How many rows go through the model at once, where that is to be found out (`train.micro_batch_rows=auto`).

The memory that a forward and a backward pass takes grows by as much for each row, beside what it takes for any. So it
is measured with one row and with two, and what is free says how many there may be: no allocation has to fail for it,
which on a CPU would end the process and with several processes leave the others waiting. The smallest number of all
processes is taken. Where memory does not suffice later all the same, the number is halved from that step on.

Micro-batches do not change a gradient beyond rounding, but they change its bits. So what was found, and from which step
on, stands in `micro_batches.json`, and a run that is resumed takes the same numbers at the same steps.
"""

import functools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch

from llmtrain.config.errors import UserError
from llmtrain.engine.distributed import Layout, agree, of_every

FILE = "micro_batches.json"
# The share of the free memory that passes may take. On a CPU others want some too, and too much ends the process.
SHARES = {"cuda": 0.9, "cpu": 0.5}
CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


class FoundRows:
    """The numbers of rows that were found, by the step (from 0) from which on each of them counts."""

    def __init__(self, folder: Path, layout: Layout, *, reserved: int = 0, longest_row: int | None = None) -> None:
        """`folder`: the run's. `reserved`: bytes that training will still take besides passes, such as moments.

        `longest_row`: positions of the longest row that may come, where rows differ in length.
        """
        self.path, self.layout = folder / FILE, layout
        self.reserved, self.longest_row = reserved, longest_row
        known = agree(self._read() if layout.is_main else None, layout)
        # what another number of processes has found is for another share of the rows, and of the memory
        self.rows: dict[int, int] = {each["step"]: each["rows"] for each in known if each["processes"] == layout.world}

    def at(self, step: int) -> int | None:
        """The number of rows at a step; None: it is not known yet."""
        steps = [each for each in self.rows if each <= step]
        return self.rows[max(steps)] if steps else None

    def find(self, step: int, passes: Callable[[int], None], *, rows: int, width: int) -> int:
        """The most rows, of `rows` at most, that memory suffices for, from `step` on.

        `passes(n)` puts n rows through the model and back, without communication that others do not take part in;
        `width`: how long these are.
        """
        device = self.layout.device
        passes(1)  # what is made once and kept, such as gradients, is there from now on
        one, two = (peak(functools.partial(passes, number), device) for number in (1, min(2, rows)))
        longer = max(1.0, (self.longest_row or width) / width)
        each, always = max((two - one) * longer, 1.0), max(2 * one - two, 0) * longer
        room = SHARES[device.type] * (free_memory(device) - self.reserved)
        most = min(max(int((room - always) / each), 1), rows)
        agreed = min(of_every(most, self.layout))
        # as many micro-batches as there must be, of nearly equal size
        even = math.ceil(rows / math.ceil(rows / agreed))
        self._note(step, even)
        return even

    def halve(self, step: int, rows: int) -> int:
        """Half as many rows from `step` on. Raises UserError where that is less than one, or others wait meanwhile."""
        if rows == 1:
            raise UserError(f"step {step + 1}: {TOO_LITTLE}")
        self._note(step, rows // 2, own=self.layout.world == 1)
        if self.layout.world > 1:
            raise UserError(
                f"step {step + 1}: process {self.layout.rank} ran out of memory with {rows} rows in a micro-batch. "
                f"From this step on it will be {rows // 2}; the same command goes on from the last checkpoint."
            )
        return rows // 2

    def _note(self, step: int, rows: int, *, own: bool = True) -> None:
        """Write it down; a process whose others wait (not `own`) does so as well, since it ends the run."""
        self.rows[step] = rows
        if self.layout.is_main or not own:
            others = [each for each in self._read() if each["processes"] != self.layout.world]
            known = [{"step": s, "rows": n, "processes": self.layout.world} for s, n in sorted(self.rows.items())]
            aside = self.path.with_name(f".{FILE}.partial")
            aside.write_text(json.dumps([*others, *known], indent=1))
            os.replace(aside, self.path)

    def _read(self) -> list[dict[str, int]]:
        """Raises UserError where the file does not say what was found: other numbers would give other bits."""
        try:
            found = json.loads(self.path.read_text()) if self.path.is_file() else []
            return [{key: int(each[key]) for key in ("step", "rows", "processes")} for each in found]
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"{self.path} cannot be read. Restore it, or remove it: the number of rows is then found anew, and the "
                "run goes on within rounding of what it would have been."
            ) from None


TOO_LITTLE = (
    "there is not enough memory for a single row. Lower train.sequence_length, use adapter=lora, or shard over several "
    "processes (engine.sharding=fsdp)."
)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation has failed; torch has a class for it on GPUs alone."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def peak(action: Callable[[], None], device: torch.device) -> int:
    """The most memory, in bytes, that tensors take during `action` beyond what they take before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler tells that it starts and stops
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        action()
    events = [each for each in profile.kineto_results.events() if each.name() == "[memory]"]
    taken = most = 0
    for event in sorted(events, key=lambda each: int(each.start_ns())):
        taken += event.nbytes()
        most = max(most, taken)
    return most


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take: its GPU's, or its share of what this machine has, or this container."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    amounts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(amounts["MemAvailable"].split()[0]) * 1024
    for limit, used in CGROUPS:
        if limit.is_file() and limit.read_text().strip() != "max":
            free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
