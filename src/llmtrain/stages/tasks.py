"""What a pretraining objective makes of rows of text, and by what it is learned and measured."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from llmtrain.config.errors import ConfigError
from llmtrain.config.schema import (
    FillInTheMiddleConfig,
    MaskedConfig,
    NamedObjective,
    PrefixConfig,
    PretrainConfig,
    SpanCorruptionConfig,
    UsualObjectiveConfig,
)
from llmtrain.data.corruption import Corruption
from llmtrain.data.infilling import Infilling
from llmtrain.data.masking import BORDERS, Masking
from llmtrain.data.prefixes import Prefixes
from llmtrain.data.sequences import TextRows
from llmtrain.data.spans import SpanCorruption
from llmtrain.data.special_tokens import infilling_tokens, mask_tokens, sentinels
from llmtrain.data.tokenizers import Tokenizer
from llmtrain.engine.steps import Objective
from llmtrain.models.formats import read_config
from llmtrain.models.heads import LanguageModel
from llmtrain.objectives.masked import MaskedTokens
from llmtrain.objectives.next_token import NextToken
from llmtrain.objectives.sequence_to_sequence import SequenceToSequence
from llmtrain.stages import handover

Corrupt = Callable[[Mapping[int, TextRows]], Corruption[Any]]


@dataclasses.dataclass(frozen=True)
class Task:
    """One objective."""

    row_length: int
    """Tokens of text in a row; what the model reads of it may be longer or shorter."""
    objective: Callable[[Sequence[str]], Objective]
    """What is minimised, given the names of the sources."""
    measure: Objective
    """The same as a number of nats, of held-out rows."""
    corrupt: Corrupt | None = None
    """What becomes of rows, given the rows of each source by its number. None: they stay as they are."""
    corrupt_held_out: Corrupt | None = None
    """What becomes of held-out rows."""
    metrics: tuple[str, ...] = ()
    """What else of the objective's metrics is measured on held-out rows."""


def build_task(config: PretrainConfig, tokenizer: Tokenizer) -> Task:
    """The task of `objective`. Raises DataError where the tokenizer lacks a special token that it needs."""
    objective, length, whose = objective_of(config), config.train.sequence_length, _whose(config)
    losses: dict[str, Any] = {"z_loss": objective.z_loss, "label_smoothing": objective.label_smoothing}
    next_token = partial(Task, length, lambda names: NextToken(source_names=names, **losses), NextToken())
    if isinstance(objective, MaskedConfig):
        special = mask_tokens(tokenizer, whose, objective.next_sentence)
        mask = partial(Masking, objective, tokenizer, special)
        return Task(
            length - BORDERS if objective.next_sentence else length,
            lambda names: MaskedTokens(source_names=names, **losses), MaskedTokens(next_sentence_weight=0.0),
            mask, mask, ("masked_accuracy", *(["next_sentence_accuracy"] if objective.next_sentence else [])),
        )  # fmt: skip
    if isinstance(objective, SpanCorruptionConfig):
        lengths = objective.lengths_for(length)
        take_out = partial(
            SpanCorruption, objective, sentinels(tokenizer, lengths.spans, whose), eos_id=tokenizer.eos_id,
            start_id=tokenizer.pad_id,
        )  # fmt: skip
        return Task(
            lengths.text, lambda names: SequenceToSequence(source_names=names, **losses), SequenceToSequence(),
            lambda _: take_out(), lambda _: take_out(text_only=True),
        )  # fmt: skip
    if isinstance(objective, PrefixConfig):
        prefixes = Prefixes(objective, tokenizer.pad_id)
        return next_token(lambda _: prefixes, lambda _: prefixes)
    if isinstance(objective, FillInTheMiddleConfig):
        tokens = infilling_tokens(tokenizer, whose)
        infilling = Infilling(objective, tokens, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
        return next_token(lambda _: infilling)  # held-out text is read from left to right
    return next_token()


def objective_of(config: PretrainConfig) -> NamedObjective:
    """The objective, where auto is none by name.

    Raises ConfigError for auto and a model in a folder that is no decoder: its data may not be fit for the usual one.
    """
    if not isinstance(config.objective, UsualObjectiveConfig):
        return config.objective
    if config.model.init_from is None:
        return config.objective.of(config.model.architecture, config.model.pooler)
    there = read_config(handover.model_folder(config.model.init_from))[0]
    usual = config.objective.of(there.architecture, there.pooler)
    if there.architecture != "decoder":
        raise ConfigError(
            f"objective: the model of model.init_from={config.model.init_from} is an {there.architecture}; name the "
            f"objective: objective={usual.name}"
        )
    return usual


def check_model(config: PretrainConfig, model: LanguageModel) -> None:
    """Raises ConfigError for an objective that the model of `model.init_from` is not for; freezes what it never asks.

    A model that is new has been checked with its config.
    """
    objective, there = objective_of(config), model.config
    folder = f"the model of model.init_from={config.model.init_from}"
    if objective.architecture != there.architecture:
        raise ConfigError(
            f"objective.name: {objective.name} is for architecture {objective.architecture}, and {folder} is of "
            f"architecture {there.architecture}"
        )
    if not isinstance(objective, MaskedConfig):
        return
    if objective.next_sentence and not (there.pooler and there.num_segments >= 2):
        raise ConfigError(f"objective.next_sentence: {folder} has no pooler and segments; set it to false")
    if there.pooler and not objective.next_sentence:  # processes wait for the gradient of each weight that is trained
        model.pooler.requires_grad_(False)
        model.next_sentence.requires_grad_(False)


def check_rows(config: PretrainConfig, rows: Mapping[str, TextRows]) -> None:
    """Raises ConfigError for a source that has no other place for a second segment to come from."""
    objective = objective_of(config)
    for name, each in rows.items():
        if isinstance(objective, MaskedConfig) and objective.next_sentence and len(each) < 2:
            raise ConfigError(
                f"objective.next_sentence: data.sources.{name} has {len(each)} row(s) of text, and two are needed: one "
                "for each segment. Add text, or lower train.sequence_length"
            )


def _whose(config: PretrainConfig) -> str:
    """What errors call the tokenizer."""
    if config.tokenizer.path:
        return f"the tokenizer of tokenizer.path={config.tokenizer.path}"
    return f"the tokenizer of model.init_from={config.model.init_from}" if config.model.init_from else "the tokenizer"
