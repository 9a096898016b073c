import random
import time
from fractions import Fraction

import numpy as np
import pytest

from llmtrain.config.compose import load_config
from llmtrain.data.mixture import (
    Mixture,
    Phase,
    PhasedMixture,
    permute,
    place_of_value,
    sample_of,
    shuffled,
    weights_of_epochs,
    weights_of_temperature,
)  # fmt: skip
from llmtrain.data.plans import source_weights
from llmtrain.data.schedules import MAX_WHOLE

# The 22 shares of the Pile (Gao et al. 2020, table 1), in percent.
PILE = [18.11, 14.40, 12.07, 10.01, 8.96, 7.59, 6.12, 5.13, 3.65, 3.07, 2.17, 1.55, 1.53, 1.24, 0.88, 0.75, 0.73, 0.62,
        0.60, 0.38, 0.30, 0.14]  # fmt: skip


def worst_deviation(weights: list[float], samples: int) -> float:
    mixture = Mixture({str(i): weight for i, weight in enumerate(weights)})
    source, _ = mixture(np.arange(samples))
    realised = np.cumsum(source[:, None] == np.arange(len(weights)), axis=0)
    shares = np.array(mixture.quotas) / sum(mixture.quotas)
    return float(np.abs(realised - np.arange(1, samples + 1)[:, None] * shares).max())


def test_the_piles_shares_are_met_within_one_sample_at_every_prefix() -> None:
    assert worst_deviation(PILE, 40_000) <= 1 - 1 / (2 * len(PILE) - 2) + 1e-9


@pytest.mark.parametrize("trial", range(30))
def test_random_weights_are_met_within_one_sample_at_every_prefix(trial: int) -> None:
    draw = np.random.default_rng(trial)
    weights = draw.integers(1, 200, size=draw.integers(2, 12)).tolist()
    assert worst_deviation(weights, 3 * sum(weights)) <= 1 - 1 / (2 * len(weights) - 2) + 1e-9


def test_a_share_is_what_was_written() -> None:
    assert Mixture({"a": 0.1, "b": 0.2, "c": 0.7}).quotas == [1, 2, 7]
    assert Mixture({"a": 3}).quotas == [1]


def test_only_weights_beyond_all_measure_are_rounded() -> None:
    assert Mixture({"a": 1.23456789, "b": 9.87654321, "c": 1e-9}).quotas == [1234567890, 9876543210, 1]
    rounded = Mixture({"a": 1.0, "b": 1 / 3, "c": 1e-30})
    assert sum(rounded.quotas) <= MAX_WHOLE
    assert rounded.quotas[2] == 1
    assert rounded.shares["a"] == pytest.approx(0.75, abs=1e-15)


def test_each_source_is_counted_through_without_gaps() -> None:
    mixture = Mixture({"a": 0.3, "b": 0.5, "c": 0.2})
    source, number = mixture(np.arange(1000))
    for j in range(3):
        assert (number[source == j] == np.arange((source == j).sum())).all()


def test_counts_are_those_of_the_sequence() -> None:
    mixture = Mixture({"a": 1.5, "b": 2.25, "c": 7})
    source, _ = mixture(np.arange(500))
    for n in (0, 1, 7, 43, 44, 499, 500):
        assert list(mixture.counts(n).values()) == [int((source[:n] == j).sum()) for j in range(3)]
    assert sum(mixture.counts(10**15).values()) == 10**15


def test_far_samples_are_as_quick_as_the_first() -> None:
    mixture = Mixture({str(i): weight for i, weight in enumerate(PILE)})

    def seconds(start: int) -> float:
        taken = []
        for _ in range(20):
            begin = time.perf_counter()
            mixture(np.arange(start, start + 64))
            taken.append(time.perf_counter() - begin)
        return min(taken)

    seconds(0)
    assert seconds(10**12) < 5 * seconds(0)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 100, 101, 1000, 65_537])
def test_a_permutation_holds_each_number_once(n: int) -> None:
    assert (np.sort(permute(np.arange(n), n, 7)) == np.arange(n)).all()


def test_a_permutation_is_its_keys_own() -> None:
    numbers = np.arange(500)
    assert (permute(numbers, 500, 1) == permute(numbers, 500, 1)).all()
    assert (permute(numbers, 500, 1) != permute(numbers, 500, 2)).any()
    assert permute(10**14 - 1, 10**14, 3)[0] < 10**14


