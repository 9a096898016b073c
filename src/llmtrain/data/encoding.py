"""Rows → ids: the conversations, pairs, judged answers and prompts of a mixture, encoded and brought to length.

They are few and short next to pretraining text, so they are held in memory.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Generic, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from llmtrain.config.errors import DataError
from llmtrain.config.schema import RowsConfig
from llmtrain.data.conversations import Row, divide, encode_conversation, encode_pair, encode_prompt, with_flags
from llmtrain.data.pieces import Place
from llmtrain.data.records import Faults, RowError, Split
from llmtrain.data.rows import (
    ANSWERS,
    CONVERSATIONS,
    PAIRS,
    PROMPTS,
    RANKINGS,
    Answer,
    Conversation,
    Kind,
    Pair,
    Prompt,
    Ranking,
    read_rows,
)
from llmtrain.data.tokenizers import Tokenizer

log = logging.getLogger(__name__)

Raw = TypeVar("Raw", Conversation, Pair, Ranking, Answer, Prompt)
TooLong = Literal["drop", "cut", "split"]


class TokenRow(NamedTuple):
    """Ids [length], which of them are to be predicted [length], and where the row comes from."""

    tokens: NDArray[np.int32]
    mask: NDArray[np.bool_]
    place: Place | str | None = None

    @property
    def sides(self) -> "tuple[TokenRow, ...]":
        """Itself: a row has one side, a pair two."""
        return (self,)


class PairRow(NamedTuple):
    """The preferred and the other continuation of one prompt.

    `reference` are the reference's log-probabilities of both answers, where they are known before training.
    """

    chosen: TokenRow
    rejected: TokenRow
    place: Place | str | None = None
    reference: tuple[float, float] | None = None

    @property
    def sides(self) -> tuple[TokenRow, TokenRow]:
        """Both continuations."""
        return self.chosen, self.rejected


class JudgedRow(NamedTuple):
    """A continuation of a prompt, and whether it is good."""

    answer: TokenRow
    desirable: bool
    place: Place | str | None = None


class AnswerRow(NamedTuple):
    """A judged continuation of a prompt, and one that answers another; `reference` as in `PairRow`."""

    answer: TokenRow
    mismatched: TokenRow
    desirable: bool
    place: Place | str | None = None
    reference: tuple[float, float] | None = None

    @property
    def sides(self) -> tuple[TokenRow, TokenRow]:
        """Both continuations."""
        return self.answer, self.mismatched


class RankingRow(NamedTuple):
    """Several continuations of one prompt, and which is better than which; see `Ranking`."""

    answers: tuple[TokenRow, ...]
    better: tuple[tuple[int, int], ...]
    margins: tuple[float | None, ...]
    place: Place | str | None = None

    @property
    def sides(self) -> tuple[TokenRow, ...]:
        """All continuations."""
        return self.answers

    def pairs(self) -> "list[RankingRow]":
        """Each of its pairs as a row of its own."""
        return [
            RankingRow((self.answers[best], self.answers[worse]), ((0, 1),), (margin,), self.place)
            for (best, worse), margin in zip(self.better, self.margins, strict=True)
        ]


class PromptRow(NamedTuple):
    """Ids of a prompt, its last user message, and the right answer where there is one."""

    tokens: list[int]
    text: str
    answer: str | None
    place: Place | str | None = None

    @property
    def sides(self) -> "tuple[PromptRow, ...]":
        """Itself."""
        return (self,)


Encoded = TypeVar("Encoded", TokenRow, PairRow, RankingRow, JudgedRow, PromptRow)


@dataclasses.dataclass
class Tally:
    """What became of the rows of a source that are longer than `max_length` tokens; `flagged`: rows with flags."""

    max_length: int
    rows: int = 0
    cut: int = 0
    divided: int = 0
    parts: int = 0
    lost_parts: int = 0
    dropped: int = 0
    shortened: int = 0
    flagged: int = 0

    def count(self, length: int, fits: bool) -> None:
        """Count a row of `length` tokens that fits now, or does not."""
        if length > self.max_length:
            self.cut += fits
            self.dropped += not fits

    def report(self) -> str:
        """One line; empty where no row was too long."""
        lost = f" ({self.lost_parts} more parts left out)" if self.lost_parts else ""
        said = [f"{self.dropped} left out"] if self.dropped else []
        said += [f"{self.cut} cut"] if self.cut else []
        said += [f"{self.shortened} without their long answers"] if self.shortened else []
        said += [f"{self.divided} divided into {self.parts}{lost}"] if self.divided else []
        long = self.dropped + self.cut + self.divided + self.shortened
        return f"{long} of {self.rows} rows are longer than {self.max_length} tokens: {', '.join(said)}" if long else ""


@dataclasses.dataclass(frozen=True)
class Loader(Generic[Raw, Encoded]):
    """Loads the rows of each source of a mixture, at most `max_length` tokens long, the first `limit` of each.

    What is done about longer ones, and about rows that cannot be used, is in the config; it is counted in the log.
    Raises DataError for what cannot be read, and where no row of a source can be used.
    """

    kind: Kind[Raw]
    encode: Callable[[Tokenizer, Raw, RowsConfig, Tally], list[Encoded]]

    def __call__(
        self, config: RowsConfig, tokenizer: Tokenizer, *, split: Split, max_length: int, cache_dir: Path,
        limit: int | None = None,
    ) -> dict[str, list[Encoded]]:  # fmt: skip
        """The rows by source."""
        loaded: dict[str, list[Encoded]] = {}
        for name, source in config.sources.items():
            place, faults, tally = f"data.sources.{name} ({split})", Faults(config.on_error), Tally(max_length)
            rows = read_rows(self.kind, source, config.validation_every, split, cache_dir, faults)
            loaded[name] = list(islice(self._encoded(rows, config, tokenizer, faults, tally), limit))
            _tell(place, config, faults, tally)
            if tally.rows and not loaded[name]:
                raise DataError(f"{place}: {_why_none(tally, faults)}")
        return loaded

    def _encoded(
        self, rows: Iterable[Raw], config: RowsConfig, tokenizer: Tokenizer, faults: Faults, tally: Tally
    ) -> Iterator[Encoded]:
        for row in rows:
            tally.rows += 1
            try:
                for encoded in self.encode(tokenizer, row, config, tally):
                    yield encoded._replace(place=row.place)
            except DataError as error:
                faults.add(_fault(error, row.place))


def _fault(error: DataError, place: Place | str | None) -> RowError:
    reason = error.reason if isinstance(error, RowError) else "refused by the chat template"
    return RowError(reason, f"{place}: {error}" if place else str(error))


def _tell(place: str, config: RowsConfig, faults: Faults, tally: Tally) -> None:
    if tally.report():
        log.warning("%s: %s", place, tally.report())
    if faults.counts:
        log.warning("%s: %d rows left out:\n%s", place, faults.counts.total(), faults.report())
    if config.loss_on == "flagged" and tally.rows and not tally.flagged:
        log.warning("%s: no message has a flag for data.loss_on=flagged: all turns of the assistant are learned", place)
    if config.loss_on != "flagged" and tally.flagged:
        message = "%s: messages of %d rows say whether to learn them, which data.loss_on=%s does not use"
        log.warning(message, place, tally.flagged, config.loss_on)


def _why_none(tally: Tally, faults: Faults) -> str:
    if tally.dropped == tally.rows:
        return f"all {tally.rows} rows are longer than {tally.max_length} tokens; raise train.sequence_length"
    report = "\n".join(filter(None, (tally.report(), faults.report())))
    return f"none of the {tally.rows} rows can be used\n{report}"


def _conversation(tokenizer: Tokenizer, row: Conversation, config: RowsConfig, tally: Tally) -> list[TokenRow]:
    tally.flagged += any("train" in message for message in row.messages)
    messages = with_flags(row.messages, config.loss_on)
    ids, mask = encode_conversation(tokenizer, messages, "flagged")
    if not any(mask[1:]):
        raise RowError("nothing to learn", "nothing in this conversation is learned")
    if len(ids) > tally.max_length and config.too_long == "split":
        return _divided(divide(tokenizer, messages, tally.max_length), tally)
    fitting = _fitting((ids, mask), tally.max_length, config.too_long)
    tally.count(len(ids), fitting is not None)
    return [fitting] if fitting else []


def _divided(parts: list[Row | None], tally: Tally) -> list[TokenRow]:
    learned = [part for part in parts if part is not None and any(part[1][1:])]
    kept = [row for part in learned if (row := _fitting(part, tally.max_length, "drop"))]
    tally.divided += bool(kept)
    tally.dropped += not kept
    tally.parts += len(kept)
    tally.lost_parts += len(parts) - len(kept) if kept else 0
    return kept


def encoded_pair(tokenizer: Tokenizer, pair: Pair, max_length: int, too_long: TooLong) -> PairRow | None:
    """A pair in ids; None where it is left out for its length, or nothing of an answer would be left."""
    return _fitting_pair(tokenizer, pair, Tally(max_length), too_long)


def encoded_prompt(tokenizer: Tokenizer, prompt: Prompt, max_length: int, too_long: TooLong) -> PromptRow | None:
    """A prompt in ids; None where it is left out for its length. One that is cut loses its beginning."""
    return _fitting_prompt(tokenizer, prompt, Tally(max_length), too_long)


def accepted_pairs(tokenizer: Tokenizer, pairs: Iterable[Pair], faults: Faults) -> Iterator[Pair]:
    """The pairs that the chat template accepts; the others go to `faults`."""
    for pair in pairs:
        try:
            encode_pair(tokenizer, pair.prompt, pair.chosen, pair.rejected)
        except DataError as error:
            faults.add(_fault(error, pair.place))
        else:
            yield pair


def _fitting_pair(tokenizer: Tokenizer, pair: Pair, tally: Tally, too_long: TooLong) -> PairRow | None:
    rows = encode_pair(tokenizer, pair.prompt, pair.chosen, pair.rejected)
    if not all(any(mask[1:]) for _, mask in rows):
        raise RowError("nothing to learn", "the chat template leaves nothing of an answer to learn")
    chosen, rejected = (_fitting(row, tally.max_length, too_long) for row in rows)
    fits = chosen is not None and rejected is not None
    tally.count(max(len(ids) for ids, _ in rows), fits)
    return PairRow(chosen, rejected) if chosen and rejected else None


def _fitting_answer(tokenizer: Tokenizer, answer: Answer, tally: Tally, too_long: TooLong) -> JudgedRow | None:
    messages = [*answer.prompt, {"role": "assistant", "content": answer.text}]
    ids, mask = encode_conversation(tokenizer, messages, "last")
    if not any(mask[1:]):
        raise RowError("nothing to learn", "the chat template leaves nothing of the answer to learn")
    fitting = _fitting((ids, mask), tally.max_length, too_long)
    tally.count(len(ids), fitting is not None)
    return JudgedRow(fitting, answer.desirable) if fitting else None


def with_mismatches(
    rows: Mapping[str, Sequence[JudgedRow]], max_length: int, split: Split
) -> dict[str, list[AnswerRow]]:  # fmt: skip
    """By source, each answer beside another prompt's (KTO, Ethayarajh et al. 2024, arXiv 2402.01306, equation 7).

    No answer stands beside two others, so the mismatched answers of a source are its answers. One that is too long
    with its prompt is cut. Where more than half of the rows have one prompt, the log says how many stay with it.
    Raises DataError where all rows of a source have one prompt, unless they are held out.
    """
    return {name: _mismatched(each, max_length, f"data.sources.{name}", split) for name, each in rows.items()}


def _mismatched(rows: Sequence[JudgedRow], max_length: int, place: str, split: Split) -> list[AnswerRow]:
    """Ordered by prompt, each row's other is half the source away: past all rows of its prompt, if these are not more.

    Prompts are in the order of their first rows, so where no two rows share one, the order is that of the source.
    """
    by_prompt: dict[bytes, list[int]] = {}
    for number, row in enumerate(rows):
        by_prompt.setdefault(_prompt(row.answer).tobytes(), []).append(number)
    if len(by_prompt) == 1 and split == "train":
        raise DataError(
            f"{place}: its rows have one prompt only, and method=kto also reads each prompt with an answer to another: "
            "add rows with other prompts, or choose another method"
        )
    most = max(map(len, by_prompt.values()), default=0)
    if 2 * most > len(rows):
        message = "%s (%s): %d of %d rows have the same prompt, so %d of them are set against an answer to it"
        log.warning(message, place, split, most, len(rows), 2 * most - len(rows))
    order, half = list(chain.from_iterable(by_prompt.values())), len(rows) // 2
    others = dict(zip(order, [*order[half:], *order[:half]], strict=True))
    return [
        AnswerRow(row.answer, _joined(row.answer, rows[others[number]].answer, max_length), row.desirable, row.place)
        for number, row in enumerate(rows)
    ]


def _prompt(row: TokenRow) -> NDArray[np.int32]:
    """The ids before the answer."""
    return row.tokens[: int(row.mask.argmax())]


def _joined(prompt_of: TokenRow, answer_of: TokenRow, max_length: int) -> TokenRow:
    """The prompt of one row with the answer of another."""
    prompt, answer = (int(row.mask.argmax()) for row in (prompt_of, answer_of))
    tokens = np.concatenate([prompt_of.tokens[:prompt], answer_of.tokens[answer:]])
    mask = np.concatenate([prompt_of.mask[:prompt], answer_of.mask[answer:]])
    return TokenRow(tokens[:max_length], mask[:max_length])


def _fitting_ranking(tokenizer: Tokenizer, ranking: Ranking, tally: Tally, too_long: TooLong) -> RankingRow | None:
    """The answers that fit, as far as there is a better or a worse one that fits."""
    turns = [{"role": "assistant", "content": answer} for answer in ranking.answers]
    rows = [encode_conversation(tokenizer, [*ranking.prompt, turn], "last") for turn in turns]
    if not all(any(mask[1:]) for _, mask in rows):
        raise RowError("nothing to learn", "the chat template leaves nothing of an answer to learn")
    fitting = {number: fits for number, row in enumerate(rows) if (fits := _fitting(row, tally.max_length, too_long))}
    pairs = {
        pair: margin for pair, margin in zip(ranking.better, ranking.margins, strict=True) if fitting.keys() >= {*pair}
    }
    if pairs and len(fitting) < len(rows):
        tally.shortened += 1
    else:
        tally.count(max(len(ids) for ids, _ in rows), bool(pairs))
    kept = {old: new for new, old in enumerate(sorted({number for pair in pairs for number in pair}))}
    better = tuple((kept[best], kept[worse]) for best, worse in pairs)
    return RankingRow(tuple(fitting[old] for old in kept), better, tuple(pairs.values())) if pairs else None


def _fitting_prompt(tokenizer: Tokenizer, prompt: Prompt, tally: Tally, too_long: TooLong) -> PromptRow | None:
    ids = encode_prompt(tokenizer, prompt.messages)
    fits = len(ids) <= tally.max_length or too_long == "cut"
    tally.count(len(ids), fits)
    return PromptRow(ids[-tally.max_length :], prompt.messages[-1]["content"], prompt.answer) if fits else None


def _fitting(row: Row, max_length: int, too_long: TooLong) -> TokenRow | None:
    ids, mask = row
    if len(ids) > max_length and (too_long != "cut" or not any(mask[1:max_length])):
        return None
    return TokenRow(np.array(ids[:max_length], dtype=np.int32), np.array(mask[:max_length], dtype=np.bool_))


def _listed(
    fit: Callable[[Tokenizer, Raw, Tally, TooLong], Encoded | None],
) -> Callable[[Tokenizer, Raw, RowsConfig, Tally], list[Encoded]]:
    def encode(tokenizer: Tokenizer, row: Raw, config: RowsConfig, tally: Tally) -> list[Encoded]:
        fitting = fit(tokenizer, row, tally, config.too_long)
        return [] if fitting is None else [fitting]

    return encode


load_conversations = Loader(CONVERSATIONS, _conversation)
load_pairs = Loader(PAIRS, _listed(_fitting_pair))  # the longer one of the two counts
load_judged = Loader(ANSWERS, _listed(_fitting_answer))
load_rankings = Loader(RANKINGS, _listed(_fitting_ranking))
load_prompts = Loader(PROMPTS, _listed(_fitting_prompt))
