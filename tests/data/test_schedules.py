"""Orders that are written down, and orders that are not: what both must keep."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from llmtrain.data.schedules import MAX_WHOLE, Halving, Period, Schedule, _portion, schedule

KINDS = (Period, Halving)
QUOTAS = ([7], [3, 3], [1, 1, 1], [60, 30, 10], [1, 2, 3, 4, 5, 6, 700], [1] * 22, [1, 10, 100, 1000])
Kind = Callable[[Sequence[int]], Schedule]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quotas", QUOTAS)
def test_counts_ranks_and_places_are_those_of_the_sequence(kind: Kind, quotas: list[int]) -> None:
    made, samples = kind(quotas), np.arange(min(3 * sum(quotas), 2500))
    source, rank = made(samples)
    seen = np.cumsum(source[:, None] == np.arange(len(quotas)), axis=0)
    assert (rank == seen[samples, source] - 1).all()
    for n in range(0, len(samples), 7):
        assert made.counts(n + 1) == seen[n].tolist()
    for n, (each, before) in enumerate(zip(source.tolist(), rank.tolist(), strict=True)):
        assert made.samples_until(each, before + 1) == n + 1
    shares = np.array(quotas) / sum(quotas)
    assert (abs(seen - (samples[:, None] + 1) * shares) <= made.deviation + 1e-9).all()


def test_nothing_is_off_by_more_than_a_tree_says_up_to_10_to_the_12() -> None:
    draw = np.random.default_rng(0)
    for size in (2, 5, 22, 100):
        quotas = (10 ** draw.uniform(10, 14, size)).astype(np.int64).tolist()
        made, whole = Halving(quotas), sum(quotas)
        assert made.deviation < 1.2
        for n in draw.integers(0, 10**12, 200).tolist():
            counts = made.counts(n)
            assert sum(counts) == n
            assert all(
                abs(count * whole - n * quota) < 1.2 * whole for count, quota in zip(counts, quotas, strict=True)
            )
            source, rank = made(np.array([n]))
            after = made.counts(n + 1)
            assert (after[source[0]], counts[source[0]]) == (rank[0] + 1, rank[0])
            assert made.samples_until(int(source[0]), int(rank[0]) + 1) == n + 1


def test_a_portion_is_exact_where_its_products_do_not_fit() -> None:
    draw = np.random.default_rng(1)
    n = draw.integers(0, 2**50, 5000)
    whole = draw.integers(2, MAX_WHOLE, 5000)
    part = np.maximum((whole * draw.random(5000)).astype(np.int64), 1)
    exact = [(2 * a * b + c) // (2 * c) for a, b, c in zip(n.tolist(), part.tolist(), whole.tolist(), strict=True)]
    assert _portion(n, part, whole).tolist() == exact


def test_short_periods_are_written_down() -> None:
    assert isinstance(schedule([60, 30, 10]), Period)
    assert isinstance(schedule([60_000, 30_001, 10_000]), Halving)
