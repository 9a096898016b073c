"""Rankings for reward and pairs for dpo: those of the data, and pairs against the starting model's own mistakes.

A reward model that has only seen mistakes of other kinds than the policy makes lets the policy through with them.
So some pairs set the right answer against a wrong one that the policy itself has sampled (`data.sampled_pairs`). That
needs rows whose answer can be checked: a column `answer`, or the embedded arithmetic.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TypeVar

from llmtrain.config.errors import DataError
from llmtrain.config.schema import AlignConfig, RewardConfig, SampledPairsConfig
from llmtrain.config.seeds import derive_seed
from llmtrain.data.conversations import encode_prompt
from llmtrain.data.encoding import PairRow, RankingRow, accepted_pairs, encoded_pair, load_pairs, load_rankings
from llmtrain.data.records import Faults, Split
from llmtrain.data.rows import PAIRS, Pair, read_rows
from llmtrain.data.tokenizers import Tokenizer
from llmtrain.generation.sampler import generate
from llmtrain.models.heads import LanguageModel
from llmtrain.rewards.rules import is_right
from llmtrain.stages.assembly import Run

Rows = dict[str, list[PairRow]]
Rankings = dict[str, list[RankingRow]]
Row = TypeVar("Row")


def build_pairs(
    run: Run[RewardConfig] | Run[AlignConfig], policy: LanguageModel, tokenizer: Tokenizer, length: int
) -> tuple[Rows, Rows]:
    """Training and held-out pairs by source; `policy` is the starting model, whose mistakes are sampled if wanted."""
    data, limit = run.config.data, run.config.eval.max_rows

    def load() -> tuple[Rows, Rows]:
        return (
            load_pairs(data, tokenizer, split="train", max_length=length, cache_dir=run.cache),
            load_pairs(data, tokenizer, split="validation", max_length=length, cache_dir=run.cache, limit=limit),
        )

    rows, held_out = run.main_first(load)
    if data.sampled_pairs:
        rows = with_mistakes(rows, lambda pair: pair, run, policy, tokenizer, length, data.sampled_pairs)
    return rows, held_out


def build_rankings(
    run: Run[RewardConfig], policy: LanguageModel, tokenizer: Tokenizer, length: int
) -> tuple[Rankings, Rankings]:
    """Training and held-out rankings by source; `policy` as in `build_pairs`."""
    config, limit = run.config, run.config.eval.max_rows

    def load() -> tuple[Rankings, Rankings]:
        return (
            read_rankings(config, tokenizer, "train", length, run.cache),
            read_rankings(config, tokenizer, "validation", length, run.cache, limit),
        )

    rows, held_out = run.main_first(load)
    if config.data.sampled_pairs:
        rows = with_mistakes(rows, ranking_of_pair, run, policy, tokenizer, length, config.data.sampled_pairs)
    return rows, held_out


def read_rankings(
    config: RewardConfig, tokenizer: Tokenizer, split: Split, length: int, cache: Path, limit: int | None = None
) -> Rankings:
    """The rankings of the data, whole or as pairs (`objective.rankings`), at most `limit` of each source.

    Raises DataError as the loader, and for a pair without a margin where `objective.margin_weight` needs one.
    """
    rows = load_rankings(config.data, tokenizer, split=split, max_length=length, cache_dir=cache, limit=limit)
    if config.objective.rankings == "pairs":
        rows = {name: [pair for row in each for pair in row.pairs()][:limit] for name, each in rows.items()}
    if config.objective.margin_weight:
        for name, each in rows.items():
            lacking = next((row for row in each if None in row.margins), None)
            if lacking:
                raise DataError(
                    f"objective.margin_weight needs a margin for every pair, and there is none in data.sources.{name}"
                    f"{f' at {lacking.place}' if lacking.place else ''}: expected a number in `margin`, or in "
                    f"the column that data.sources.{name}.columns.margin names"
                )
    return rows


def ranking_of_pair(pair: PairRow) -> RankingRow:
    """A pair without a margin as a ranking of two."""
    return RankingRow((pair.chosen, pair.rejected), ((0, 1),), (None,), pair.place)


def with_mistakes(
    rows: dict[str, list[Row]], made: Callable[[PairRow], Row], run: Run[RewardConfig] | Run[AlignConfig],
    policy: LanguageModel, tokenizer: Tokenizer, length: int, wanted: SampledPairsConfig,
) -> dict[str, list[Row]]:  # fmt: skip
    """The rows with as many pairs against sampled mistakes added as make up their share, evenly spread.

    `made` makes a row of a pair. Raises DataError where the model made no mistake, or the rows have no answer to check
    against.
    """
    mixed: dict[str, list[Row]] = {}
    for name, source in run.config.data.sources.items():
        faults = Faults(run.config.data.on_error)  # told of when the rows were loaded
        pairs = read_rows(PAIRS, source, run.config.data.validation_every, "train", run.cache, faults)
        pairs = accepted_pairs(tokenizer, pairs, faults)
        asked = [pair for pair in islice(pairs, wanted.prompts) if pair.answer is not None]
        if not asked:
            raise DataError(
                f"data.sampled_pairs: the rows of {name} have no `answer` that a sample could be checked against"
            )
        sampled = [
            made(row) for pair in mistakes(asked, policy, tokenizer, wanted, run)
            if (row := encoded_pair(tokenizer, pair, length, run.config.data.too_long))
        ]  # fmt: skip
        if not sampled:
            raise DataError(
                f"data.sampled_pairs: the model made no mistake in {len(asked) * wanted.samples} samples of {name}; "
                "leave it out"
            )
        run.say(
            f"{name}: {len(sampled)} pairs against the model's own mistakes in {len(asked) * wanted.samples} samples"
        )
        mixed[name] = interleaved(rows[name], sampled, wanted.share)
    return mixed


def mistakes(
    asked: list[Pair], policy: LanguageModel, tokenizer: Tokenizer, wanted: SampledPairsConfig,
    run: Run[RewardConfig] | Run[AlignConfig],
) -> Iterator[Pair]:  # fmt: skip
    """Pairs of the right answer and each different wrong one that the policy gave."""
    policy.to(run.layout.device)
    prompts = [encode_prompt(tokenizer, pair.prompt) for pair in asked for _ in range(wanted.samples)]
    with run.autocast():
        answers = generate(
            policy, prompts, max_new_tokens=wanted.max_new_tokens, stop_tokens=set(tokenizer.stop_ids),
            temperature=wanted.temperature,
            seeds=[derive_seed(run.config.seed, "sampled pairs", number) for number in range(len(prompts))],
        )  # fmt: skip
    texts = [tokenizer.decode(answer) for answer in answers]
    for number, pair in enumerate(asked):
        given = texts[number * wanted.samples : (number + 1) * wanted.samples]
        for text in dict.fromkeys(given):
            if text and not is_right(text, pair.answer or ""):
                yield Pair(pair.prompt, pair.chosen, text, pair.answer)


def interleaved(pairs: list[Row], sampled: list[Row], share: float) -> list[Row]:
    """Rows of the data and sampled ones, `share` of them sampled; the scarcer kind decides how many there are.

    Samples are used up to four times each before rows of the data are left out.
    """
    if share == 1.0:
        return sampled
    count = min(len(pairs), round(4 * len(sampled) * (1 - share) / share))
    extra = round(count * share / (1 - share))
    return [*pairs[:count], *(sampled[number % len(sampled)] for number in range(extra))]
