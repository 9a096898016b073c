"""What a stage or a run trains on, row by row: its order, its text, and where each row comes from."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmtrain.config.errors import ConfigError
from llmtrain.config.folders import CACHE
from llmtrain.config.schema import AlignConfig, PretrainConfig, RewardConfig, SamplingMethod, SftConfig
from llmtrain.data.batches import RowOrder, collate_text
from llmtrain.data.corruption import row_key
from llmtrain.data.encoding import (
    AnswerRow,
    PairRow,
    PromptRow,
    RankingRow,
    TokenRow,
    load_conversations,
    load_judged,
    load_pairs,
    load_prompts,
    with_mismatches,
)
from llmtrain.data.ledger import Ledger
from llmtrain.data.packing import PackedConversations
from llmtrain.data.preparation import prepare_sources
from llmtrain.data.sequence_pairs import SequencePairRow, answers_by_source
from llmtrain.data.sequences import TextRows, text_rows
from llmtrain.data.shards import TokenSource
from llmtrain.data.tokenizers import Tokenizer, load_tokenizer
from llmtrain.models.formats import read_config
from llmtrain.objectives.masked import MaskedBatch
from llmtrain.objectives.next_token import TokenBatch
from llmtrain.objectives.sequence_to_sequence import SequencePairBatch
from llmtrain.stages import handover, pretrain, sft
from llmtrain.stages.pairs import read_rankings
from llmtrain.stages.planning import drawn, make_plan, row_digests
from llmtrain.stages.tasks import build_task

RowStage = SftConfig | RewardConfig | AlignConfig


class Shown(NamedTuple):
    """A part of a row: what it is, its ids [length] and which of them are learned [length]."""

    name: str
    tokens: NDArray[Any]
    mask: NDArray[np.bool_]


def what_is_seen(config: PretrainConfig | RowStage, ledger: Ledger | None = None) -> "Seen":
    """The rows of a stage; with the `ledger` of its run, as the run has drawn them.

    Raises ConfigError for rows that cannot be told.
    """
    if isinstance(config, PretrainConfig) and config.data.streaming:
        raise ConfigError(
            "data.streaming: the rows of a stream cannot be asked for; they can with data.streaming=false"
        )
    return SeenText(config, ledger) if isinstance(config, PretrainConfig) else SeenRows(config, ledger)


def rows_in_order(order: RowOrder) -> Iterator[tuple[str, int]]:
    """Source and row number of each row of a run, in order."""
    for step in count():
        yield from rows_of_step(order, step)


def rows_of_step(order: RowOrder, step: int) -> Iterator[tuple[str, int]]:
    """Source and row number of each row of a step (from 0), in order."""
    for source, row in zip(*(each.tolist() for each in order(step)), strict=True):
        yield order.names[source], row


class SeenText:
    """Rows of pretraining text."""

    def __init__(self, config: PretrainConfig, ledger: Ledger | None = None) -> None:
        cache = Path(config.runs_dir) / CACHE
        self.config, self.tokenizer = config, pretrain.build_tokenizer(config, cache)
        self.task = build_task(config, self.tokenizer)
        self.length = self.task.row_length
        prepared = prepare_sources(config.data, tokenizer=self.tokenizer, cache_dir=cache)
        self.sources: dict[str, TokenSource] = {name: source.train for name, source in prepared.items()}
        self.rows: dict[str, TextRows] = {
            name: text_rows(source, config.data, self.length, self.tokenizer.pad_id)
            for name, source in self.sources.items()
        }  # fmt: skip
        parameters = 0
        if config.train.tokens_per_parameter:
            model = pretrain.build_model(config, self.tokenizer)
            parameters = sum(each.numel() for each in model.parameters())
        said = {name: pretrain.digests(source) for name, source in self.sources.items()}
        self.plan = make_plan(
            config.data, config.train, {name: len(each) for name, each in self.rows.items()}, said, ledger=ledger,
            parameters=parameters, tokens_per_row=self.length,
        )  # fmt: skip
        self.order = self.plan.order(config.seed)
        self.amounts = {name: source.summary.documents for name, source in self.sources.items()}

    def counts(self, steps: int) -> dict[str, float]:
        """Tokens and epochs of each source that `steps` steps use."""
        return self.order.counts(steps, "tokens", self.length)

    def parts(self, name: str, row: int, when: tuple[int, int]) -> list[Shown]:
        """The row as a whole, or what the objective makes of it in a step (from 0) at a place of the batch."""
        names = self.order.names
        batch: Any = collate_text([self.rows[name][row]], [names.index(name)])
        if self.task.corrupt:
            by_number = {number: self.rows[each] for number, each in enumerate(names) if each in self.rows}
            batch = self.task.corrupt(by_number)(batch, [row_key(self.config.seed, *when)])
        return [Shown(f"row {row}{f', {part}' if part else ''}", *shown) for part, *shown in _parts(batch)]

    def places(self, name: str, row: int) -> list[str]:
        """The documents of which it holds a part."""
        source = self.sources[name]
        return [str(place) for span in self.rows[name].spans(row) for _, place in source.documents(*span)]

    def rows_from(self, name: str, file: str, number: int) -> list[int]:
        """The rows that hold a part of the document."""
        source, ends = self.sources[name], self.sources[name].ends()
        spans = [(int(ends[each - 1]) if each else 0, int(ends[each])) for each in source.find(file, number)]
        return [row for span in spans for row in self.rows[name].holding(*span)]


def _parts(batch: TokenBatch | MaskedBatch | SequencePairBatch) -> list[tuple[str, NDArray[Any], NDArray[np.bool_]]]:
    """What the model reads of a batch of one row and what it predicts: names, ids and which of them are learned."""
    if isinstance(batch, TokenBatch):
        return [("", batch.tokens[0].numpy(), batch.loss_mask[0].numpy())]
    if isinstance(batch, SequencePairBatch):
        nothing = np.zeros(batch.inputs.shape[1], dtype=np.bool_)
        return [
            ("inputs", batch.inputs[0].numpy(), nothing),
            ("targets", batch.targets[0].numpy(), batch.loss_mask[0].numpy()),
        ]
    read, places = batch.tokens[0].numpy(), batch.places[0][batch.loss_mask[0]].numpy()
    hidden, written = np.zeros(len(read), dtype=np.bool_), read.copy()
    hidden[places], written[places] = True, batch.predicted().numpy()
    return [("as read", read, hidden), ("as written", written, hidden)]


class SeenRows:
    """Conversations, pairs, judged answers or prompts."""

    def __init__(self, config: RowStage, ledger: Ledger | None = None) -> None:
        folder = handover.model_folder(handover.parent(config))
        self.tokenizer = sft.build_tokenizer(config) if isinstance(config, SftConfig) else load_tokenizer(folder)
        model = read_config(folder)[0]
        length = min(config.train.sequence_length, model.max_sequence_length)
        found = _load(config, self.tokenizer, length)
        self.rows: Mapping[str, Sequence[Any]] = found
        if model.architecture == "encoder_decoder":
            self.rows = answers_by_source(found)
        if config.data.packing:
            self.rows = {name: PackedConversations(each, length) for name, each in found.items()}
        said = row_digests(config.data, found)
        self.amounts = {name: len(each) for name, each in self.rows.items()}  # what there is, by source
        self.plan = make_plan(config.data, drawn(config), self.amounts, said, ledger=ledger)
        self.order = self.plan.order(config.seed)

    def counts(self, steps: int) -> dict[str, float]:
        """Rows and epochs of each source that `steps` steps use."""
        return self.order.counts(steps, "rows")

    def parts(self, name: str, row: int, when: tuple[int, int]) -> list[Shown]:
        """The conversation, its answer apart for an encoder-decoder; the prompt; a pair's sides; a ranking's answers; a
        judged answer; what a packed row holds."""
        found = self.rows[name][row]
        if isinstance(found, AnswerRow):
            return [Shown("good answer" if found.desirable else "bad answer", *found.answer[:2])]
        if isinstance(found, RankingRow):
            return _ranked_answers(found)
        if isinstance(found, PairRow):
            return [Shown("chosen", *found.chosen[:2]), Shown("rejected", *found.rejected[:2])]
        if isinstance(found, PromptRow):
            tokens = np.array(found.tokens, dtype=np.int32)
            return [Shown("prompt", tokens, np.zeros(len(tokens), dtype=np.bool_))]
        if isinstance(found, SequencePairRow):
            return [Shown("inputs", *found.inputs[:2]), Shown("targets", *found.targets[:2])]
        if isinstance(found, TokenRow):
            return [Shown("conversation", *found[:2])]
        return [Shown(f"conversation {number}", *each[:2]) for number, each in enumerate(found)]

    def places(self, name: str, row: int) -> list[str]:
        """The row of the source's file; of a packed row all that are in it."""
        found = self.rows[name][row]
        return [str(each.place) for each in (found if isinstance(found, list) else [found]) if each.place is not None]

    def rows_from(self, name: str, file: str, number: int) -> list[int]:
        """The rows that come from there."""
        wanted = tuple(f"{file}, {unit} {number}" for unit in ("line", "row"))
        return [row for row in range(len(self.rows[name])) if any(_is(p, wanted) for p in self.places(name, row))]


