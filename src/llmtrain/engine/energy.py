"""What the GPU of a process takes, by NVIDIA's own counter (nvidia-ml-py; without it, nothing is said)."""

from collections.abc import Callable
from typing import Any

import torch


class Energy:
    """The joules of this process's GPU; there is no counter of other devices that anybody may read."""

    def __init__(self, device: torch.device) -> None:
        self._counter = _counter(device) if device.type == "cuda" else None
        self._last = self._now() or 0.0

    def joules(self) -> float | None:
        """Since the last call, or the beginning; None where nothing counts them."""
        now = self._now()
        if now is None:
            return None
        taken, self._last = now - self._last, now
        return taken

    def _now(self) -> float | None:
        if self._counter is None:
            return None
        try:
            return self._counter() / 1000.0
        except Exception:  # a driver that fails is no reason to end a run
            self._counter = None
            return None


def _counter(device: torch.device) -> Callable[[], float] | None:
    """What gives the millijoules since the driver was loaded, as GPUs from Volta on count them."""
    try:
        import pynvml

        pynvml.nvmlInit()
        # processes may see some of the GPUs only, in an order of their own
        handle: Any = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except Exception:  # no library, no driver, no right to read
        return None
    return lambda: float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))
