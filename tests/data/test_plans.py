"""From the config to the mixture of a run."""

import pytest

from llmtrain.config.errors import DataError
from llmtrain.config.schema import CorpusConfig, PhaseConfig, RowsConfig, RowSourceConfig, SourceConfig
from llmtrain.data.plans import describe_plan, plan_mixture, source_weights, steps_left

SIZES = {"a": 100, "b": 25}


def corpus(a: dict | None = None, b: dict | None = None, **options: object) -> CorpusConfig:
    sources = {"a": SourceConfig(path="a", **(a or {})), "b": SourceConfig(path="b", **(b or {}))}
    return CorpusConfig(sources=sources, **options)  # type: ignore[arg-type]


def test_weights_are_shares_epochs_or_sizes() -> None:
    assert source_weights(corpus(), SIZES) == {"a": 1.0, "b": 1.0}
    assert source_weights(corpus({"weight": 3.0}, {"weight": 0.0}), SIZES) == {"a": 3.0, "b": 0.0}
    assert source_weights(corpus({"epochs": 1.0}, {"epochs": 2.0}), SIZES) == {"a": 100.0, "b": 50.0}
    assert source_weights(corpus(temperature=2.0), SIZES) == {"a": 10.0, "b": 5.0}


def test_sources_of_rows_without_rows_are_left_out() -> None:
    config = RowsConfig(sources={"a": RowSourceConfig(path="a"), "b": RowSourceConfig(path="b")})
    assert source_weights(config, {"a": 3}) == {"a": 1.0}


def test_epochs_mean_that_all_sources_end_together() -> None:
    mixture = plan_mixture(corpus({"epochs": 1.0}, {"epochs": 2.0}), SIZES, 150)
    assert mixture.counts(150) == {"a": 100, "b": 50}


def test_phases_begin_at_shares_of_the_run() -> None:
    config = corpus({"weight": 1.0}, {"weight": 0.0}, phases=[PhaseConfig(start=0.8, weights={"b": 1.0})])
    mixture = plan_mixture(config, SIZES, 1000)
    assert mixture.counts(1000) == {"a": 800, "b": 200}
    assert describe_plan(mixture, 1000) == {
        "shares": {"a": 0.8, "b": pytest.approx(0.2)},
        "phases": [{"first_sample": 0, "shares": {"a": 1.0}}, {"first_sample": 800, "shares": {"b": 1.0}}],
    }


def test_max_epochs_renormalises_or_ends_the_run(caplog: pytest.LogCaptureFixture) -> None:
    limited = {"max_epochs": 2.0}
    mixture = plan_mixture(corpus({}, limited), SIZES, 1000)
    assert mixture.counts(1000) == {"a": 950, "b": 50}
    assert steps_left(mixture, 250, 4) == 250
    stopping = plan_mixture(corpus({}, limited, when_exhausted="stop"), SIZES, 1000)
    assert stopping.length is not None
    assert abs(stopping.length - 100) <= 1
    with caplog.at_level("INFO"):
        steps = steps_left(stopping, 250, 4)
    assert steps in (24, 25)
    assert caplog.messages == [f"data: max_epochs ends the run after {steps} of 250 steps"]
    with pytest.raises(DataError, match="max_epochs leaves"):
        steps_left(stopping, 250, 512)


def test_a_source_with_too_little_text_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.sources\.b.*too little text"):
        plan_mixture(corpus(), {"a": 10, "b": 0}, 100)
    plan_mixture(corpus({}, {"weight": 0.0}), {"a": 10, "b": 0}, 100)
