"""How fast a run is, and what takes its time: tokens per second, the share of the machine's own matrix-product speed
that it reaches, seconds by phase, memory."""

import resource
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llmtrain.engine.energy import Energy

# What a run's time is divided into; a source of batches may name another phase than data (rollouts).
PHASES = ("data", "forward_backward", "optimizer", "evaluation", "saving")
ON_DEVICE, BETWEEN_STEPS = ("forward_backward", "optimizer"), ("evaluation", "saving")

# Below these sizes torch.compile does not earn its 20-40 s back: it saves about a fifth of the step (1.2-1.4 times
# faster on a 2-core CPU at 0.3-0.5 TFLOP/s in use, similar on a GPU at some 200 TFLOP/s).
COMPILE_PAYS_FLOPS = {"cpu": 6e13, "cuda": 3e16}


def compile_pays(total_flops: float, device: torch.device) -> bool:
    """Whether to compile a run of this size, where a compiler is present; depends on the config, not on the clock."""
    return has_compiler(device) and total_flops >= COMPILE_PAYS_FLOPS.get(device.type, float("inf"))


def has_compiler(device: torch.device) -> bool:
    """Whether torch.compile has what it needs: Triton comes with torch for GPUs, for CPUs it calls a C++ compiler."""
    return device.type == "cuda" or any(shutil.which(name) for name in ("g++", "clang++"))


def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies in bfloat16; without the units it is 20-40 times slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def has_float16(device: torch.device) -> bool:
    """Whether the hardware multiplies in float16; processors without the units are many times slower than float32."""
    capabilities = torch.cpu.get_capabilities()
    return device.type == "cuda" or any(capabilities.get(name, False) for name in ("amx_fp16", "avx512_fp16"))


def has_float8(device: torch.device) -> bool:
    """Whether the hardware multiplies in float8, as NVIDIA's does from Ada and Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """FLOP/s of a large square matrix product here and now: the ceiling that MFU is measured against."""
    size = size or (8192 if device.type == "cuda" else 1024)
    left = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(3):  # the first one warms up
        _wait(device)
        start = time.perf_counter()
        left @ left
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


class Speed:
    """A stopwatch over steps, and what they take: time by phase, and memory. It measures the process that it is in.

    `flops_per_token` counts forward and backward of the trained model without its head (6 x parameters in matrix
    products, plus attention), `flops_per_prediction` those of the head for a token that is predicted; what a step does
    besides, such as a rollout or a reference model, counts as time only.

    A GPU works behind the program's back. Nothing waits for it here but the reading of a row, evaluations and saves,
    which have to anyway; what runs on it is timed by its own events. The time for data is what the program waits for
    it, whether or not a GPU is busy meanwhile.
    """

    def __init__(
        self, device: torch.device, flops_per_token: float, peak_flops: float, flops_per_prediction: float = 0.0
    ) -> None:
        self.device, self.peak_flops = device, peak_flops
        self.flops_per_token, self.flops_per_prediction = flops_per_token, flops_per_prediction
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.tokens = self.predictions = 0
        self._since: float | None = None
        self._energy = Energy(device)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def start_step(self) -> None:
        """A step begins."""
        if self._since is None:
            self._since = time.perf_counter()

    def end_step(self, tokens: int) -> None:
        """A step of `tokens` tokens (over all processes) has ended."""
        self.tokens += tokens

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within, time is that of a phase; profiles show it too."""
        self.start_step()
        with torch.profiler.record_function(f"llmtrain/{name}"):
            if self.device.type == "cuda" and name in ON_DEVICE:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                yield
                end.record()
                self._events.append((name, begin, end))
                return
            if name in BETWEEN_STEPS:
                _wait(self.device)
            start = time.perf_counter()
            yield
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def values(self) -> dict[str, float]:
        """Speed, seconds by phase and shares of the time since the last call; the most memory held so far."""
        if not self.tokens or self._since is None:
            return {}
        _wait(self.device)
        for name, begin, end in self._events:
            self.seconds[name] += begin.elapsed_time(end) / 1000.0
        now = time.perf_counter()
        total = max(now - self._since, 1e-9)
        in_steps = max(total - sum(self.seconds[name] for name in BETWEEN_STEPS), 1e-9)
        flops = self.tokens * self.flops_per_token + self.predictions * self.flops_per_prediction
        found = {
            "perf/tokens_per_second": self.tokens / in_steps,
            "perf/mfu": flops / in_steps / self.peak_flops,
            "perf/data_wait": self.seconds["data"] / in_steps,
            "perf/save_stall": self.seconds["saving"] / total,
            "perf/peak_memory_gib": peak_memory(self.device) / 2**30,
            "perf/seconds/total": total,
            **{f"perf/seconds/{name}": seconds for name, seconds in self.seconds.items()},
        }
        if (joules := self._energy.joules()) is not None:
            found["perf/watts"] = joules / total
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        self.tokens, self.predictions, self._since, self._events = 0, 0, now, []
        return found


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held: in tensors on its GPU, or of the machine's memory in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
