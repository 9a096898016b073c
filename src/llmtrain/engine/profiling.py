"""Traces of steps: which operator ran when, on which device, for how long."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from llmtrain.config.schema import ProfileConfig
from llmtrain.engine.distributed import Layout

FOLDER = "profile"
SHOWN_OPERATORS = 40


class Profiler:
    """Goes around each step and records those that the config names.

    Each process writes `profile/rank-N.steps-A-B.pt.trace.json.gz`, which Perfetto, chrome://tracing and TensorBoard's
    profiler read, and `....txt`, the operators that took most time.
    """

    def __init__(
        self, folder: Path, config: ProfileConfig, layout: Layout, steps: int, say: Callable[[str], None]
    ) -> None:
        """`folder` is the run's, which lasts `steps` steps."""
        self.folder, self.config, self.layout, self.say = folder / FOLDER, config, layout, say
        self.first, self.last = config.first_step, min(config.first_step + config.steps - 1, steps)
        self._recorder: profile | None = None

    @contextmanager
    def __call__(self, step: int) -> Iterator[None]:
        """Around a step, from 1."""
        if step == self.first:
            self._recorder = self._new()
            self._recorder.start()
        try:
            yield
        finally:
            if self._recorder is not None:
                self._recorder.step()  # marks the end of the step
                if step >= self.last:
                    self._write(self._recorder)
                    self._recorder = None

    def _new(self) -> profile:
        is_gpu = self.layout.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]
        return profile(
            activities=activities, with_stack=self.config.stacks, profile_memory=self.config.memory, record_shapes=True
        )

    def _write(self, recorder: profile) -> None:
        if self.layout.device.type == "cuda":
            torch.cuda.synchronize(self.layout.device)  # what has been begun belongs to these steps
        recorder.stop()
        name = f"rank-{self.layout.rank}.steps-{self.first}-{self.last}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            recorder.export_chrome_trace(str(self.folder / f"{name}.pt.trace.json.gz"))
            by = "self_cuda_time_total" if self.layout.device.type == "cuda" else "self_cpu_time_total"
            table = recorder.key_averages().table(sort_by=by, row_limit=SHOWN_OPERATORS)
            (self.folder / f"{name}.txt").write_text(table, encoding="utf-8")
        except (OSError, RuntimeError) as error:  # a trace is not worth a run
            self.say(f"engine.profile: cannot write {self.folder}: {error}")
        else:
            self.say(f"engine.profile: steps {self.first} to {self.last} are in {self.folder}")
