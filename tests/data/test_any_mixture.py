"""Any weights, sizes, limits and phases: shares are kept, nothing comes twice, and a resume changes nothing."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from llmtrain.config.schema import CorpusConfig, PhaseConfig, SourceConfig
from llmtrain.data import schedules
from llmtrain.data.batches import RowOrder, share
from llmtrain.data.ledger import Ledger
from llmtrain.data.mixture import Mixture, Phase, PhasedMixture
from llmtrain.data.plans import plan_mixture

NAMES = "abcdef"
SAMPLES = 240
MANY = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))

WEIGHT = st.integers(0, 40).map(float) | st.floats(0, 1e9) | st.sampled_from([1e-300, 1e-9, 0.1, 1 / 3, 1e300])
WEIGHTS = st.dictionaries(st.sampled_from(NAMES), WEIGHT, min_size=1).filter(lambda weights: any(weights.values()))
STARTS = st.lists(st.integers(1, SAMPLES - 1), max_size=3, unique=True).map(sorted)
SIZES = st.fixed_dictionaries({name: st.integers(1, 70) for name in NAMES})


@st.composite
def phased(draw: st.DrawFn) -> list[Phase]:
    return [Phase(start, draw(WEIGHTS)) for start in [0, *draw(STARTS)]]


@st.composite
def corpora(draw: st.DrawFn) -> CorpusConfig:
    first = draw(WEIGHTS)
    limits = draw(st.dictionaries(st.sampled_from(sorted(first)), st.floats(0.01, 4), max_size=3))
    weights = st.dictionaries(st.sampled_from(sorted(first)), WEIGHT).filter(lambda each: any(each.values()))
    repeated = weights | st.just(first)  # a phase may have the weights of the one before
    return CorpusConfig(
        sources={
            name: SourceConfig(path=name, weight=weight, max_epochs=limits.get(name)) for name, weight in first.items()
        },
        phases=[PhaseConfig(start=start / SAMPLES, weights=draw(repeated)) for start in draw(STARTS)],
        when_exhausted=draw(st.sampled_from(["renormalise", "stop"])),
    )


@pytest.fixture(autouse=True)
def short_periods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "MAX_PERIOD", 150)  # above it, nothing is written down: both kinds are met


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoint")


def end(mixed: PhasedMixture) -> int:
    return SAMPLES if mixed.length is None else min(SAMPLES, mixed.length)


def names(mixed: PhasedMixture) -> list[str]:
    """The source of each sample."""
    return [mixed.names[each] for each in mixed(np.arange(end(mixed)))[0].tolist()]


def rows(mixed: PhasedMixture, sizes: dict[str, int]) -> list[tuple[str, int]]:
    """Source and row of each sample."""
    source, row = RowOrder(mixed, sizes, end(mixed), seed=5)(0)
    return [(mixed.names[i], j) for i, j in zip(source.tolist(), row.tolist(), strict=True)]


def check_shares(mixed: PhasedMixture) -> None:
    """In every stretch, after each sample, as close to the weights as the schedule says."""
    sequence = np.array(names(mixed), dtype=object)
    borders = [*(phase.start for phase in mixed.quotas), SAMPLES]
    for (start, quotas), behind in zip(mixed.quotas, borders[1:], strict=True):
        here = sequence[start:behind]
        assert set(here) <= set(quotas)
        n, made = np.arange(1, len(here) + 1), Mixture(quotas)
        for name, part in made.shares.items():
            assert (abs(np.cumsum(here == name) - n * part) <= made.deviation + 1e-9).all()


def check_epochs(drawn: list[tuple[str, int]], sizes: dict[str, int]) -> None:
    """Each epoch of a source holds every row once, the last one no row twice."""
    for name, size in sizes.items():
        mine = [row for each, row in drawn if each == name]
        for first in range(0, len(mine), size):
            epoch = mine[first : first + size]
            assert len(set(epoch)) == len(epoch)
            assert set(epoch) <= set(range(size))


@MANY
@given(weights=WEIGHTS)
def test_quotas_are_whole_and_give_themselves(weights: dict[str, float]) -> None:
    weights = {name: weight for name, weight in weights.items() if weight}
    made = Mixture(weights)
    assert min(made.quotas) >= 1
    assert sum(made.quotas) <= schedules.MAX_WHOLE
    assert made.deviation < 1.5
    assert Mixture(made.by_name).quotas == made.quotas
    for name, weight in weights.items():  # in floating point, 1e300 + 1 is 1e300
        assert abs(made.shares[name] - weight / sum(weights.values())) <= 1e-9


@MANY
@given(phases=phased(), limits=st.dictionaries(st.sampled_from(NAMES), st.integers(1, 90)), renormalise=st.booleans())
def test_shares_and_counts(phases: list[Phase], limits: dict[str, int], renormalise: bool) -> None:
    mixed = PhasedMixture(phases, limits, renormalise=renormalise)
    check_shares(mixed)
    sequence = names(mixed)
    _, before = mixed(np.arange(len(sequence)))
    seen: Counter[str] = Counter()
    for n, name in enumerate(sequence):
        assert before[n] == seen[name]
        seen[name] += 1
        assert mixed.counts(n + 1) == {each: seen[each] for each in mixed.names}
        assert seen[name] <= limits.get(name, SAMPLES)
        if seen[name] == limits.get(name) and not renormalise:
            assert mixed.length == n + 1
    if mixed.length is not None and mixed.length < SAMPLES:
        assert any(seen[name] == limit for name, limit in limits.items())


@MANY
@given(
    phases=phased(), sizes=SIZES, seed=st.integers(0, 2**32), batch_rows=st.integers(1, 40),
    world=st.integers(1, 70), step=st.integers(0, 10**12),
)  # fmt: skip
def test_processes_share_the_batch(
    phases: list[Phase], sizes: dict[str, int], seed: int, batch_rows: int, world: int, step: int
) -> None:
    order = RowOrder(PhasedMixture(phases), sizes, batch_rows, seed)
    whole = np.stack(order(step))
    parts = [whole[:, share(batch_rows, rank, world)] for rank in range(world)]
    assert (np.concatenate(parts, axis=1) == whole).all()
    assert max(part.shape[1] for part in parts) - min(part.shape[1] for part in parts) <= 1
    # the batches of any other size hold the same rows in the same order
    single = RowOrder(PhasedMixture(phases), sizes, 1, seed)
    first = step * batch_rows
    assert (whole[:, 0] == np.stack(single(first))[:, 0]).all()
    assert (whole[:, -1] == np.stack(single(first + batch_rows - 1))[:, 0]).all()


@MANY
@given(phases=phased(), sizes=SIZES)
def test_no_row_comes_twice_before_all_came(phases: list[Phase], sizes: dict[str, int]) -> None:
    check_epochs(rows(PhasedMixture(phases), sizes), sizes)


def resumed(
    folder: Path, mixed: PhasedMixture, sample: int, config: CorpusConfig, sizes: dict[str, int]
) -> PhasedMixture:
    """The mixture of a run that is stopped at a sample and goes on with a config."""
    Ledger.of(mixed, sample, sizes, dict.fromkeys(NAMES, "")).write(folder)
    return plan_mixture(config, sizes, SAMPLES, Ledger.read(folder))


def cut(data: st.DataObject, mixed: PhasedMixture) -> int:
    """Any sample, those where a stretch begins among them."""
    places = [phase.start + near for phase in mixed.quotas for near in (0, 1)]
    return data.draw(st.integers(0, end(mixed)) | st.sampled_from([each for each in places if each <= end(mixed)]))


@MANY
@given(config=corpora(), sizes=SIZES, data=st.data())
def test_a_resume_changes_nothing(config: CorpusConfig, sizes: dict[str, int], folder: Path, data: Any) -> None:
    whole = plan_mixture(config, sizes, SAMPLES)
    again = whole
    for sample in sorted(cut(data, whole) for _ in range(data.draw(st.integers(1, 3)))):
        again = resumed(folder, again, sample, config, sizes)
    assert again.length == whole.length
    assert rows(again, sizes) == rows(whole, sizes)
    assert +Counter(again.counts(end(again))) == +Counter(whole.counts(end(whole)))  # but for sources at 0


@MANY
@given(configs=st.lists(corpora(), min_size=2, max_size=3), sizes=SIZES, data=st.data())
def test_a_change_leaves_the_past_alone(
    configs: list[CorpusConfig], sizes: dict[str, int], folder: Path, data: Any
) -> None:
    mixed, last = plan_mixture(configs[0], sizes, SAMPLES), 0
    for config in configs[1:]:
        sample = max(last, cut(data, mixed))
        assume(sample > 0)
        changed = resumed(folder, mixed, sample, config, sizes)
        drawn = rows(changed, sizes)
        assert drawn[:sample] == rows(mixed, sizes)[:sample]
        check_epochs(drawn, sizes)
        check_shares(changed)
        given_before = Counter(name for name, _ in drawn[:sample])
        for name, count in Counter(name for name, _ in drawn).items():
            epochs = config.sources[name].max_epochs if name in config.sources else None
            limit = SAMPLES if epochs is None else max(1, round(epochs * sizes[name]))
            assert count <= max(limit, given_before[name])
        assert {name for name, _ in drawn[sample:]} <= set(config.sources)
        mixed, last = changed, sample
        assume(end(mixed) > sample)
