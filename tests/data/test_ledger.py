from pathlib import Path

import numpy as np
import pytest

from llmtrain.config.errors import DataError
from llmtrain.config.schema import CorpusConfig, PhaseConfig, SourceConfig
from llmtrain.data.batches import RowOrder
from llmtrain.data.ledger import Ledger
from llmtrain.data.plans import plan_mixture

SIZES = {"a": 5000, "b": 4000, "c": 3000}
CONTENTS = {"a": "1", "b": "2", "c": "3"}
SAMPLES = 3000


def corpus(weights: dict[str, float], limits: dict[str, float] | None = None, **options: object) -> CorpusConfig:
    sources = {
        name: SourceConfig(path=name, weight=weight, max_epochs=(limits or {}).get(name))
        for name, weight in weights.items()
    }  # fmt: skip
    return CorpusConfig(sources=sources, **options)


def drawn(mixture, sizes: dict[str, int], first: int, last: int) -> list[tuple[str, int]]:
    order = RowOrder(mixture, sizes, 1, seed=3)
    return [(order.names[int(s[0])], int(r[0])) for s, r in (order(i) for i in range(first, last))]


def changed(tmp_path: Path, before: CorpusConfig, after: CorpusConfig, sample: int):
    """The mixture of a run that began with one config and goes on with another, through a file."""
    old = plan_mixture(before, SIZES, SAMPLES)
    Ledger.of(old, sample, SIZES, CONTENTS).write(tmp_path)
    ledger = Ledger.read(tmp_path)
    ledger.check(CONTENTS)
    return old, plan_mixture(after, SIZES, SAMPLES, ledger)


def test_the_past_stays_and_nothing_is_drawn_twice(tmp_path: Path) -> None:
    old, new = changed(tmp_path, corpus({"a": 0.7, "b": 0.3}), corpus({"a": 0.1, "c": 0.9}), 1001)
    assert drawn(new, SIZES, 0, 1001) == drawn(old, SIZES, 0, 1001)
    rows = drawn(new, SIZES, 0, SAMPLES)
    assert len(set(rows)) == len(rows)  # no source has been gone through once
    later = [name for name, _ in rows[1001:]]
    assert later.count("b") == 0
    assert later.count("a") == pytest.approx(0.1 * 1999, abs=1)
    assert new.counts(SAMPLES) == {name: [n for n, _ in rows].count(name) for name in new.names}


def test_the_same_config_gives_the_same_mixture(tmp_path: Path) -> None:
    config = corpus({"a": 0.7, "b": 0.3}, phases=[PhaseConfig(start=0.5, weights={"b": 1.0})])
    for sample in (0, 1, 777, 1500, 2000):
        old, new = changed(tmp_path, config, config, sample)
        for first in (0, 770, 1495, 1990):
            assert (np.stack(old(np.arange(first, first + 20))) == np.stack(new(np.arange(first, first + 20)))).all()
        assert old.counts(SAMPLES) == new.counts(SAMPLES)


def test_a_spent_source_does_not_begin_the_schedule_again(tmp_path: Path) -> None:
    config = corpus({"a": 0.3, "b": 0.3, "c": 0.4}, {"a": 0.02})  # a is spent after 333 samples
    old, new = changed(tmp_path, config, config, 700)
    assert (np.stack(old(np.arange(600, 800))) == np.stack(new(np.arange(600, 800)))).all()


def test_changes_upon_changes(tmp_path: Path) -> None:
    first, second = corpus({"a": 1.0}), corpus({"a": 0.5, "b": 0.5})
    _, mixture = changed(tmp_path, first, second, 500)
    Ledger.of(mixture, 900, SIZES, CONTENTS).write(tmp_path)
    unchanged = plan_mixture(second, SIZES, SAMPLES, Ledger.read(tmp_path))
    assert drawn(unchanged, SIZES, 850, 950) == drawn(mixture, SIZES, 850, 950)
    again = plan_mixture(corpus({"b": 1.0}), SIZES, SAMPLES, Ledger.read(tmp_path))
    assert again.counts(900) == mixture.counts(900) == {"a": 700, "b": 200}
    assert again.counts(1000) == {"a": 700, "b": 300}
    rows = drawn(again, SIZES, 0, 1500)
    assert len(set(rows)) == 1500


def test_limits_count_what_was_given_before(tmp_path: Path) -> None:
    before, after = corpus({"a": 0.5, "b": 0.5}), corpus({"a": 0.5, "b": 0.5}, {"a": 0.1})
    _, new = changed(tmp_path, before, after, 800)  # 400 of each; a may give 500
    assert new.counts(SAMPLES) == {"a": 500, "b": SAMPLES - 500}
    _, new = changed(tmp_path, before, corpus({"a": 0.5, "b": 0.5}, {"a": 0.01}), 800)  # a has given more already
    assert new.counts(SAMPLES) == {"a": 400, "b": SAMPLES - 400}


@pytest.mark.parametrize("when_exhausted", ["renormalise", "stop"])
def test_a_limit_below_what_was_given_leaves_the_past(tmp_path: Path, when_exhausted: str) -> None:
    before = corpus({"a": 0.5, "b": 0.2, "c": 0.3})
    for sample in range(1, 30):
        for name in "abc":
            after = corpus({"a": 0.5, "b": 0.2, "c": 0.3}, {name: 1e-4}, when_exhausted=when_exhausted)
            old, new = changed(tmp_path, before, after, sample)
            samples = np.arange(sample)
            assert (np.stack(old(samples)) == np.stack(new(samples))).all()
            assert new.counts(sample) == old.counts(sample)
            assert new.length is None or new.length >= sample


def test_a_source_that_changed_is_refused(tmp_path: Path) -> None:
    Ledger.of(plan_mixture(corpus({"a": 1.0, "b": 1.0}), SIZES, 10), 4, SIZES, CONTENTS).write(tmp_path)
    ledger = Ledger.read(tmp_path)
    ledger.check({"a": "1", "new": "9"})
    with pytest.raises(DataError, match=r"data.sources.b: its rows have changed since the run drew 2"):
        ledger.check({"a": "1", "b": "other"})