def test_a_permutation_shuffles() -> None:
    n = 20_000
    order = permute(np.arange(n), n, 3)
    assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.03
    assert (np.diff(order) == 1).mean() < 0.001
    halves = order[: n // 2] < n // 2
    assert abs(halves.mean() - 0.5) < 0.02


def test_small_permutations_reach_all_orders_evenly() -> None:
    orders = [tuple(permute(np.arange(3), 3, key)) for key in range(1200)]
    frequencies = [orders.count(each) for each in set(orders)]
    assert len(frequencies) == 6
    assert min(frequencies) > 130


def test_every_epoch_holds_each_row_once_in_a_new_order() -> None:
    samples = np.arange(300)
    rows = shuffled(samples, np.full(300, 100), np.full(300, 5)).reshape(3, 100)
    assert (np.sort(rows, axis=1) == np.arange(100)).all()
    assert (rows[0] != rows[1]).any()
    assert (rows[1] != rows[2]).any()
    assert rows[2, 50] == shuffled(samples[250:251], np.array([100]), np.array([5]))[0]


def test_sources_are_shuffled_apart() -> None:
    one, two = shuffled(np.array([3, 3]), np.array([1000, 1000]), np.array([5, 6]))
    assert one != two
    assert shuffled(np.array([3]), np.array([1000]), np.array([6]))[0] == two


def sequence(mixture: PhasedMixture, samples: int) -> list[tuple[str, int]]:
    source, number = mixture(np.arange(samples))
    return [(mixture.names[i], n) for i, n in zip(source, number.tolist(), strict=True)]


def test_one_phase_is_the_plain_mixture() -> None:
    weights = {"a": 0.3, "b": 0.5, "c": 0.2}
    for one, other in zip(
        PhasedMixture([Phase(0, weights)])(np.arange(500)), Mixture(weights)(np.arange(500)), strict=True
    ):
        assert (one == other).all()


def test_each_phase_goes_on_where_the_one_before_stopped() -> None:
    phases = [Phase(0, {"a": 3, "b": 1}), Phase(101, {"b": 1, "c": 1}), Phase(203, {"a": 1})]
    mixture = PhasedMixture(phases)
    drawn = sequence(mixture, 400)
    for name in "abc":
        assert [n for each, n in drawn if each == name] == list(range(sum(each == name for each, _ in drawn)))
    assert {name for name, _ in drawn[101:203]} == {"b", "c"}
    assert {name for name, _ in drawn[203:]} == {"a"}
    for n in (0, 50, 101, 150, 203, 400):
        assert mixture.counts(n) == {name: sum(each == name for each, _ in drawn[:n]) for name in "abc"}
    assert mixture.length is None
    assert [phase.start for phase in mixture.phases] == [0, 101, 203]


def test_a_spent_source_leaves_the_rest_to_the_others() -> None:
    mixture = PhasedMixture([Phase(0, {"a": 2, "b": 1, "c": 1})], {"a": 50, "b": 40})
    drawn = sequence(mixture, 300)
    counts = {name: sum(each == name for each, _ in drawn) for name in "abc"}
    assert counts == {"a": 50, "b": 40, "c": 210}
    end = max(i for i, (name, _) in enumerate(drawn) if name == "a")
    assert abs(sum(name == "b" for name, _ in drawn[:end]) - end / 4) < 1
    assert mixture.counts(10**12) == {"a": 50, "b": 40, "c": 10**12 - 90}


def test_limits_can_end_the_sequence() -> None:
    stopping = PhasedMixture([Phase(0, {"a": 3, "b": 1})], {"a": 30}, renormalise=False)
    assert stopping.length is not None
    assert stopping.counts(stopping.length)["a"] == 30
    assert stopping.counts(stopping.length - 1)["a"] == 29
    used_up = PhasedMixture([Phase(0, {"a": 3, "b": 1})], {"a": 30, "b": 5})
    assert used_up.length == 35


def test_a_source_spent_before_a_phase_is_left_out_of_it() -> None:
    mixture = PhasedMixture([Phase(0, {"a": 1}), Phase(20, {"a": 1, "b": 1})], {"a": 10, "b": 100})
    assert mixture.length == 10  # nothing to fill the gap with
    mixture = PhasedMixture([Phase(0, {"a": 1, "c": 1}), Phase(40, {"a": 1, "b": 1})], {"a": 10})
    assert {name for name, _ in sequence(mixture, 80)[40:]} == {"b"}


def test_weights_of_epochs_and_temperature() -> None:
    sizes = {"a": 100.0, "b": 25.0}
    assert weights_of_epochs({"a": 1.0, "b": 2.0}, sizes) == {"a": 100.0, "b": 50.0}
    assert weights_of_temperature(sizes, 1.0) == sizes
    assert weights_of_temperature(sizes, 2.0) == {"a": 10.0, "b": 5.0}


def test_a_trillion_samples_of_the_pile() -> None:
    """22 sources: shares within one sample at random prefixes, batches in milliseconds, whatever the step."""
    weights = {str(i): weight for i, weight in enumerate(PILE)}
    mixture = PhasedMixture([Phase(0, weights)])
    shares = np.array(PILE) / sum(PILE)
    for n in np.random.default_rng(0).integers(0, 10**12, size=1000).tolist():
        assert np.abs(np.array(list(mixture.counts(n).values())) - n * shares).max() < 1.001  # float64 of n x share


@pytest.mark.parametrize("n", [1, 2, 7, 100, 1009])
def test_the_place_of_a_value_is_the_inverse(n: int) -> None:
    for key in (0, 5, 2**63):
        assert [place_of_value(int(value), n, key) for value in permute(np.arange(n), n, key)] == list(range(n))


def test_the_sample_that_gives_a_row() -> None:
    size, key = 37, 123456789
    samples = np.arange(3 * size)
    rows = shuffled(samples, np.full(len(samples), size), np.full(len(samples), key))
    for sample, row in zip(samples.tolist(), rows.tolist(), strict=True):
        assert sample_of(row, size, key, sample // size) == sample


def test_the_piles_weights_as_they_are_configured() -> None:
    """They follow from epochs and have no small common denominator; still, at any of 10^12 samples they are met."""
    data = load_config("pretrain", ["data=pile"]).data
    weights = source_weights(data, {name: source.published_gib or 0 for name, source in data.sources.items()})
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
    mixture, whole = Mixture(weights), sum(exact.values())
    assert {name: Fraction(quota, sum(mixture.quotas)) for name, quota in mixture.by_name.items()} == {
        name: weight / whole for name, weight in exact.items()
    }
    for n in random.Random(0).choices(range(10**12), k=1000):
        counts = mixture.counts(n)
        assert sum(counts.values()) == n
        assert all(abs(counts[name] - n * weight / whole) < 1 for name, weight in exact.items())