def _ranked_answers(row: RankingRow) -> list[Shown]:
    """Each answer under what is known of it."""
    if row.better == ((0, 1),):
        return [Shown("chosen", *row.answers[0][:2]), Shown("rejected", *row.answers[1][:2])]
    shown = []
    for number, answer in enumerate(row.answers):
        worse = ", ".join(f"{other + 1}" for best, other in row.better if best == number)
        shown.append(Shown(f"answer {number + 1}" + (f", better than {worse}" if worse else ""), *answer[:2]))
    return shown


Seen = SeenText | SeenRows


def _is(place: str, wanted: tuple[str, ...]) -> bool:
    return any(each == name or each.endswith(f"/{name}") for each in place.split(" and ") for name in wanted)


def _load(config: RowStage, tokenizer: Tokenizer, length: int) -> Mapping[str, Sequence[Any]]:
    options: dict[str, Any] = {"split": "train", "max_length": length, "cache_dir": Path(config.runs_dir) / CACHE}
    if isinstance(config, SftConfig):
        return load_conversations(config.data, tokenizer, **options)
    if isinstance(config, AlignConfig) and isinstance(config.method, SamplingMethod):
        return load_prompts(config.data, tokenizer, **options)
    if isinstance(config, AlignConfig) and config.method.name == "kto":
        return with_mismatches(load_judged(config.data, tokenizer, **options), length, "train")
    if isinstance(config, RewardConfig):
        return read_rankings(config, tokenizer, "train", length, options["cache_dir"])
    return load_pairs(config.data, tokenizer, **options)


def check_reproducible(config: PretrainConfig | RowStage) -> None:
    """Raises ConfigError for a run whose rows cannot be told afterwards."""
    if isinstance(config, PretrainConfig) and config.data.streaming:
        raise ConfigError("the run's text was streamed (data.streaming): its rows cannot be told afterwards")
    if not isinstance(config, PretrainConfig) and config.data.sampled_pairs:
        raise ConfigError(
            "the run's pairs were in part sampled from its model (data.sampled_pairs), which is not done again here: "
            "its rows cannot be told"
        )


def as_if_here(config: PretrainConfig | RowStage, folder: Path) -> PretrainConfig | RowStage:
    """The config of a run, with `runs_dir` as it is seen from here."""
    root = folder
    for _ in Path(config.run).parts:
        root = root.parent
    return dataclasses.replace(config, runs_dir=str(root))
