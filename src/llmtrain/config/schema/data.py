"""What a model is trained on."""

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from llmtrain.config.schema.strict import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SourceConfig:
    """One source of text documents. Read by `data/documents.py`."""

    path: str
    """File, glob, folder or hub id (JSONL, JSON, Parquet, text; also .gz), or `embedded:prose|code|arithmetic`."""
    weight: float = Field(default=1.0, gt=0)
    """Share of the mixture, relative to the other sources' weights."""
    text_column: str = "text"
    """Column that holds the text."""
    name: str | None = None
    """Configuration name of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset or of a folder with splits."""
    validation_path: str | None = None
    """Held-out documents. Null: every `data.validation_every`-th document of `path` is held out."""
    max_documents: int | None = Field(default=None, ge=1)
    """Read at most this many documents."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CorpusConfig:
    """The pretraining mixture: sources and weights."""

    sources: dict[str, SourceConfig]
    """Sources by name; the names appear in metrics as `data/<name>/tokens`."""
    validation_every: int = Field(default=50, ge=2)
    """Hold out every n-th document of a source that names no `validation_path`."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RowSourceConfig:
    """One source of conversations or preference pairs. Read by `data/rows.py`."""

    path: str
    """A file, glob, folder or hub id, or `embedded:arithmetic`."""
    weight: float = Field(default=1.0, gt=0)
    """Share of the mixture, relative to the other sources' weights."""
    name: str | None = None
    """Configuration name of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset or of a folder with splits."""
    validation_path: str | None = None
    """Held-out rows. Null: every `data.validation_every`-th row of `path` is held out."""
    max_rows: int | None = Field(default=None, ge=1)
    """Read at most this many rows."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SampledPairsConfig:
    """Rejected answers sampled from the starting model itself, checked against the right answer."""

    share: float = Field(default=0.5, gt=0, le=1)
    """Share of the training pairs whose rejected answer is one of the model's own wrong answers."""
    prompts: int = Field(default=1024, ge=1)
    """Prompts to answer."""
    samples: int = Field(default=4, ge=1)
    """Answers sampled for each prompt."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Longest answer in tokens."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RowsConfig:
    """The mixture of conversations (sft), pairs (reward, dpo) or prompts (ppo)."""

    sources: dict[str, RowSourceConfig]
    """Sources by name."""
    validation_every: int = Field(default=50, ge=2)
    """Hold out every n-th row of a source that names no `validation_path`."""
    too_long: Literal["drop", "cut"] = "drop"
    """What happens to rows longer than `train.sequence_length`; counted in the log either way."""
    sampled_pairs: SampledPairsConfig | None = None
    """Pairs against the starting model's own mistakes (reward and dpo; needs rows with a checkable answer)."""
