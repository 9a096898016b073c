"""Which sample comes when: sources mixed by weight, and each source shuffled anew in every epoch.

Both are functions of a sample's number alone, so sample 10^12 is as quick to find as sample 0 and nothing has to be
saved or fast-forwarded. Not `grain`, which does as much: its mixing is exact only over whole rounds of weights (100
samples for weights of two digits) and takes a Python call for each sample, where this is exact at every sample and
takes one vectorised call for a batch.
"""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmtrain.data.schedules import MAX_WHOLE, Integers, schedule

ROUNDS = 6
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # SplitMix64 steps by this


class Mixture:
    """An endless sequence of samples from weighted sources.

    After any number n of samples, source j has given no more than `deviation` samples more or less than n · weight_j:
    less than one where the shares' common denominator is at most 100,000, and otherwise about one (`schedules`).
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.names = list(weights)
        self.quotas = _quotas(list(weights.values()))
        self._schedule = schedule(self.quotas)

    def __call__(self, samples: ArrayLike) -> tuple[Integers, Integers]:
        """For each sample number: the number of its source, and how many samples of that source came before."""
        return self._schedule(np.asarray(samples, dtype=np.int64))

    def counts(self, n: int) -> dict[str, int]:
        """How many of the first `n` samples come from each source."""
        return dict(zip(self.names, self._schedule.counts(n), strict=True))

    def samples_until(self, name: str, count: int) -> int:
        """The smallest n of which the first `n` samples hold `count` of a source."""
        return self._schedule.samples_until(self.names.index(name), count) if count else 0

    @property
    def deviation(self) -> float:
        """No source is ever further than this from its share, in samples."""
        return self._schedule.deviation

    @property
    def by_name(self) -> dict[str, int]:
        """Shares as whole numbers."""
        return dict(zip(self.names, self.quotas, strict=True))

    @property
    def shares(self) -> dict[str, float]:
        """The weights, adding up to 1."""
        return {name: quota / sum(self.quotas) for name, quota in self.by_name.items()}


class Phase(NamedTuple):
    """Weights that hold from a sample on."""

    start: int
    weights: Mapping[str, float]


class _Stretch(NamedTuple):
    """Samples from `start` on, of one mixture; `given` is what each source has given before."""

    start: int
    mixture: Mixture
    given: dict[str, int]

    def given_at(self, sample: int) -> dict[str, int]:
        here = self.mixture.counts(sample - self.start)
        return {name: count + here.get(name, 0) for name, count in self.given.items()}

    def place_of(self, name: str, count: int) -> int:
        """The first sample before which a source has given `count`."""
        return self.start + self.mixture.samples_until(name, count - self.given[name])


class PhasedMixture:
    """Mixtures one after another; in each source, every one goes on where the one before stopped.

    Within a phase, realised counts stay within one sample of the weights. `limits` are the samples that a source may
    give in all. When they are used up, the others go on with the weights that they have (`renormalise`), or the
    sequence ends there: it has `length` samples. Samples before `drawn` are what they were, whatever the limits are.
    """

    def __init__(
        self, phases: Sequence[Phase], limits: Mapping[str, int] | None = None, *, renormalise: bool = True,
        drawn: int = 0,
    ) -> None:  # fmt: skip
        limits = limits or {}
        self.names = list(dict.fromkeys(name for phase in phases for name in phase.weights))
        self.length: int | None = None
        self._stretches: list[_Stretch] = []
        given = dict.fromkeys(self.names, 0)
        ends = [*(phase.start for phase in phases[1:]), math.inf]
        for (start, weights), end in zip(phases, ends, strict=True):
            while self.length is None and start < end:
                open_to = {name: math.inf if start < drawn else limits.get(name, math.inf) for name in weights}
                left = {name: weight for name, weight in weights.items() if given[name] < open_to[name]}
                if not any(left.values()):
                    self.length = start
                    break
                stretch = _Stretch(start, Mixture({name: weight for name, weight in left.items() if weight}), given)
                self._stretches.append(stretch)
                spent = [
                    max(drawn, stretch.place_of(name, limits[name]))
                    for name in stretch.mixture.names if name in limits
                ]  # fmt: skip
                if min([end, *spent]) == math.inf:
                    break
                start = int(min([end, *spent]))
                given = stretch.given_at(start)
                if start in spent and not renormalise:
                    self.length = start
        self._starts = [stretch.start for stretch in self._stretches]

    def __call__(self, samples: ArrayLike) -> tuple[Integers, Integers]:
        """As `Mixture`, for samples below `length`."""
        samples = np.asarray(samples, dtype=np.int64)
        number = np.searchsorted(self._starts, samples, side="right") - 1
        source, before = np.empty_like(samples), np.empty_like(samples)
        for each in sorted(set(number.tolist())):  # numpy.unique imports masked arrays, 7 ms, at its first call
            here, (start, mixture, given) = number == each, self._stretches[each]
            local, rank = mixture(samples[here] - start)
            source[here] = np.array([self.names.index(name) for name in mixture.names])[local]
            before[here] = rank + np.array([given[name] for name in mixture.names])[local]
        return source, before

    def counts(self, n: int) -> dict[str, int]:
        """How many of the first `n` samples come from each source."""
        return self._stretches[int(np.searchsorted(self._starts, n, side="right")) - 1].given_at(n)

    def sample_of(self, name: str, number: int) -> int | None:
        """The sample that is number `number` (from 0) of a source; None where there is none."""
        ends = [*(stretch.start for stretch in self._stretches[1:]), self.length or math.inf]
        for stretch, end in zip(self._stretches, ends, strict=True):
            if name in stretch.mixture.names and stretch.given[name] <= number:
                sample = stretch.place_of(name, number + 1) - 1
                if sample < end:
                    return sample
        return None

    @property
    def shares(self) -> dict[str, float]:
        """Shares at the start, of all sources."""
        return dict.fromkeys(self.names, 0.0) | self._stretches[0].mixture.shares

    @property
    def quotas(self) -> list[Phase]:
        """First sample and weights of each stretch as whole numbers, from which its schedule follows exactly."""
        return [Phase(stretch.start, stretch.mixture.by_name) for stretch in self._stretches]

    @property
    def phases(self) -> list[Phase]:
        """First sample and shares of each stretch, those that a spent source has made among them."""
        return [Phase(stretch.start, stretch.mixture.shares) for stretch in self._stretches]


def weights_of_epochs(epochs: Mapping[str, float], sizes: Mapping[str, float]) -> dict[str, float]:
    """Weights by which every source is gone through its number of times in the same run; sizes in samples or bytes."""
    return {name: times * sizes[name] for name, times in epochs.items()}


def weights_of_temperature(sizes: Mapping[str, float], temperature: float) -> dict[str, float]:
    """Weights size^(1 / T): 1 is in proportion to size, infinity all alike (T5, arXiv 1910.10683, 3.5.2)."""
    return {name: size ** (1.0 / temperature) for name, size in sizes.items()}


def permute(index: ArrayLike, n: ArrayLike, key: ArrayLike) -> Integers:
    """What stands at place `index` of a pseudo-random order of `range(n)`, without a list of it; all of one shape.

    A Feistel network on pairs of digits in base ceil(sqrt(n)); the few numbers that it takes out of the range are
    put through it again until they are back (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    values, sizes, keys = (
        np.array(each, dtype=np.uint64) for each in np.broadcast_arrays(*np.atleast_1d(index, n, key))
    )
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        values[outside] = _feistel(values[outside], sizes[outside], keys[outside])
        outside = values >= sizes
    return values.astype(np.int64)


def place_of_value(value: int, n: int, key: int) -> int:
    """Where `value` stands in the order of `range(n)` that `permute` makes: its inverse."""
    found = np.array([value], dtype=np.uint64)
    sizes, keys = np.array([n], dtype=np.uint64), np.array([key], dtype=np.uint64)
    while True:
        found = _feistel_inverse(found, sizes, keys)
        if found[0] < n:
            return int(found[0])


def sample_of(row: int, size: int, key: int, epoch: int) -> int:
    """The sample of a source by which `shuffled` gives this row in this epoch."""
    epochs = np.array([epoch], dtype=np.uint64) + np.uint64(1)
    return epoch * size + place_of_value(row, size, int(np.uint64(key) ^ _mix(epochs)[0]))


def shuffled(sample: Integers, size: Integers, key: Integers) -> Integers:
    """The rows behind samples of sources that are gone through again and again, in a new order each time.

    Sample number, number of rows and key of the source for each element.
    """
    epoch, place = np.divmod(sample, size)
    return permute(place, size, key.astype(np.uint64) ^ _mix(epoch.astype(np.uint64) + np.uint64(1)))


def _feistel(values: NDArray[np.uint64], sizes: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    base = np.sqrt(sizes.astype(np.float64)).astype(np.uint64)
    base += base * base < sizes
    left, right = np.divmod(values, base)
    for _ in range(ROUNDS):
        keys = keys + GOLDEN
        left, right = right, (left + _mix(_mix(keys) ^ right) % base) % base
    return left * base + right


def _feistel_inverse(
    values: NDArray[np.uint64], sizes: NDArray[np.uint64], keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    base = np.sqrt(sizes.astype(np.float64)).astype(np.uint64)
    base += base * base < sizes
    left, right = np.divmod(values, base)
    for number in range(ROUNDS, 0, -1):
        mixed = _mix(_mix(keys + GOLDEN * np.full_like(keys, number)) ^ left) % base
        left, right = (right + base - mixed) % base, left
    return left * base + right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output function: every bit of the result depends on every bit of the input."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _quotas(weights: list[float]) -> list[int]:
    """The shares as whole numbers, in lowest terms; rounded where they would sum up to more than `MAX_WHOLE`."""
    exact = [Fraction(str(weight)) for weight in weights]  # 0.1 means a tenth, not its nearest binary fraction
    shares = [weight / sum(exact) for weight in exact]
    whole = math.lcm(*(share.denominator for share in shares))
    if whole <= MAX_WHOLE:
        return [int(share * whole) for share in shares]
    # in lowest terms, so that these quotas as weights give themselves: a ledger keeps them
    rounded = [max(1, int(share * (MAX_WHOLE - len(shares)))) for share in shares]
    divisor = math.gcd(*rounded)
    return [quota // divisor for quota in rounded]
