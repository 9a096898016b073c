"""A weighted sum of named rewards."""

import dataclasses
import traceback
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from llmtrain.config.errors import UserError
from llmtrain.data.messages import short
from llmtrain.rewards.answers import Answer, Reward

TEXT = (str, bytes, bytearray)
NO_LISTS = (*TEXT, Mapping, Set)  # a mapping gives its keys, a set no order
LARGEST = 3.4028234663852886e38  # that float32 holds, in which losses are computed


@dataclasses.dataclass(frozen=True)
class WeightedSum:
    """Several rewards of the same answers, each multiplied by its weight and summed: a reward itself."""

    rewards: Mapping[str, Reward]
    weights: Mapping[str, float]
    """By the same names."""

    @property
    def needs_expected(self) -> tuple[str, ...]:
        """Names of the rewards that compare with a right answer (their attribute `needs_expected` is true)."""
        return tuple(name for name, reward in self.rewards.items() if getattr(reward, "needs_expected", False))

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """The sum for each answer, [B]. Raises UserError as `components`."""
        return self.total(self.components(answers))

    def components(self, answers: Sequence[Answer]) -> dict[str, list[float]]:
        """What each reward gives, [B], without its weight: the metrics `align/reward/<name>`.

        Raises UserError for a reward that fails, or does not give one finite number for each answer.
        """
        return {name: _values(name, reward, answers) for name, reward in self.rewards.items()}

    def total(self, components: Mapping[str, Sequence[float]]) -> list[float]:
        """The weighted sum of what `components` has given, [B]. Raises UserError where it is beyond float32."""
        weighted = ([self.weights[name] * value for value in values] for name, values in components.items())
        totals = [sum(values) for values in zip(*weighted, strict=True)]
        beyond = [total for total in totals if not abs(total) <= LARGEST]
        if beyond:
            raise UserError(f"the sum of the rewards is {beyond[0]}, which float32 does not hold: lower their weights")
        return totals


def _values(name: str, reward: Reward, answers: Sequence[Answer]) -> list[float]:
    try:
        given: Any = reward(answers)
        given = list(given) if isinstance(given, Iterable) and not isinstance(given, NO_LISTS) else given
    except UserError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{place.filename}:{place.lineno}"
        raise UserError(f"rewards.{name} failed at {where}: {type(error).__name__}: {error}") from error
    try:
        values = _numbers(given)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last by a tensor of several numbers
        expected = "expected a list with one number for each answer"
        raise UserError(f"rewards.{name} gave {short(given)}; {expected}") from None
    if len(values) != len(answers):
        raise UserError(f"rewards.{name} gave {len(values)} numbers for {len(answers)} answers; expected one for each")
    for value, answer in zip(values, answers, strict=True):
        if not abs(value) <= LARGEST:
            raise UserError(f"rewards.{name} gave {value}, which float32 does not hold, for the answer {answer.text!r}")
    return values


def _numbers(given: Any) -> list[float]:
    """Raises TypeError for what is no list of numbers, though Python would take numbers from it."""
    if isinstance(given, NO_LISTS) or any(isinstance(value, TEXT) for value in given):
        raise TypeError
    return [float(value) for value in given]
