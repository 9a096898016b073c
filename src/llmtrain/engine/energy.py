"""What the GPU of a process takes, by NVIDIA's own counter (nvidia-ml-py; without it, nothing is said)."""

from collections.abc import Callable

import torch


class Energy:
    """The joules of this process's GPU; there is no counter of other devices that anybody may read."""

    def __init__(self, device: torch.device) -> None:
        self._read = _counter(device) if device.type == "cuda" else _nothing
        self._last = self._read()

    def joules(self) -> float | None:
        """Since the last call, or the beginning; None where nothing counted them then or now."""
        now, last = self._read(), self._last
        self._last = now
        return None if now is None or last is None else now - last


def _counter(device: torch.device) -> Callable[[], float | None]:
    """What gives the joules since the driver was loaded, as GPUs from Volta on count them."""
    try:
        import pynvml
    except ImportError:
        return _nothing
    try:
        pynvml.nvmlInit()
        # processes may see some of the GPUs only, in an order of their own
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except pynvml.NVMLError:  # no driver, no right to read
        return _nothing

    def read() -> float | None:
        try:
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000.0
        except pynvml.NVMLError:  # an older GPU, or one that is lost: no reason to end a run
            return None

    return read


def _nothing() -> None:
    return None
