"""Watts of a GPU, from a counter of its driver; a run goes on without it, and without a driver that fails."""

import sys
from types import SimpleNamespace

import pytest
import torch

from llmtrain.engine.energy import Energy
from llmtrain.engine.report import _facts

GPU = torch.device("cuda", 1)


class DriverError(Exception):
    """NVML's own."""


class Driver(SimpleNamespace):
    """NVML, of one GPU that takes 250 W while somebody counts seconds."""

    def __init__(self) -> None:
        super().__init__(millijoules=5e9, asked=[], fails=False, NVMLError=DriverError)

    def nvmlInit(self) -> None:
        self.asked.append("init")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.asked.append(uuid)
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        assert handle == "handle"
        if self.fails:
            raise DriverError("GPU is lost")
        return int(self.millijoules)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setitem(sys.modules, "pynvml", made)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"uuid-{device}"))
    return made


def test_joules_are_those_since_the_last_call(driver: Driver) -> None:
    energy = Energy(GPU)
    assert driver.asked == ["init", "GPU-uuid-cuda:1"]
    driver.millijoules += 250_000
    assert energy.joules() == pytest.approx(250.0)
    assert energy.joules() == 0.0
    driver.fails = True
    assert energy.joules() is None
    driver.fails = False
    assert energy.joules() is None, "what lies between is not known"
    driver.millijoules += 100_000
    assert energy.joules() == pytest.approx(100.0)


def test_without_a_counter_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Energy(torch.device("cpu")).joules() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert Energy(GPU).joules() is None


def test_the_report_adds_them_up() -> None:
    rows = [{"step": n, "perf/watts": 600.0, "perf/seconds/total": 1800.0} for n in (1, 2)]
    assert ("energy of a GPU", "0.6 kWh") in list(_facts(rows, {}))
