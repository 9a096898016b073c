"""Several answers to one prompt, and which is better → pairs of a better and a worse one, alone or kept together.

The order comes from ranks, from scores, or from labels (good or not), in one row or in rows with the same prompt. All
pairs of different rank are made, in the order of the answers, as for InstructGPT's reward model
(https://arxiv.org/abs/2203.02155, section 3.5); answers of equal rank or with the same text make none.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import Any

from llmtrain.config.errors import DataError
from llmtrain.data.columns import Fields
from llmtrain.data.messages import Messages, read_messages, short
from llmtrain.data.pieces import Place
from llmtrain.data.records import Faults, RowError

# Keys of an answer that is an object with its own score or rank (UltraFeedback, Nectar, StackExchange).
TEXTS = ("content", "text", "answer", "response", "completion", "output", "value")
SCORES = ("score", "overall_score", "pm_score", "reward", "rating")
RANKS = ("rank",)
# Scores and margins become float32, and so do differences of them.
LARGEST = 1e38


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two ways in which the assistant goes on; `answer` is what a right one ends in, where that can be checked.

    `margin` says how much better the chosen one is, in the data's own unit: its column, or the difference of scores.
    """

    prompt: Messages
    chosen: str
    rejected: str
    answer: str | None = None
    place: Place | str | None = dataclasses.field(default=None, compare=False)
    margin: float | None = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Different ways in which the assistant goes on, and which is better than which: all that is known of a prompt."""

    prompt: Messages
    answers: tuple[str, ...]
    better: tuple[tuple[int, int], ...]
    """Pairs of a better and a worse answer, by number."""
    margins: tuple[float | None, ...]
    """How much better, for each pair."""
    place: Place | str | None = dataclasses.field(default=None, compare=False)

    @classmethod
    def of(cls, pairs: list[Pair]) -> "Ranking":
        """The ranking that all these pairs of one prompt are taken from; a pair that comes twice counts once."""
        texts = [text for pair in pairs for text in (pair.chosen, pair.rejected)]
        number = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        margins = {(number[pair.chosen], number[pair.rejected]): pair.margin for pair in reversed(pairs)}
        better = dict.fromkeys((number[pair.chosen], number[pair.rejected]) for pair in pairs)
        return cls(
            pairs[0].prompt, tuple(number), tuple(better), tuple(margins[each] for each in better), _places(pairs)
        )


@dataclasses.dataclass(frozen=True)
class Judged:
    """One answer and how good it is; pairs come from other rows with the same prompt."""

    prompt: Messages
    text: str
    score: float
    place: Place


def ranked_pairs(prompt: Messages, fields: Fields, answer: str | None) -> list[Pair]:
    """The pairs of a row with several answers. Raises DataError where it does not say which are better."""
    answers = fields["answers"]
    if not isinstance(answers, list):
        raise DataError(f"{fields.called('answers')} must be a list of answers, found {short(answers)}")
    texts = [_text(answer, fields) for answer in answers]
    scores = _scores(answers, fields)
    if len(scores) != len(texts):
        raise DataError(f"{len(texts)} answers, but {len(scores)} scores or ranks")
    judged = [Judged(prompt, text, score, fields.place) for text, score in zip(texts, scores, strict=True)]
    return [_pair(better, worse, answer) for better, worse in _ordered(judged)]


def are_ranked(fields: Fields) -> bool:
    """Whether a row holds several answers and how good they are."""
    if fields.named("answers", "scores") or fields.named("answers", "ranks"):
        return True
    answers = fields.get("answers")
    return isinstance(answers, list) and bool(answers) and _own_key(answers[0], (*RANKS, *SCORES)) is not None


def paired(rows: Iterable[list[Pair | Judged]], path: str, faults: Faults) -> Iterator[list[Pair]]:
    """The pairs of each row, then those of judged rows with the same prompt, prompt by prompt.

    Rows that no other is better or worse than are counted. Raises DataError where there is no pair at all.
    """
    judged: dict[str, list[Judged]] = {}
    found = False
    for group in rows:
        pairs = [each for each in group if isinstance(each, Pair)]
        if pairs:
            found = True
            yield pairs
        for one in group:
            if isinstance(one, Judged):
                judged.setdefault(json.dumps(one.prompt, sort_keys=True), []).append(one)
    for same in judged.values():
        ordered = _ordered(same)
        if ordered:
            found = True
            yield [_pair(better, worse) for better, worse in ordered]
        in_pairs = {id(one) for two in ordered for one in two}
        for each in same:
            if id(each) not in in_pairs:
                reason = "no other row answers the same prompt better or worse"
                leave_out(faults, RowError(reason, f"{each.place}: {reason}"))
    if judged and not found:
        raise DataError(
            f"{path}: none of the {len(judged)} prompts has a better and a worse answer, so there are no pairs to "
            f"learn from; expected rows with the same prompt and different labels or scores\n{faults.report()}"
        )


def ranked(rows: Iterable[list[Pair | Judged]], path: str, faults: Faults) -> Iterator[list[Ranking]]:
    """`paired`, with the pairs of a row or a prompt as one ranking."""
    for pairs in paired(rows, path, faults):
        yield [Ranking.of(pairs)]


def leave_out(faults: Faults, fault: RowError) -> None:
    """Count a row that is not used by rule rather than for a fault of its own; it never stops the run."""
    faults.counts[fault.reason] += 1
    faults.first.setdefault(fault.reason, str(fault))


def _ordered(answers: list[Judged]) -> list[tuple[Judged, Judged]]:
    """All pairs of a better and a worse answer."""
    pairs = [two for two in combinations(answers, 2) if two[0].score != two[1].score and two[0].text != two[1].text]
    return [(first, second) if first.score > second.score else (second, first) for first, second in pairs]


def _pair(better: Judged, worse: Judged, answer: str | None = None) -> Pair:
    place = better.place if better.place == worse.place else f"{better.place} and {worse.place}"
    return Pair(better.prompt, better.text, worse.text, answer, place, better.score - worse.score)


def _places(pairs: list[Pair]) -> Place | str | None:
    places = dict.fromkeys(pair.place for pair in pairs)
    if len(places) == 1:
        return pairs[0].place
    return " and ".join(dict.fromkeys(part for place in places for part in str(place).split(" and ")))


def _text(answer: Any, fields: Fields) -> str:
    key = _own_key(answer, TEXTS)
    messages = read_messages(answer if key is None else answer[key], "assistant", fields.keys)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise DataError(f"an answer must be one text or one message of the assistant, found {short(answer)}")
    return str(messages[0]["content"])


def _scores(answers: list[Any], fields: Fields) -> list[float]:
    """The larger, the better."""
    if fields.named("scores"):
        return [number(each, fields.called("scores")) for each in _listed(fields, "scores")]
    if fields.named("ranks"):
        return [-number(each, fields.called("ranks")) for each in _listed(fields, "ranks")]
    return [_own_score(answer) for answer in answers]


def _listed(fields: Fields, meaning: str) -> list[Any]:
    found = fields[meaning]
    if not isinstance(found, list):
        raise DataError(f"{fields.called(meaning)} must be a list of numbers, found {short(found)}")
    return found


def _own_score(answer: Any) -> float:
    key = _own_key(answer, (*RANKS, *SCORES))
    if key is None:
        raise DataError(f"this answer has neither a score nor a rank: {short(answer)}")
    return -number(answer[key], key) if key in RANKS else number(answer[key], key)


def _own_key(answer: Any, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if answer.get(name) is not None), None) if isinstance(answer, dict) else None


def number(value: Any, name: str) -> float:
    """A score or rank. Raises DataError for what is no finite number."""
    found = finite(value)
    if found is None:
        raise DataError(f"{name} must be a number of at most {LARGEST:.0e}, found {short(value)}")
    return found


def finite(value: Any) -> float | None:
    """A number that float32 can hold, and twice of it too; None for all else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) <= LARGEST else None
