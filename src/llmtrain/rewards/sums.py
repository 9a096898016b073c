"""A weighted sum of named rewards."""

import dataclasses
import math
import traceback
from collections.abc import Mapping, Sequence

from llmtrain.config.errors import UserError
from llmtrain.rewards.answers import Answer, Reward


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
        """The weighted sum of what `components` has given, [B]."""
        weighted = ([self.weights[name] * value for value in values] for name, values in components.items())
        return [sum(values) for values in zip(*weighted, strict=True)]


def _values(name: str, reward: Reward, answers: Sequence[Answer]) -> list[float]:
    try:
        values = [float(value) for value in reward(answers)]
    except UserError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{place.filename}:{place.lineno}"
        raise UserError(f"rewards.{name} failed at {where}: {type(error).__name__}: {error}") from error
    if len(values) != len(answers):
        raise UserError(f"rewards.{name} gave {len(values)} numbers for {len(answers)} answers; expected one for each")
    for value, answer in zip(values, answers, strict=True):
        if not math.isfinite(value):
            raise UserError(f"rewards.{name} gave {value}, which is no finite number, for the answer {answer.text!r}")
    return values
