"""Whose turn it is: the orders in which samples are taken from sources, given how many of `sum(quotas)` each gives.

Both kinds answer for any sample directly. `Period` writes one period down, the best there is, and is for short ones;
`Halving` writes nothing down and takes any quotas.
"""

import functools
import heapq
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

MAX_PERIOD = 100_000  # samples whose order is written down
MAX_WHOLE = 2**60  # sum of the quotas: the largest for which `_portion` is exact
CUTS = 5  # to either side of the middle, that `Halving` tries


class Schedule(Protocol):
    """An endless sequence of sources."""

    deviation: float
    """No source is ever further than this from its share, in samples."""

    def __call__(self, samples: Integers) -> tuple[Integers, Integers]:
        """For each sample number: the number of its source, and how many samples of that source came before."""

    def counts(self, n: int) -> list[int]:
        """How many of the first `n` samples come from each source."""

    def samples_until(self, source: int, count: int) -> int:
        """The smallest n of which the first `n` samples hold `count`, at least one, of a source."""


def schedule(quotas: Sequence[int]) -> Schedule:
    """The order for such quotas: any whole numbers above 0 that sum up to no more than `MAX_WHOLE`."""
    return Period(quotas) if sum(quotas) <= MAX_PERIOD else Halving(quotas)


class Period:
    """All of one period written down (Tijdeman, "The chairman assignment problem", 1980)."""

    def __init__(self, quotas: Sequence[int]) -> None:
        self.deviation = 1.0 - 1.0 / max(2 * len(quotas) - 2, 1)
        self._quotas = np.array(quotas, dtype=np.int64)
        self._period = sum(quotas)
        self._schedule = _chairman_assignment(tuple(quotas))
        self._places = [np.flatnonzero(self._schedule == source) for source in range(len(quotas))]
        self._rank = np.empty(self._period, dtype=np.int64)
        for places in self._places:
            self._rank[places] = np.arange(len(places))

    def __call__(self, samples: Integers) -> tuple[Integers, Integers]:
        rounds, place = np.divmod(samples, self._period)
        source = self._schedule[place].astype(np.int64)
        return source, rounds * self._quotas[source] + self._rank[place]

    def counts(self, n: int) -> list[int]:
        rounds, rest = divmod(n, self._period)
        parts = zip(self._quotas.tolist(), self._places, strict=True)
        return [rounds * quota + int(np.searchsorted(places, rest)) for quota, places in parts]

    def samples_until(self, source: int, count: int) -> int:
        rounds, rank = divmod(count - 1, int(self._quotas[source]))
        return rounds * self._period + int(self._places[source][rank]) + 1


