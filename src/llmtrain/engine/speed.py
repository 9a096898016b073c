"""How fast a run is: tokens per second, and the share of the machine's own matrix-product speed that it reaches."""

import shutil
import time

import torch

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
    """A stopwatch over steps.

    `flops_per_token` counts forward and backward of the trained model (6 x parameters in matrix products, plus
    attention); what a step does besides, such as a rollout or a reference model, counts as time only.
    """

    def __init__(self, device: torch.device, flops_per_token: float, peak_flops: float) -> None:
        self.device, self.flops_per_token, self.peak_flops = device, flops_per_token, peak_flops
        self.seconds, self.tokens, self._start = 0.0, 0, 0.0

    def start_step(self) -> None:
        """A step begins."""
        self._start = time.perf_counter()

    def end_step(self, tokens: int) -> None:
        """A step of `tokens` tokens (over all processes) has ended."""
        self.seconds += time.perf_counter() - self._start
        self.tokens += tokens

    def values(self) -> dict[str, float]:
        """Speed since the last call."""
        if not self.tokens:
            return {}
        _wait(self.device)
        rate = self.tokens / max(self.seconds, 1e-9)
        self.seconds, self.tokens = 0.0, 0
        return {"perf/tokens_per_second": rate, "perf/mfu": rate * self.flops_per_token / self.peak_flops}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
