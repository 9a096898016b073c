"""What each source has given to a run so far: kept in every checkpoint, so that the mixture may change at a resume.

The past stays what it was, the future is what the config says: sources go on where they stopped, whatever their new
weights are, and no row is drawn twice before all of its source were. A source that is new begins at its first row.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path

from llmtrain.config.errors import DataError
from llmtrain.config.json_files import read_object
from llmtrain.data.mixture import Mixture, Phase, PhasedMixture

FILE = "mixture.json"


@dataclasses.dataclass(frozen=True)
class Ledger:
    """The mixture of a run up to a sample."""

    samples: int
    """Drawn so far."""
    phases: tuple[Phase, ...]
    """Weights from the first sample on, as whole numbers: the schedule of each phase follows from them exactly."""
    given: dict[str, int]
    """Samples that each source has given."""
    sizes: dict[str, int]
    """Samples that each source has."""
    contents: dict[str, str]
    """Digest of each source."""

    @classmethod
    def of(
        cls, mixture: PhasedMixture, samples: int, sizes: Mapping[str, int], contents: Mapping[str, str]
    ) -> "Ledger":
        """The ledger after `samples` samples of a mixture."""
        phases = tuple(phase for phase in mixture.quotas if phase.start < samples)
        given = mixture.counts(samples)
        return cls(samples, phases, given, {name: sizes[name] for name in given}, {n: contents[n] for n in given})

    def write(self, folder: Path) -> None:
        """Put it into a checkpoint's folder."""
        (folder / FILE).write_text(json.dumps(dataclasses.asdict(self), indent=1))

    @classmethod
    def read(cls, folder: Path) -> "Ledger":
        """The ledger in a checkpoint's folder. Raises DataError for another file."""
        said = read_object(folder / FILE, DataError)
        try:
            phases = tuple(Phase(start, weights) for start, weights in said.pop("phases"))
            return cls(phases=phases, **said)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{folder / FILE} does not say what has been drawn: {error!r}") from None

    def check(self, contents: Mapping[str, str]) -> None:
        """Raises DataError for a source whose content is not what it was: its rows would not be those not yet seen."""
        for name, count in self.given.items():
            if count and name in contents and contents[name] != self.contents[name]:
                raise DataError(
                    f"data.sources.{name}: its rows have changed since the run drew {count:,} of them. Weights may "
                    "change at a resume and sources may come and go, but not what is in one: give the new content "
                    "another name, as a source of its own, or choose another run= name."
                )

    def go_on_with(self, phases: list[Phase], limits: Mapping[str, int]) -> list[Phase]:
        """The phases that were, then those of `phases` from here on; `limits` are what each source may give in all.

        A phase that is not changed goes on as if there had been no resume: its schedule does not begin again. One that
        begins here begins, even with the weights of the one before.
        """
        now = [phase for phase in phases if phase.start <= self.samples][-1]
        later = [phase for phase in phases if phase.start > self.samples]
        left = {
            name: weight for name, weight in now.weights.items()
            if weight and self.given.get(name, 0) < limits.get(name, math.inf)
        }  # fmt: skip
        *before, last = self.phases
        if now.start < self.samples and left and Mixture(left).by_name == last.weights:
            # as exact as the config has them: of these, not of whole numbers, is left what a source leaves when spent
            return [*before, Phase(last.start, {name: left[name] for name in last.weights}), *later]
        return [*self.phases, Phase(self.samples, now.weights), *later]