class Halving:
    """A tree of sources: each node gives to its left side, of its first n samples, n times its portion, rounded.

    A source is off by half a sample at most for its own node, and by its portion of what the node above is off, and so
    on up: about one sample in all where nodes are split near their middle. Portions are taken in whole numbers.
    """

    def __init__(self, quotas: Sequence[int]) -> None:
        self._quotas = list(quotas)
        self.deviation, tree = _most_even_tree(quotas)
        self._children: list[tuple[int, int]] = []  # a node's number, or below 0 the inverse of a source's
        self._portions: list[tuple[int, int]] = []  # quota of the left side, and of both
        self._above: dict[int, int] = {}
        self._root = self._number(tree)
        self._left, self._right = np.array(self._children, dtype=np.int64).reshape(-1, 2).T
        self._part, self._whole = np.array(self._portions, dtype=np.int64).reshape(-1, 2).T

    def __call__(self, samples: Integers) -> tuple[Integers, Integers]:
        count, node = samples.copy(), np.full(samples.shape, self._root)
        while len(inner := np.nonzero(node >= 0)[0]):
            at, n = node[inner], count[inner]
            before = _portion(n, self._part[at], self._whole[at])
            is_left = _portion(n + 1, self._part[at], self._whole[at]) > before
            count[inner] = np.where(is_left, before, n - before)
            node[inner] = np.where(is_left, self._left[at], self._right[at])
        return ~node, count

    def counts(self, n: int) -> list[int]:
        given = {self._root: n}
        for node in range(len(self._children) - 1, -1, -1):  # a node's number is above those of its children
            part, whole = self._portions[node]
            left, right = self._children[node]
            given[left] = (2 * given[node] * part + whole) // (2 * whole)
            given[right] = given[node] - given[left]
        return [given[~source] for source in range(len(self._quotas))]

    def samples_until(self, source: int, count: int) -> int:
        node = ~source
        while node != self._root:
            above = self._above[node]
            part, whole = self._portions[above]
            if node == self._children[above][0]:
                count = -(-(2 * count - 1) * whole // (2 * part))
            else:
                count = (2 * count - 1) * whole // (2 * (whole - part)) + 1
            node = above
        return count

    def _number(self, tree: "Tree") -> int:
        """Lists the nodes of a tree, those below first; the number of its root."""
        if isinstance(tree, int):
            return ~tree
        children = (self._number(tree[0]), self._number(tree[1]))
        left, right = (self._quota(child) for child in children)
        self._children.append(children)
        self._portions.append((left, left + right))
        number = len(self._children) - 1
        self._above.update(dict.fromkeys(children, number))
        return number

    def _quota(self, node: int) -> int:
        return self._portions[node][1] if node >= 0 else self._quotas[~node]


Tree = int | tuple["Tree", "Tree"]


def _most_even_tree(quotas: Sequence[int]) -> tuple[float, Tree]:
    """The tree of sources in order of their quotas of which the worst source is off least, and by how much.

    In units of half a sample a source is off by one and by its portion of every node above it but the first.
    """
    order = sorted(range(len(quotas)), key=lambda source: quotas[source])  # so that no small one is lost in a sum
    sizes = np.array([quotas[source] for source in order], dtype=np.float64)
    ends = np.concatenate([[0.0], np.cumsum(sizes)])

    @functools.cache
    def best(first: int, end: int) -> tuple[NDArray[np.float64], Tree]:
        if end == first + 1:
            return np.ones(1), order[first]
        is_root = end - first == len(order)
        own = 0.0 if is_root else sizes[first:end] / (ends[end] - ends[first])
        middle = int(np.searchsorted(ends, (ends[first] + ends[end]) / 2))
        tried = []
        for cut in range(max(first + 1, middle - CUTS + 1), min(end - 1, middle + CUTS - 1) + 1):
            (left_off, left), (right_off, right) = best(first, cut), best(cut, end)
            tried.append((np.concatenate([left_off, right_off]) + own, (left, right)))
        return min(tried, key=lambda each: float(each[0].max()))

    off, tree = best(0, len(order))
    return (float(off.max()) / 2 if len(order) > 1 else 0.0), tree


def _portion(n: Integers, part: Integers, whole: Integers) -> Integers:
    """n · part / whole, rounded to the nearest, halves up; exact for n to 2^50 and whole to `MAX_WHOLE`.

    The quotient in floating point is one off at most, so that what it leaves is small and comes out right although both
    products are only known modulo 2^64.
    """
    estimate: Integers = (n * (part / whole)).astype(np.int64)
    rest: Integers = 2 * n * part + whole - 2 * estimate * whole
    found: Integers = estimate + rest // (2 * whole)
    return found


@functools.lru_cache(maxsize=8)
def _chairman_assignment(quotas: tuple[int, ...]) -> NDArray[np.int32]:
    """Source of each sample of one period, [sum(quotas)].

    The k-th sample of a source may come once the source is `slack` behind its share, and must come before it is
    1 - `slack` behind; among those that may, the most urgent one is taken. Times are in integers, exactly.
    """
    period, sources = sum(quotas), len(quotas)
    if sources == 1:
        return np.zeros(period, dtype=np.int32)
    slack = 2 * sources - 2  # in units of 1 / slack of a sample
    jobs = []
    for source, quota in enumerate(quotas):
        number = np.arange(quota, dtype=np.int64)
        first = -((number * slack + 1) * period // (-slack * quota))
        last = ((number + 1) * slack - 1) * period // (slack * quota)
        jobs.append(np.stack([first, last, np.full(quota, source)], axis=1))
    waiting = np.concatenate(jobs)
    waiting = waiting[np.argsort(waiting[:, 0], kind="stable")].tolist()
    schedule = np.empty(period, dtype=np.int32)
    ready: list[tuple[int, int]] = []
    following = 0
    for time in range(1, period + 1):
        while following < period and waiting[following][0] <= time:
            _, last, source = waiting[following]
            heapq.heappush(ready, (last, source))
            following += 1
        schedule[time - 1] = heapq.heappop(ready)[1]
    return schedule
