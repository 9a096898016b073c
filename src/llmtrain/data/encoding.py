"""Rows → ids: the conversations, pairs and prompts of a mixture, encoded and brought to length.

They are few and short next to pretraining text, so they are held in memory.
"""

import logging
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from llmtrain.config.errors import DataError
from llmtrain.config.schema import RowsConfig
from llmtrain.data.conversations import Row, encode_conversation, encode_pair, encode_prompt
from llmtrain.data.records import Faults, Split
from llmtrain.data.rows import CONVERSATIONS, PAIRS, PROMPTS, Conversation, Kind, Pair, Prompt, read_rows
from llmtrain.data.tokenizers import Tokenizer

log = logging.getLogger(__name__)

Raw = TypeVar("Raw")
Encoded = TypeVar("Encoded")
TooLong = Literal["drop", "cut"]


class TokenRow(NamedTuple):
    """Ids [length], and which of them are to be predicted [length]."""

    tokens: NDArray[np.int32]
    mask: NDArray[np.bool_]


class PairRow(NamedTuple):
    """The preferred and the other continuation of one prompt."""

    chosen: TokenRow
    rejected: TokenRow


class PromptRow(NamedTuple):
    """Ids of a prompt, its last user message, and the right answer where there is one."""

    tokens: list[int]
    text: str
    answer: str | None


def load_conversations(
    config: RowsConfig,
    tokenizer: Tokenizer,
    *,
    split: Split,
    max_length: int,
    cache_dir: Path,
    limit: int | None = None,
) -> dict[str, list[TokenRow]]:
    """The conversations of each source, at most `max_length` tokens long, the first `limit` of each.

    Raises DataError for what cannot be read, and where all rows of a source are too long.
    """

    def encode(row: Conversation) -> TokenRow | None:
        return _cut(encode_conversation(tokenizer, row.messages), max_length, config.too_long)

    return _load(CONVERSATIONS, config, encode, split, max_length, cache_dir, limit)


def load_pairs(
    config: RowsConfig,
    tokenizer: Tokenizer,
    *,
    split: Split,
    max_length: int,
    cache_dir: Path,
    limit: int | None = None,
) -> dict[str, list[PairRow]]:
    """The pairs of each source; as `load_conversations`, for the longer of the two."""

    def encode(row: Pair) -> PairRow | None:
        return encoded_pair(tokenizer, row, max_length, config.too_long)

    return _load(PAIRS, config, encode, split, max_length, cache_dir, limit)


def load_prompts(
    config: RowsConfig,
    tokenizer: Tokenizer,
    *,
    split: Split,
    max_length: int,
    cache_dir: Path,
    limit: int | None = None,
) -> dict[str, list[PromptRow]]:
    """The prompts of each source; as `load_conversations`, but a prompt that is cut loses its beginning."""

    def encode(row: Prompt) -> PromptRow | None:
        return encoded_prompt(tokenizer, row, max_length, config.too_long)

    return _load(PROMPTS, config, encode, split, max_length, cache_dir, limit)


def encoded_pair(tokenizer: Tokenizer, pair: Pair, max_length: int, too_long: TooLong) -> PairRow | None:
    """A pair in ids; None where it is dropped for its length, or nothing of an answer would be left."""
    rows = encode_pair(tokenizer, pair.prompt, pair.chosen, pair.rejected)
    chosen, rejected = (_cut(row, max_length, too_long) for row in rows)
    return PairRow(chosen, rejected) if chosen and rejected else None


def encoded_prompt(tokenizer: Tokenizer, prompt: Prompt, max_length: int, too_long: TooLong) -> PromptRow | None:
    """A prompt in ids; None where it is dropped for its length."""
    ids = encode_prompt(tokenizer, prompt.messages)
    if len(ids) > max_length and too_long == "drop":
        return None
    return PromptRow(ids[-max_length:], prompt.messages[-1]["content"], prompt.answer)


def _cut(row: Row, max_length: int, too_long: TooLong) -> TokenRow | None:
    ids, mask = row
    if len(ids) > max_length and too_long == "drop":
        return None
    kept = TokenRow(np.array(ids[:max_length], dtype=np.int32), np.array(mask[:max_length], dtype=np.bool_))
    return kept if kept.mask[1:].any() else None


def _load(
    kind: Kind[Raw], config: RowsConfig, encode: Callable[[Raw], Encoded | None], split: Split, max_length: int,
    cache_dir: Path, limit: int | None,
) -> dict[str, list[Encoded]]:  # fmt: skip
    loaded: dict[str, list[Encoded]] = {}
    for name, source in config.sources.items():
        faults, place = Faults(config.on_error), f"data.sources.{name} ({split})"
        rows = islice(read_rows(kind, source, config.validation_every, split, cache_dir, faults), limit)
        loaded[name] = _encode_all(rows, encode, place, max_length)
        if faults.counts:
            log.warning("%s: %d rows left out:\n%s", place, faults.counts.total(), faults.report())
    return loaded


def _encode_all(
    rows: Iterable[Raw], encode: Callable[[Raw], Encoded | None], place: str, max_length: int
) -> list[Encoded]:
    encoded = [encode(row) for row in rows]
    kept = [row for row in encoded if row is not None]
    dropped = len(encoded) - len(kept)
    if dropped:
        log.warning("%s: %d of %d rows left out: longer than %d tokens", place, dropped, len(encoded), max_length)
    if encoded and not kept:
        raise DataError(f"{place}: all {dropped} rows are longer than {max_length} tokens; raise train.sequence_length")
    return kept
