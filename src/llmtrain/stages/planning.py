"""What a run draws from its sources, and for how many steps."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llmtrain.config.schema import CorpusConfig, RowsConfig, StageConfig, TrainConfig
from llmtrain.data.batches import RowOrder
from llmtrain.data.encoding import AnswerRow, RankingRow
from llmtrain.data.ledger import Ledger
from llmtrain.data.mixture import PhasedMixture
from llmtrain.data.plans import plan_mixture, steps_left


@dataclasses.dataclass
class Plan:
    """What a run draws from its sources."""

    mixture: PhasedMixture
    steps: int
    batch_rows: int
    sizes: Mapping[str, int]
    """Rows of each source, of those too that are no longer drawn from."""
    contents: Mapping[str, str]

    def order(self, seed: int) -> RowOrder:
        """Which row comes when."""
        return RowOrder(self.mixture, self.sizes, self.batch_rows, seed)

    def ledger(self, step: int) -> Ledger:
        """What the sources have given after `step` steps."""
        return Ledger.of(self.mixture, step * self.batch_rows, self.sizes, self.contents)


def make_plan(
    data: CorpusConfig | RowsConfig, train: TrainConfig, sizes: Mapping[str, int],
    said: Mapping[str, Mapping[str, Any]], *, ledger: Ledger | None = None, parameters: int = 0,
    tokens_per_row: int = 0,
) -> Plan:  # fmt: skip
    """The plan of a run; `sizes` are the sources' rows, of `tokens_per_row` (pretraining).

    `said` is what the lineage says of the sources. With the `ledger` of a checkpoint, what was drawn up to there stays.
    Raises DataError for a source without rows, and for one whose rows have changed since the ledger was written.
    """
    contents = {name: str(each["content"]) for name, each in said.items()}
    if ledger:
        ledger.check(contents)
        contents, sizes = ledger.contents | contents, ledger.sizes | dict(sizes)
    now = {name: sizes[name] for name in data.sources}
    batch_rows = rows_per_step(train)
    steps = num_steps(train, rows=sum(now.values()), parameters=parameters, tokens_per_row=tokens_per_row)
    mixture = plan_mixture(data, now, steps * batch_rows, ledger)
    return Plan(mixture, steps_left(mixture, steps, batch_rows), batch_rows, sizes, contents)


def row_digests(data: RowsConfig, rows: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """What the lineage says of each source: its path, how many rows were used, and a digest of their ids in order."""
    return {
        name: {"path": data.sources[name].path, "rows": len(each), "content": _digest(each)}
        for name, each in rows.items()
    }  # fmt: skip


def _digest(rows: Sequence[Any]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        for side in row.sides:
            digest.update(np.asarray(side.tokens, dtype=np.int64).tobytes())
        if isinstance(row, AnswerRow):
            digest.update(bytes([row.desirable]))
        # the order of the answers, unless they are just the better and the worse one
        if isinstance(row, RankingRow) and row[1:3] != (((0, 1),), (None,)):
            digest.update(repr(row[1:3]).encode())
    return digest.hexdigest()


def drawn(config: StageConfig) -> TrainConfig:
    """`train` as it concerns the data: with the prompts of a step as its rows, where each has several answers."""
    samples = getattr(getattr(config, "method", None), "samples_per_prompt", 1)
    if config.train.batch_rows is None or samples == 1:
        return config.train
    return dataclasses.replace(config.train, batch_rows=config.train.batch_rows // samples)


def rows_per_step(train: TrainConfig) -> int:
    """Rows of a step over all processes."""
    return train.batch_rows or (train.batch_tokens or train.sequence_length) // train.sequence_length


def num_lengths(train: TrainConfig) -> int:
    """Lengths that rows of a fixed one have in the run: one, or those of the length warm-up, compiled one by one."""
    if train.length_warmup is None:
        return 1
    return (train.sequence_length // train.length_warmup.start_length).bit_length()


def num_steps(train: TrainConfig, *, rows: int, parameters: int = 0, tokens_per_row: int = 0) -> int:
    """The length of the run in steps; an epoch has `rows`, a row `tokens_per_row` tokens (pretraining)."""
    if train.steps is not None:
        return train.steps
    batch_rows = rows_per_step(train)
    if train.epochs is not None:
        return max(1, round(train.epochs * rows / batch_rows))
    tokens = train.tokens or round((train.tokens_per_parameter or 0) * parameters)
    return max(1, round(tokens / (batch_rows * tokens_per_row)))
