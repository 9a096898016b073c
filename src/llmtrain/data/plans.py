"""How much of each source a run takes, and when: from what the config says and the sizes of the sources.

Sizes and samples are counted in what the stage trains on: blocks of `train.sequence_length` tokens, conversations,
pairs or prompts.
"""

import logging
from collections.abc import Mapping
from typing import Any

from llmtrain.config.errors import DataError
from llmtrain.config.schema import CorpusConfig, MixedSourceConfig, RowsConfig
from llmtrain.data.ledger import Ledger
from llmtrain.data.mixture import Phase, PhasedMixture, weights_of_epochs, weights_of_temperature

log = logging.getLogger(__name__)


def source_weights(config: CorpusConfig | RowsConfig, sizes: Mapping[str, float]) -> dict[str, float]:
    """Weights at the start of the run, of all sources that have something; sizes in one unit for all."""
    sources: dict[str, MixedSourceConfig] = {
        name: source for name, source in config.sources.items() if sizes.get(name) or isinstance(config, CorpusConfig)
    }
    if config.temperature is not None:
        return weights_of_temperature({name: sizes[name] for name in sources}, config.temperature)
    epochs = {name: source.epochs for name, source in sources.items() if source.epochs is not None}
    if epochs:
        return weights_of_epochs(epochs, sizes)
    return {name: 1.0 if source.weight is None else source.weight for name, source in sources.items()}


def plan_mixture(
    config: CorpusConfig | RowsConfig, sizes: Mapping[str, int], samples: int, ledger: Ledger | None = None
) -> PhasedMixture:
    """The mixture of a run of `samples` samples; with a `ledger`, from there on.

    Raises DataError where a source that is wanted has nothing, or none is left before the first sample.
    """
    first = source_weights(config, sizes)
    later = [
        Phase(round(phase.start * samples), {name: w for name, w in phase.weights.items() if name in first})
        for phase in config.phases
    ]  # fmt: skip
    phases = [phase for phase in (Phase(0, first), *later) if phase.weights]
    empty = [name for phase in phases for name, weight in phase.weights.items() if weight and not sizes[name]]
    if empty or not phases:
        place = f"data.sources.{empty[0]}" if empty else "data.sources"
        raise DataError(f"{place}: nothing to train on: too little text or no rows")
    limits = {
        name: max(1, round(source.max_epochs * sizes[name]))
        for name, source in config.sources.items() if source.max_epochs is not None and sizes.get(name)
    }  # fmt: skip
    if ledger is not None and ledger.samples:
        limits = {name: max(limit, ledger.given.get(name, 0)) for name, limit in limits.items()}
        phases = ledger.go_on_with(phases, limits)
    drawn = ledger.samples if ledger is not None else 0
    return PhasedMixture(phases, limits, renormalise=config.when_exhausted == "renormalise", drawn=drawn)


def steps_left(mixture: PhasedMixture, steps: int, batch_rows: int) -> int:
    """`steps`, or fewer where the sources are used up before (`max_epochs`). Raises DataError where that is none."""
    if mixture.length is None or mixture.length >= steps * batch_rows:
        return steps
    if mixture.length < batch_rows:
        raise DataError(
            f"data: max_epochs leaves {mixture.length} rows in all, fewer than one batch of {batch_rows}; raise it"
        )
    log.info("data: max_epochs ends the run after %d of %d steps", mixture.length // batch_rows, steps)
    return mixture.length // batch_rows


def describe_plan(mixture: PhasedMixture, samples: int) -> dict[str, Any]:
    """What was asked for, for the lineage: the shares over the whole run, and of each stretch from its first sample."""
    phases = [phase for phase in mixture.phases if phase.start < samples]
    ends = [*(phase.start for phase in phases[1:]), samples]
    asked = dict.fromkeys(mixture.names, 0.0)
    for (start, shares), end in zip(phases, ends, strict=True):
        for name, share in shares.items():
            asked[name] += share * (end - start) / samples
    return {"shares": asked, "phases": [{"first_sample": start, "shares": dict(shares)} for start, shares in phases]}
