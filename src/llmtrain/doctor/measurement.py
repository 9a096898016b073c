"""What a check finds: numbers, each beside the one that it should be."""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One number of a check."""

    what: str
    expected: float
    found: float
    tolerance: float = 0.0
    """How far it may be off; 0: to the bit."""

    @property
    def passed(self) -> bool:
        """Whether it is as expected; what is not finite never is."""
        return math.isfinite(self.found) and abs(self.found - self.expected) <= self.tolerance


# Measures on a device; raises Skipped where the machine lacks what is to be checked.
Check = Callable[[torch.device], list[Measurement]]


class Skipped(Exception):
    """A check that does not apply to this machine; the message says why."""


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """The largest absolute difference of two tensors of one shape, in float64."""
    return float((found.detach().double() - expected.detach().double()).abs().max())


def relative_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference between tensors of one name, as a share of the largest expected value of all."""
    assert found.keys() == expected.keys()
    scale = max(float(value.abs().max()) for value in expected.values())
    return max(largest_difference(found[name], value) for name, value in expected.items()) / scale
